// What the blocked product multiplies: panels of activations, packed, and panels of W, decoded; and
// its result on the way out. The layouts of A, B and C are drawn in kernels/product.h.
#ifndef FEINWERK_KERNELS_PANELS_H_
#define FEINWERK_KERNELS_PANELS_H_

#include "kernels/decode.h"
#include "kernels/product.h"

namespace feinwerk {
namespace {

// How the contraction of `length` elements is cut: blocks of kDepth units, each a multiple of kRun
// elements, the end padded with zeros.
template <class Engine>
struct Depth {
  int64_t units;  // all blocks together
  explicit Depth(int64_t length) : units(round_up(length, kRun) / Engine::kPair) {}
  int64_t blocks() const { return (units + Engine::kDepth - 1) / Engine::kDepth; }
  int64_t begin(int64_t block) const { return block * Engine::kDepth; }
  int64_t size(int64_t block) const { return min64(Engine::kDepth, units - begin(block)); }
};

// One row's units from `p`, `count` elements of which may be fewer than a register holds.
template <class Dtype>
inline F read_units(Fp32Engine, const typename Dtype::Element* p, int64_t count) {
  return count > 0 ? read_part<Dtype>(p, count) : zero();
}
#if defined(FEINWERK_BF16_DOT)
template <class Dtype>
inline F read_units(PairEngine, const uint16_t* p, int64_t count) {
  if (count >= 32) return _mm512_castsi512_ps(_mm512_loadu_si512(p));
  if (count <= 0) return zero();
  const auto mask = static_cast<__mmask32>((1ull << count) - 1);
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
}
#endif

// B from kWidth rows of activations: lanes are rows, so kWidth x kWidth dwords are transposed.
// Rows past `rows` are zero.
template <class Dtype, class Engine>
inline void pack_lanes(Engine engine, const typename Dtype::Element* x, int64_t stride,
                       int64_t rows, int64_t length, int64_t depth, typename Engine::Unit* b) {
  for (int64_t t = 0; t < depth; t += kWidth) {
    F lanes[kWidth];
    const int64_t k = t * Engine::kPair;
    for (int64_t r = 0; r < kWidth; ++r)
      lanes[r] = r < rows ? read_units<Dtype>(engine, x + r * stride + k, length - k) : zero();
    transpose(lanes);
    for (int64_t j = 0; j < kWidth; ++j)
      store(reinterpret_cast<float*>(b + (t + j) * kWidth), lanes[j]);
  }
}

// A from rows of activations, as they are. Depth is a multiple of kRun elements.
template <class Dtype, class Engine>
inline void pack_rows(Engine engine, const typename Dtype::Element* x, int64_t stride, int64_t rows,
                      int64_t length, int64_t depth, typename Engine::Unit* a) {
  for (int64_t r = 0; r < round_up(rows, Engine::kRowUnit); ++r)
    for (int64_t t = 0; t < depth; t += kWidth) {
      const int64_t k = t * Engine::kPair;
      store(reinterpret_cast<float*>(a + Engine::a_offset(r, t)),
            r < rows ? read_units<Dtype>(engine, x + r * stride + k, length - k) : zero());
    }
}

// A from rows of W: row n + r, units [t, t + depth).
template <class Dtype, class Engine>
inline void decode_rows(Engine, const feinwerk_nf4_weight& w, int64_t n, int64_t rows, int64_t t,
                        int64_t depth, typename Engine::Unit* a) {
  const int64_t k = t * Engine::kPair, total = depth * Engine::kPair,
                end = min64(w.cols, k + total);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = (n + r) * w.cols;
    const auto at = [=](int64_t i) { return a + Engine::a_offset(r, i / Engine::kPair); };
    prefetch_codes(w, row + end, row + min64(w.cols, end + total));
    if constexpr (Engine::kPair == 1)
      decode_panel_row<Dtype>(w, row + k, row + end, total, at);
    else
      decode_panel_row_bf16(w, row + k, row + end, total, at);
  }
  for (int64_t r = rows; r < round_up(rows, Engine::kRowUnit); ++r)
    for (int64_t u = 0; u < depth; u += kWidth)
      store(reinterpret_cast<float*>(a + Engine::a_offset(r, u)), zero());
}

// Asks for what the next call of decode_lanes will read: row n + t of W, columns from k on. A whole
// product lies between, in which memory is idle; a few rows would be too short a time.
struct NextLanes {
  int64_t n, k;
};
inline void prefetch_lanes(const feinwerk_nf4_weight& w, NextLanes next, int64_t t, int64_t lanes) {
  if (next.n + t >= w.rows || next.k >= w.cols) return;
  const int64_t begin = (next.n + t) * w.cols + next.k;
  const int64_t end = begin + min64(lanes, w.cols - next.k);
  prefetch_codes(w, begin, end);
}

// From one group of B to the next, in units. Rows of W are decoded across all groups, and with a
// power of two between them every line of a row would fall into the same cache set.
inline int64_t lane_stride(int64_t depth) { return (depth + 1) * kWidth; }

// B from rows of W: lanes are `lanes` columns from k on, the contraction runs over rows n + t.
template <class Dtype>
inline void decode_lanes(Fp32Engine, const feinwerk_nf4_weight& w, int64_t n, int64_t depth,
                         int64_t k, int64_t lanes, NextLanes next, float* b) {
  const int64_t end = min64(w.cols, k + lanes);
  for (int64_t t = 0; t < depth; ++t) {
    const auto at = [=](int64_t i) { return b + i / kWidth * lane_stride(depth) + t * kWidth; };
    prefetch_lanes(w, next, t, lanes);
    if (n + t < w.rows)
      decode_panel_row<Dtype>(w, (n + t) * w.cols + k, (n + t) * w.cols + end, lanes, at);
    else
      for (int64_t i = 0; i < lanes; i += kWidth) store(at(i), zero());
  }
}
#if defined(FEINWERK_BF16_DOT)
template <class Dtype>
inline void decode_lanes(PairEngine, const feinwerk_nf4_weight& w, int64_t n, int64_t depth,
                         int64_t k, int64_t lanes, NextLanes next, uint32_t* b) {
  // Word 2 i of a result is word i of the even row, word 2 i + 1 that of the odd row.
  alignas(64) static constexpr uint16_t kFirst[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const I first = _mm512_load_si512(kFirst);
  const I second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const int64_t end = min64(w.cols, k + lanes);
  for (int64_t t = 0; t < depth; ++t) {
    alignas(64) uint16_t rows[2][kMaxRow];
    for (int64_t p = 0; p < 2; ++p) {
      const int64_t row = n + 2 * t + p;
      prefetch_lanes(w, next, 2 * t + p, lanes);
      const auto at = [&](int64_t i) { return rows[p] + i; };
      if (row < w.rows)
        decode_panel_row_bf16(w, row * w.cols + k, row * w.cols + end, lanes, at);
      else
        memset(rows[p], 0, static_cast<size_t>(lanes) * 2);
    }
    for (int64_t i = 0; i < lanes; i += 32) {
      const I even = _mm512_load_si512(rows[0] + i), odd = _mm512_load_si512(rows[1] + i);
      uint32_t* const to = b + i / kWidth * lane_stride(depth) + t * 16;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, first, odd));
      _mm512_storeu_si512(to + lane_stride(depth), _mm512_permutex2var_epi16(even, second, odd));
    }
  }
}
#endif

