// y = x W^T for a few rows of x: codes stay in registers, the scale of a block is applied after its
// dot product. One pass over the codes serves up to kGemvRows rows of x.
//
// Needs whole blocks of 64 elements: K % 64 == 0 and blocksize >= 64. Codes are read as dwords, 8
// consecutive elements a lane; nibble j of all lanes is looked up at once, so the activations are
// rearranged first, chunk by chunk of 8 * kWidth elements (j ^ 1: the high nibble comes first):
//
//   x[chunk][j][row][i]  =  element 8 i + (j ^ 1) of the chunk of a row
#ifndef FEINWERK_KERNELS_GEMV_H_
#define FEINWERK_KERNELS_GEMV_H_

#include "kernels/decode.h"

namespace feinwerk {
namespace {

constexpr int64_t kGemvRows = 4;        // rows of x at once
constexpr int64_t kGemvWeightRows = 4;  // rows of W at once
constexpr int64_t kGemvGroup = 16;      // rows of W whose scales are read together
constexpr int64_t kChunk = 8 * kWidth;

inline bool gemv_fits(const feinwerk_nf4_weight& w) { return has_scale_blocks(w, w.cols); }
inline int64_t gemv_depth(const feinwerk_nf4_weight& w) { return round_up(w.cols, kChunk); }

// Rows of W a unit: codes are asked for across the end of a unit, which goes to waste when another
// thread takes the next one, so units are large where that leaves enough of them.
inline int64_t gemv_unit(const feinwerk_nf4_weight& w) { return w.rows >= 2048 ? 64 : kGemvGroup; }

// Calls body(c, codes) for every chunk of n_rows neighbouring rows. The last chunk can be half a
// one, as K is a multiple of 64: its missing codes read as zero, and meet activations that are
// zero.
//
// Rows are read side by side, but the lines kAhead bytes on are asked for one after the other, into
// L2: this is the order that hardware prefetchers follow and join in. Side by side they do not, and
// memory is read at half its speed.
template <int n_rows, class Body>
inline void for_each_chunk(const uint8_t* packed, int64_t row_bytes, int64_t cols,
                           const Body& body) {
  constexpr int64_t kBytes = kChunk / 2, kLine = 64, kAhead = 16384;
  static_assert(kChunk <= 2 * kScaleBlock, "a short chunk is half a one");
  const int64_t chunks = cols / kChunk;
  for (int64_t c = 0; c < chunks; ++c) {
    I codes[n_rows];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r) {
      const int64_t line = (c * n_rows + r) * kBytes;
      if (kBytes >= kLine || line % kLine == 0) __builtin_prefetch(packed + line + kAhead, 0, 2);
      codes[r] = load_dwords(packed + r * row_bytes + c * kBytes);
    }
    body(c, codes);
  }
  if (kChunk <= kScaleBlock || cols % kChunk == 0) return;
  I codes[n_rows];
#pragma GCC unroll 4
  for (int r = 0; r < n_rows; ++r)
    codes[r] = load_half_dwords(packed + r * row_bytes + chunks * kBytes);
  body(chunks, codes);
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
      for (int64_t j = 0; j < 8; ++j)
        for (int64_t i = 0; i < kWidth; ++i)
          packed[k * rows + (j * rows + m) * kWidth + i] = chunk[8 * i + (j ^ 1)];
    }
}

// Nibble j of every row of W by its x. Rows inside: their sums are independent, and the CPU's
// scheduler is too short to find that out from one row after the other.
template <int j, int n_rows, int m_rows>
inline void gemv_step(Table16 table, const I (&codes)[n_rows], const float* x,
                      F (&part)[n_rows][m_rows]) {
  F lanes[m_rows];
#pragma GCC unroll 4
  for (int m = 0; m < m_rows; ++m) lanes[m] = load(x + (j * m_rows + m) * kWidth);
#pragma GCC unroll 4
  for (int r = 0; r < n_rows; ++r) {
    const F w = decode_nibble<j>(table, codes[r]);
#pragma GCC unroll 4
    for (int m = 0; m < m_rows; ++m)
      part[r][m] = j == 0 ? mul(w, lanes[m]) : fma(w, lanes[m], part[r][m]);
  }
}

