// Reads an NF4 weight: block scales, and runs of elements decoded in natural order.
#ifndef FEINWERK_KERNELS_DECODE_H_
#define FEINWERK_KERNELS_DECODE_H_

#include "core/codebook.h"
#include "core/kernel_table.h"
#include "simd/simd.h"

namespace feinwerk {
namespace {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

// The elements [first, last) of a block of rows of `length` elements, which it does not cross.
//
//   row 0   | block 0 | block 1 | 2 |        blocksize elements each, the last one what is left
//   row 1   | block 3 | block 4 | 5 |
struct RowBlock {
  int64_t first, last;
};
inline RowBlock row_block(int64_t length, int64_t blocksize, int64_t block) {
  const int64_t blocks_a_row = 1 + (length - 1) / blocksize;
  const int64_t row = block / blocks_a_row;
  const int64_t column = (block - row * blocks_a_row) * blocksize;
  const int64_t first = row * length + column;
  return {first, first + min64(blocksize, length - column)};
}

// How elements of a dtype are read, written and rounded. `Element` is the type in memory.
struct Float32 {
  using Element = float;
  static F read(const float* p) { return load(p); }
  static void write(float* p, F x) { store(p, x); }
  static Table16 round(Table16 t) { return t; }
};
struct Bfloat16 {
  using Element = uint16_t;
  static F read(const uint16_t* p) { return load_bf16(p); }
  static void write(uint16_t* p, F x) { store_bf16(p, x); }
  static Table16 round(Table16 t) { return round_bf16(t); }
};
struct Float16 {
  using Element = uint16_t;
  static F read(const uint16_t* p) { return load_f16(p); }
  static void write(uint16_t* p, F x) { store_f16(p, x); }
  static Table16 round(Table16 t) { return round_f16(t); }
};

// Calls body(Float32{}), body(Bfloat16{}) or body(Float16{}).
template <class Body>
inline auto with_dtype(feinwerk_dtype dtype, const Body& body) {
  if (dtype == FEINWERK_BFLOAT16) return body(Bfloat16{});
  if (dtype == FEINWERK_FLOAT16) return body(Float16{});
  return body(Float32{});
}

// kWidth elements of which only `count` exist; the rest read as zero and are not written.
template <class Dtype>
inline F read_part(const typename Dtype::Element* p, int64_t count) {
  if (count >= kWidth) return Dtype::read(p);
  typename Dtype::Element part[kWidth] = {};
  memcpy(part, p, static_cast<size_t>(count) * sizeof(part[0]));
  return Dtype::read(part);
}
template <class Dtype>
inline void write_part(typename Dtype::Element* p, int64_t count, F x) {
  if (count >= kWidth) return Dtype::write(p, x);
  typename Dtype::Element part[kWidth];
  Dtype::write(part, x);
  memcpy(p, part, static_cast<size_t>(count) * sizeof(part[0]));
}

inline float block_absmax(const feinwerk_nf4_weight& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  const float product =
      w.nested_codebook[w.absmax_codes[block]] * w.nested_absmax[block / kNestedBlocksize];
  return product + *w.nested_offset;
}

// out[i] = table[codes[i]], a load each: a gather of 16 floats takes four times as long on Zen 4.
inline void look_up(const float* table, const uint8_t* codes, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  if (count >= 64) i = look_up_words(table, codes, count, out);
#endif
  for (; i + 8 <= count; i += 8) {
    uint64_t eight;
    memcpy(&eight, codes + i, 8);
    uint32_t bits[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) memcpy(bits + j, table + (eight >> (8 * j) & 255), 4);
    memcpy(out + i, bits, sizeof(bits));
  }
  for (; i < count; ++i) out[i] = table[codes[i]];
}

// Most weights have whole blocks of 64 wherever a kernel cuts them: then one scale serves 64
// consecutive elements, and scales are read many at a time.
constexpr int64_t kScaleBlock = 64;
inline bool has_scale_blocks(const feinwerk_nf4_weight& w, int64_t cut) {
  return cut % kScaleBlock == 0 && w.blocksize >= kScaleBlock;
}

// scales[i] = the scale of elements [64 (first + i), 64 (first + i + 1)).
inline void read_scales(const feinwerk_nf4_weight& w, int64_t first, int64_t count, float* scales) {
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize / kScaleBlock));
  if (shift != 0) {
    for (int64_t i = 0; i < count; ++i) scales[i] = block_absmax(w, (first + i) >> shift);
    return;
  }
  if (w.absmax) {
    memcpy(scales, w.absmax + first, static_cast<size_t>(count) * 4);
    return;
  }
  look_up(w.nested_codebook, w.absmax_codes + first, count, scales);
  for (int64_t i = 0; i < count;) {
    const int64_t nested = (first + i) / kNestedBlocksize;
    const int64_t stop = min64(count, (nested + 1) * kNestedBlocksize - first);
    const F absmax = set1(w.nested_absmax[nested]), offset = set1(*w.nested_offset);
    for (; i + kWidth <= stop; i += kWidth)
      store(scales + i, add(mul(load(scales + i), absmax), offset));
    for (; i < stop; ++i) {
      const float product = scales[i] * w.nested_absmax[nested];
      scales[i] = product + *w.nested_offset;
    }
  }
}

