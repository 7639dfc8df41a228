// y = x W^T for a few rows of x: codes stay in registers, the scale of a block is applied after its
// dot product. One pass over the codes serves up to kGemvRows rows of x.
//
// Needs whole blocks of 64 elements: K % 64 == 0 and blocksize >= 64. Codes are read as dwords, 8
// consecutive elements a lane; nibble j of all lanes is looked up at once, so the activations are
// rearranged first, chunk by chunk of 8 * kWidth elements:
//
//   x[chunk]:  element 8 i + (j ^ 1)  ->  position kWidth j + i        (the high nibble comes
//   first)
#ifndef FEINWERK_KERNELS_GEMV_H_
#define FEINWERK_KERNELS_GEMV_H_

#include "kernels/decode.h"

namespace feinwerk {
namespace {

constexpr int64_t kGemvRows = 4;        // rows of x at once
constexpr int64_t kGemvWeightRows = 4;  // rows of W at once
constexpr int64_t kGemvUnit = 16;       // rows of W a unit
constexpr int64_t kChunk = 8 * kWidth;

inline bool gemv_fits(const feinwerk_nf4_weight& w) { return has_scale_blocks(w, w.cols); }
inline int64_t gemv_depth(const feinwerk_nf4_weight& w) { return round_up(w.cols, kChunk); }

// Calls body(c, load) for every chunk of a row, where load(row) reads the chunk's codes. Only the
// last chunk can be short: its missing codes read as zero, and meet activations that are zero.
template <class Body>
inline void for_each_chunk(int64_t cols, const Body& body) {
  const int64_t whole = cols / kChunk;
  for (int64_t c = 0; c < whole; ++c)
    body(c, [c](const uint8_t* row) { return load_dwords(row + c * (kChunk / 2)); });
  const int64_t left = cols - whole * kChunk;
  if (left == 0) return;
  body(whole, [=](const uint8_t* row) {
    uint8_t part[kChunk / 2] = {};
    memcpy(part, row + whole * (kChunk / 2), static_cast<size_t>(left / 2));
    return load_dwords(part);
  });
}

// fp32 activations.

template <class Dtype>
void gemv_pack(const typename Dtype::Element* x, int64_t rows, int64_t cols, float* packed) {
  const int64_t depth = round_up(cols, kChunk);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < depth; k += kChunk) {
      float chunk[kChunk];
      for (int64_t i = 0; i < kChunk; i += kWidth)
        store(chunk + i,
              k + i < cols ? read_part<Dtype>(x + m * cols + k + i, cols - k - i) : zero());
      float* out = packed + m * depth + k;
      for (int64_t j = 0; j < 8; ++j)
        for (int64_t i = 0; i < kWidth; ++i) out[j * kWidth + i] = chunk[8 * i + (j ^ 1)];
    }
}

template <int j, int m_rows>
inline void gemv_step(Table16 table, I codes, const float* x, int64_t depth, F (&part)[m_rows]) {
  const F w = decode_nibble<j>(table, codes);
  for (int m = 0; m < m_rows; ++m) {
    const F xv = load(x + m * depth + j * kWidth);
    part[m] = j == 0 ? mul(w, xv) : fma(w, xv, part[m]);
  }
}

// sums[r][m] for n_rows rows of W and m_rows rows of x.
template <int n_rows, int m_rows>
void gemv_tile(const uint8_t* packed, int64_t row_bytes, int64_t cols, const float* scales,
               int64_t scale_stride, const float* x, float (&sums)[n_rows][m_rows]) {
  const Table16 table = table16(kNf4Codebook);
  const int64_t depth = round_up(cols, kChunk);
  F acc[n_rows][m_rows];
  for (auto& row : acc)
    for (F& lane : row) lane = zero();
  for_each_chunk(cols, [&](int64_t c, auto load_codes) {
    const float* xc = x + c * kChunk;
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r) {
      const I codes = load_codes(packed + r * row_bytes);
      F part[m_rows];
      gemv_step<0>(table, codes, xc, depth, part);
      gemv_step<1>(table, codes, xc, depth, part);
      gemv_step<2>(table, codes, xc, depth, part);
      gemv_step<3>(table, codes, xc, depth, part);
      gemv_step<4>(table, codes, xc, depth, part);
      gemv_step<5>(table, codes, xc, depth, part);
      gemv_step<6>(table, codes, xc, depth, part);
      gemv_step<7>(table, codes, xc, depth, part);
      const F scale = spread8(scales + r * scale_stride, c);
#pragma GCC unroll 4
      for (int m = 0; m < m_rows; ++m) acc[r][m] = fma(part[m], scale, acc[r][m]);
    }
  });
  for (int r = 0; r < n_rows; ++r)
    for (int m = 0; m < m_rows; ++m) sums[r][m] = reduce_add(acc[r][m]);
}