// sums[r][m] for n_rows rows of W and m_rows rows of x.
template <int n_rows, int m_rows>
void gemv_tile(const uint8_t* packed, int64_t row_bytes, int64_t cols, const float* scales,
               int64_t scale_stride, const float* x, float (&sums)[n_rows][m_rows]) {
  const Table16 table = table16(kNf4Codebook);
  F acc[n_rows][m_rows];
  for (auto& row : acc)
    for (F& lane : row) lane = zero();
  for_each_chunk<n_rows>(packed, row_bytes, cols, [&](int64_t c, const I(&codes)[n_rows]) {
    const float* xc = x + c * kChunk * m_rows;
    F part[n_rows][m_rows];
    gemv_step<0>(table, codes, xc, part);
    gemv_step<1>(table, codes, xc, part);
    gemv_step<2>(table, codes, xc, part);
    gemv_step<3>(table, codes, xc, part);
    gemv_step<4>(table, codes, xc, part);
    gemv_step<5>(table, codes, xc, part);
    gemv_step<6>(table, codes, xc, part);
    gemv_step<7>(table, codes, xc, part);
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r) {
      const F scale = spread8(scales + r * scale_stride, c);
#pragma GCC unroll 4
      for (int m = 0; m < m_rows; ++m) acc[r][m] = fma(part[r][m], scale, acc[r][m]);
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
    int32_t q[kScaleBlock];
    for (int64_t i = 0; i < kScaleBlock; ++i) {
      const float scaled = block[i] * inverse;
      const float shifted = scaled + (scaled < 0 ? -0.5f : 0.5f);
      q[i] = shifted > -128.0f && shifted < 128.0f ? static_cast<int32_t>(shifted) : 0;
    }
    constexpr int64_t kPiece = kChunk < kScaleBlock ? kChunk : kScaleBlock;
    for (int64_t i = 0; i < kScaleBlock; i += kPiece) {
      const int64_t at = (k + i) % kChunk;
      int8_t* const high = quants + k + i - at + at / 2;
      for (int64_t j = 0; j < kPiece / 2; ++j) {
        high[j] = static_cast<int8_t>(q[i + 2 * j]);
        high[j + kChunk / 2] = static_cast<int8_t>(q[i + 2 * j + 1]);
      }
    }
    for (int64_t i = 0; i < kScaleBlock; ++i) starts[(k + i) / 8] -= kBias8 * q[i];
  }
}

template <int n_rows>
void int8_tile(const uint8_t* packed, int64_t row_bytes, int64_t cols, const float* scales,
               int64_t scale_stride, const Int8Row& x, float (&sums)[n_rows]) {
  const Table8 table = table8(kNf4Int8);
  F acc[n_rows];
  for (F& lane : acc) lane = zero();
  for_each_chunk<n_rows>(packed, row_bytes, cols, [&](int64_t c, const I(&codes)[n_rows]) {
    const int8_t* high = x.quants + c * kChunk;
    const I start = load_dwords(x.starts + c * kWidth);
    const F x_scale = spread8(x.scales, c);
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r) {
      const I dot = dot_codes(start, table, codes[r], high, high + kChunk / 2);
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
//   x[chunk][j][row][i]  =  element 4 i + (j ^ 1) of the chunk of a row,  j = 0 .. 3
inline void bf16_pack(const uint16_t* x, int64_t rows, int64_t cols, uint16_t* packed) {
  const int64_t depth = round_up(cols, kChunk);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < depth; k += kChunk) {
      uint16_t chunk[kChunk] = {};
      memcpy(chunk, x + m * cols + k, static_cast<size_t>(min64(kChunk, cols - k)) * 2);
      for (int64_t j = 0; j < 4; ++j)
        for (int64_t i = 0; i < 32; ++i)
          packed[k * rows + (j * rows + m) * 32 + i] = chunk[4 * i + (j ^ 1)];
    }
}

template <int j, int n_rows, int m_rows>
inline void bf16_step(const I (&tables)[n_rows], const SplitWords (&codes)[n_rows],
                      const uint16_t* x, F (&acc)[n_rows][2][m_rows]) {
  I lanes[m_rows];
#pragma GCC unroll 4
  for (int m = 0; m < m_rows; ++m) lanes[m] = load_dwords(x + (j * m_rows + m) * 32);
#pragma GCC unroll 4
  for (int r = 0; r < n_rows; ++r) {
    const I w = decode_words<j>(tables[r], codes[r]);
#pragma GCC unroll 4
    for (int m = 0; m < m_rows; ++m) acc[r][j % 2][m] = dot_bf16(acc[r][j % 2][m], w, lanes[m]);
  }
}

template <int n_rows, int m_rows>
void gemv_tile(const uint8_t* packed, int64_t row_bytes, int64_t cols, const float* scales,
               int64_t scale_stride, const uint16_t* x, float (&sums)[n_rows][m_rows]) {
  const Table16 codebook = table16(kNf4Codebook);
  F acc[n_rows][2][m_rows];  // two chains a row: the dot product takes longer than its turn
  for (auto& row : acc)
    for (auto& chain : row)
      for (F& lane : chain) lane = zero();
  for_each_chunk<n_rows>(packed, row_bytes, cols, [&](int64_t c, const I(&codes)[n_rows]) {
    const uint16_t* xc = x + c * kChunk * m_rows;
    I tables[n_rows];
    SplitWords words[n_rows];
#pragma GCC unroll 4
    for (int r = 0; r < n_rows; ++r) {
      const float* two = scales + r * scale_stride + 2 * c;
      tables[r] = table_bf16_pair(scale(codebook, two[0]), scale(codebook, two[1]));
      words[r] = split_words(codes[r]);
    }
    bf16_step<0>(tables, words, xc, acc);
    bf16_step<1>(tables, words, xc, acc);
    bf16_step<2>(tables, words, xc, acc);
    bf16_step<3>(tables, words, xc, acc);
  });
  for (int r = 0; r < n_rows; ++r)
    for (int m = 0; m < m_rows; ++m) sums[r][m] = reduce_add(add(acc[r][0][m], acc[r][1][m]));
}
#endif

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_GEMV_H_