// Asks for the scales of blocks of 64 elements ahead of their use.
inline void prefetch_scales(const feinwerk_nf4_weight& w, int64_t first, int64_t count) {
  const int64_t per_block = w.blocksize / kScaleBlock, size = w.absmax ? 4 : 1;
  const char* const at = w.absmax ? reinterpret_cast<const char*>(w.absmax)
                                  : reinterpret_cast<const char*>(w.absmax_codes);
  for (int64_t byte = 0; byte < count / per_block * size; byte += 64)
    __builtin_prefetch(at + first / per_block * size + byte);
}

// Asks for the codes of elements [begin, end) ahead of their use: the product walks short pieces of
// many rows, a pattern that hardware prefetchers do not follow.
inline void prefetch_codes(const feinwerk_nf4_weight& w, int64_t begin, int64_t end) {
  constexpr int64_t kLine = 64;
  for (int64_t byte = begin / 2; byte < end / 2; byte += kLine) __builtin_prefetch(w.packed + byte);
}

// Codes of elements [e, e + count), e at any parity, count <= 32: a pointer into `packed`, or the
// codes moved to byte boundaries in `buffer`. Never touches a byte that holds none of them.
inline const uint8_t* codes_at(const uint8_t* packed, int64_t e, int64_t count, int64_t full,
                               uint8_t* buffer) {
  const uint8_t* p = packed + e / 2;
  if (e % 2 == 0 && count == full) return p;
  memset(buffer, 0, static_cast<size_t>(full / 2));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = e % 2 + i;
    const int code = at % 2 == 0 ? p[at / 2] >> 4 : p[at / 2] & 15;
    buffer[i / 2] = static_cast<uint8_t>(buffer[i / 2] | (i % 2 == 0 ? code << 4 : code));
  }
  return buffer;
}

// Cuts elements [begin, end) at block boundaries: body(block, first, last).
template <class Body>
inline void for_each_block(const feinwerk_nf4_weight& w, int64_t begin, int64_t end,
                           const Body& body) {
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize));
  for (int64_t e = begin; e < end;) {
    const int64_t block = e >> shift, stop = min64(end, (block + 1) << shift);
    body(block, e, stop);
    e = stop;
  }
}

// dst[i] = element begin + i, held in fp32 and rounded to Dtype. Any range.
template <class Dtype>
inline void decode_floats(const feinwerk_nf4_weight& w, int64_t begin, int64_t end, float* dst) {
  const Table16 codebook = table16(kNf4Codebook);
  for_each_block(w, begin, end, [&](int64_t block, int64_t e, int64_t stop) {
    const Table16 table = Dtype::round(scale(codebook, block_absmax(w, block)));
    if (e % 2 == 0)
      for (; e + kWidth <= stop; e += kWidth)
        store(dst + (e - begin), decode(table, w.packed + e / 2));
    uint8_t buffer[kWidth / 2];
    for (; e < stop; e += kWidth) {
      const int64_t count = min64(kWidth, stop - e);
      const F x = decode(table, codes_at(w.packed, e, count, kWidth, buffer));
      write_part<Float32>(dst + (e - begin), count, x);
    }
  });
}