// int8 activations: x = scale * q per 64 elements, W = absmax * code / 127.

// 127 * codebook, rounded: the error is at most 0.5 / 127 of a block's absmax.
constexpr int8_t kNf4Int8[16] = {-127, -88, -67, -50, -36, -23, -12, 0,
                                 10,   20,  31,  43,  56,  71,  92,  127};

// A row of packed int8 activations: bytes, the start of the sums, and the scales.
//   quants: per chunk kChunk / 2 even elements (they meet high nibbles), then kChunk / 2 odd ones
//   starts: per chunk kWidth int32, -kBias8 times the sum of the 8 quants of the lane
//   scales: per 64 elements, already divided by 127
struct Int8Row {
  const int8_t* quants;
  const int32_t* starts;
  const float* scales;
};
inline int64_t int8_row_bytes(int64_t cols) {
  const int64_t depth = round_up(cols, kChunk);
  return round_up(depth + depth / 8 * 4 + depth / kScaleBlock * 4 + 4, 64);
}
inline Int8Row int8_row(const uint8_t* p, int64_t cols) {
  const int64_t depth = round_up(cols, kChunk);
  return {reinterpret_cast<const int8_t*>(p), reinterpret_cast<const int32_t*>(p + depth),
          reinterpret_cast<const float*>(p + depth + depth / 8 * 4)};
}

template <class Dtype>
void int8_pack(const typename Dtype::Element* x, int64_t cols, uint8_t* packed) {
  const int64_t depth = round_up(cols, kChunk);
  auto* quants = reinterpret_cast<int8_t*>(packed);
  auto* starts = reinterpret_cast<int32_t*>(packed + depth);
  auto* scales = reinterpret_cast<float*>(packed + depth + depth / 8 * 4);
  memset(packed, 0, static_cast<size_t>(int8_row_bytes(cols)));
  for (int64_t k = 0; k < cols; k += kScaleBlock) {
    float block[kScaleBlock];
    I most = abs_bits(zero());
    for (int64_t i = 0; i < kScaleBlock; i += kWidth) {
      const F v = Dtype::read(x + k + i);
      store(block + i, v);
      most = max_bits(most, abs_bits(v));
    }
    const float absmax = float_of_bits(reduce_max_bits(most));
    const float inverse = absmax > 0 ? 127.0f / absmax : 0.0f;
    // NaN or infinity in x must reach y: a scale of NaN says so.
    scales[k / kScaleBlock] =
        absmax < __builtin_huge_valf() ? absmax / (127.0f * 127.0f) : __builtin_nanf("");
    for (int64_t i = 0; i < kScaleBlock; ++i) {
      const float scaled = block[i] * inverse;
      const float shifted = scaled + (scaled < 0 ? -0.5f : 0.5f);
      const int q = shifted > -128.0f && shifted < 128.0f ? static_cast<int>(shifted) : 0;
      const int64_t at = (k + i) % kChunk;
      quants[k + i - at + at / 2 + at % 2 * (kChunk / 2)] = static_cast<int8_t>(q);
      starts[(k + i) / 8] -= kBias8 * q;
    }
  }
}