// values[i] = p[first + i] in fp32.
inline void read_floats(const void* p, feinwerk_dtype dtype, int64_t first, int64_t count,
                        float* values) {
  with_dtype(dtype, [&](auto tag) {
    using Dtype = decltype(tag);
    const auto* from = static_cast<const typename Dtype::Element*>(p) + first;
    for (int64_t i = 0; i < count; i += kWidth)
      write_part<Float32>(values + i, count - i, read_part<Dtype>(from + i, count - i));
  });
}

// C^T -> y: lanes of C are rows of y. bias may be null.
template <class Dtype>
inline void store_transposed(const float* c, int64_t c_stride, int64_t n_count, int64_t m_count,
                             const float* bias, typename Dtype::Element* y, int64_t y_stride) {
  for (int64_t n = 0; n < n_count; n += kWidth)
    for (int64_t m = 0; m < m_count; m += kWidth) {
      F rows[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        rows[i] = n + i < n_count ? load(c + (n + i) * c_stride + m) : zero();
        if (bias && n + i < n_count) rows[i] = add(rows[i], set1(bias[n + i]));
      }
      transpose(rows);
      for (int64_t i = 0; i < min64(kWidth, m_count - m); ++i)
        write_part<Dtype>(y + (m + i) * y_stride + n, n_count - n, rows[i]);
    }
}

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_PANELS_H_