// Elements [begin, end) for a kernel's panel: kWidth floats at at(i) for i = 0, kWidth, ... below
// `total`, zeros past the end. total <= kMaxRow.
constexpr int64_t kMaxRow = 512;
template <class Dtype, class Address>
inline void decode_panel_row(const feinwerk_nf4_weight& w, int64_t begin, int64_t end,
                             int64_t total, Address at) {
  int64_t i = 0;
  if (has_scale_blocks(w, begin | (end - begin))) {
    const Table16 codebook = table16(kNf4Codebook);
    float scales[kMaxRow / kScaleBlock + kWidth];
    read_scales(w, begin / kScaleBlock, (end - begin) / kScaleBlock, scales);
    const uint8_t* packed = w.packed + begin / 2;
    for (; i < end - begin; i += kScaleBlock) {
      const Table16 table = Dtype::round(scale(codebook, scales[i / kScaleBlock]));
#pragma GCC unroll 16
      for (int64_t j = 0; j < kScaleBlock; j += kWidth)
        store(at(i + j), decode(table, packed + (i + j) / 2));
    }
  } else {
    float row[kMaxRow] = {};
    decode_floats<Dtype>(w, begin, end, row);
    for (; i < end - begin; i += kWidth) store(at(i), load(row + i));
  }
  for (; i < total; i += kWidth) store(at(i), zero());
}

#if defined(__AVX512BW__)
// dst[i] = element begin + i in bf16. Any range.
inline void decode_bf16(const feinwerk_nf4_weight& w, int64_t begin, int64_t end, uint16_t* dst) {
  const Table16 codebook = table16(kNf4Codebook);
  for_each_block(w, begin, end, [&](int64_t block, int64_t e, int64_t stop) {
    const TableBf16 table = table_bf16(scale(codebook, block_absmax(w, block)));
    if (e % 2 == 0)
      for (; e + 32 <= stop; e += 32)
        _mm512_storeu_si512(dst + (e - begin), decode32_bf16(table, w.packed + e / 2));
    uint8_t buffer[16];
    for (; e < stop; e += 32) {
      const int64_t count = min64(32, stop - e);
      const I x = decode32_bf16(table, codes_at(w.packed, e, count, 32, buffer));
      const auto mask = static_cast<__mmask32>((1ull << count) - 1);
      _mm512_mask_storeu_epi16(dst + (e - begin), mask, x);
    }
  });
}

#if defined(FEINWERK_BF16_DOT)
// The same as decode_panel_row in bf16, 32 elements at a time, for the bf16 dot product.
template <class Address>
inline void decode_panel_row_bf16(const feinwerk_nf4_weight& w, int64_t begin, int64_t end,
                                  int64_t total, Address at) {
  int64_t i = 0;
  if (has_scale_blocks(w, begin | (end - begin))) {
    const Table16 codebook = table16(kNf4Codebook);
    float scales[kMaxRow / kScaleBlock + kWidth];
    const int64_t count = (end - begin) / kScaleBlock;
    read_scales(w, begin / kScaleBlock, count, scales);
    scales[count] = 0;
    const uint8_t* packed = w.packed + begin / 2;
    for (int64_t block = 0; block < count; block += 2) {
      const I tables =
          table_bf16_pair(scale(codebook, scales[block]), scale(codebook, scales[block + 1]));
      _mm512_storeu_si512(at(i), decode32_words<0>(tables, packed + i / 2));
      _mm512_storeu_si512(at(i + 32), decode32_words<0>(tables, packed + i / 2 + 16));
      i += kScaleBlock;
      if (block + 1 == count) break;
      _mm512_storeu_si512(at(i), decode32_words<1>(tables, packed + i / 2));
      _mm512_storeu_si512(at(i + 32), decode32_words<1>(tables, packed + i / 2 + 16));
      i += kScaleBlock;
    }
  } else {
    uint16_t row[kMaxRow] = {};
    decode_bf16(w, begin, end, row);
    for (; i < end - begin; i += 32) _mm512_storeu_si512(at(i), _mm512_loadu_si512(row + i));
  }
  for (; i < total; i += 32) _mm512_storeu_si512(at(i), _mm512_setzero_si512());
}
#endif
#endif

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_DECODE_H_