template <int n_rows>
void int8_tile(const uint8_t* packed, int64_t row_bytes, int64_t cols, const float* scales,
               int64_t scale_stride, const Int8Row& x, float (&sums)[n_rows]) {
  const Table8 table = table8(kNf4Int8);
  F acc[n_rows];
  for (F& lane : acc) lane = zero();
  for_each_chunk(cols, [&](int64_t c, auto load_codes) {
    const int8_t* high = x.quants + c * kChunk;
    const I start = load_dwords(x.starts + c * kWidth);
    const F x_scale = spread8(x.scales, c);
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r) {
      const I codes = load_codes(packed + r * row_bytes);
      const I dot = dot_codes(start, table, codes, high, high + kChunk / 2);
      acc[r] = fma(to_float(dot), mul(x_scale, spread8(scales + r * scale_stride, c)), acc[r]);
    }
  });
  for (int r = 0; r < n_rows; ++r) sums[r] = reduce_add(acc[r]);
}

#if defined(FEINWERK_BF16_DOT)
// bf16 activations and weights rounded to bf16, as everywhere else: every 64 elements get a table
// of their own, codebook * absmax rounded, and two tables share a register. Words instead of
// dwords:
//
//   x[chunk]:  element 4 i + (j ^ 1)  ->  position 32 j + i,  j = 0 .. 3
inline void bf16_pack(const uint16_t* x, int64_t rows, int64_t cols, uint16_t* packed) {
  const int64_t depth = round_up(cols, kChunk);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < depth; k += kChunk) {
      uint16_t chunk[kChunk] = {};
      memcpy(chunk, x + m * cols + k, static_cast<size_t>(min64(kChunk, cols - k)) * 2);
      for (int64_t j = 0; j < 4; ++j)
        for (int64_t i = 0; i < 32; ++i)
          packed[m * depth + k + 32 * j + i] = chunk[4 * i + (j ^ 1)];
    }
}

template <int j, int m_rows>
inline void bf16_step(I table, I codes, const uint16_t* x, int64_t depth, F (&acc)[m_rows]) {
  const I w = decode_words<j>(table, codes);
  for (int m = 0; m < m_rows; ++m)
    acc[m] = dot_bf16(acc[m], w, load_dwords(x + m * depth + 32 * j));
}

template <int n_rows, int m_rows>
void bf16_tile(const uint8_t* packed, int64_t row_bytes, int64_t cols, const float* scales,
               int64_t scale_stride, const uint16_t* x, float (&sums)[n_rows][m_rows]) {
  const Table16 codebook = table16(kNf4Codebook);
  const int64_t depth = round_up(cols, kChunk);
  F acc[n_rows][2][m_rows];  // two chains a row: the dot product takes longer than its turn
  for (auto& row : acc)
    for (auto& chain : row)
      for (F& lane : chain) lane = zero();
  for_each_chunk(cols, [&](int64_t c, auto load_codes) {
    const uint16_t* xc = x + c * kChunk;
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r) {
      const float* two = scales + r * scale_stride + 2 * c;
      const I table = table_bf16_pair(scale(codebook, two[0]), scale(codebook, two[1]));
      const I codes = load_codes(packed + r * row_bytes);
      bf16_step<0>(table, codes, xc, depth, acc[r][0]);
      bf16_step<1>(table, codes, xc, depth, acc[r][1]);
      bf16_step<2>(table, codes, xc, depth, acc[r][0]);
      bf16_step<3>(table, codes, xc, depth, acc[r][1]);
    }
  });
  for (int r = 0; r < n_rows; ++r)
    for (int m = 0; m < m_rows; ++m) sums[r][m] = reduce_add(add(acc[r][0][m], acc[r][1][m]));
}
#endif

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_GEMV_H_
