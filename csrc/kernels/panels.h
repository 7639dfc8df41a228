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

// x, as a dense weight of one dtype holds it, rounded to the dtype of the activations.
template <class Dtype>
inline F rounded(Dtype, Dtype, F x) {
  return x;
}
template <class Stored>
inline F rounded(Float32, Stored, F x) {
  return x;
}
inline F rounded(Float32, Float32, F x) { return x; }
template <class Dtype, class Stored>
inline F rounded(Dtype, Stored, F x) {
  typename Dtype::Element buffer[kWidth];
  Dtype::write(buffer, x);
  return Dtype::read(buffer);
}

// Asks for elements [begin, end) of W ahead of their use.
inline void prefetch_weight(const feinwerk_weight& w, int64_t begin, int64_t end) {
  if (!w.dense) return prefetch_codes(w.nf4, begin, end);
  const int64_t size = w.dense_dtype == FEINWERK_FLOAT32 ? 4 : 2;
  const char* const at = static_cast<const char*>(w.dense);
  for (int64_t byte = begin * size; byte < end * size; byte += 64) __builtin_prefetch(at + byte);
}

// Elements [begin, end) of W in fp32, rounded to Dtype, for a kernel's panel: kWidth floats at
// at(i) for i = 0, kWidth, ... below `total`, zeros past the end.
template <class Dtype, class Address>
inline void weight_row(const feinwerk_weight& w, int64_t begin, int64_t end, int64_t total,
                       const Address& at) {
  if (!w.dense) return decode_panel_row<Dtype>(w.nf4, begin, end, total, at);
  with_dtype(w.dense_dtype, [&](auto tag) {
    using Stored = decltype(tag);
    const auto* from = static_cast<const typename Stored::Element*>(w.dense) + begin;
    for (int64_t i = 0; i < total; i += kWidth) {
      const int64_t count = end - begin - i;
      const F x = count > 0 ? read_part<Stored>(from + i, count) : zero();
      store(at(i), rounded(Dtype{}, Stored{}, x));
    }
  });
}
#if defined(FEINWERK_BF16_DOT)
// The same in bf16, 32 elements at a time.
template <class Address>
inline void weight_row_bf16(const feinwerk_weight& w, int64_t begin, int64_t end, int64_t total,
                            const Address& at) {
  if (!w.dense) return decode_panel_row_bf16(w.nf4, begin, end, total, at);
  if (w.dense_dtype == FEINWERK_BFLOAT16) {
    const auto* from = static_cast<const uint16_t*>(w.dense) + begin;
    for (int64_t i = 0; i < total; i += 32)
      store(reinterpret_cast<float*>(at(i)),
            read_units<Bfloat16>(PairEngine{}, from + i, end - begin - i));
    return;
  }
  with_dtype(w.dense_dtype, [&](auto tag) {
    using Stored = decltype(tag);
    const auto* from = static_cast<const typename Stored::Element*>(w.dense) + begin;
    for (int64_t i = 0; i < total; i += 32)
      for (int64_t j = i; j < i + 32; j += kWidth) {
        const int64_t count = end - begin - j;
        auto* const to = reinterpret_cast<uint16_t*>(at(i)) + (j - i);
        store_bf16(to, count > 0 ? read_part<Stored>(from + j, count) : zero());
      }
  });
}
#endif

// A from rows of W: row n + r, units [t, t + depth).
template <class Dtype, class Engine>
inline void decode_rows(Engine, const feinwerk_weight& w, int64_t n, int64_t rows, int64_t t,
                        int64_t depth, typename Engine::Unit* a) {
  const int64_t k = t * Engine::kPair, total = depth * Engine::kPair,
                end = min64(w.nf4.cols, k + total);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = (n + r) * w.nf4.cols;
    const auto at = [=](int64_t i) { return a + Engine::a_offset(r, i / Engine::kPair); };
    prefetch_weight(w, row + end, row + min64(w.nf4.cols, end + total));
    if constexpr (Engine::kPair == 1)
      weight_row<Dtype>(w, row + k, row + end, total, at);
    else
      weight_row_bf16(w, row + k, row + end, total, at);
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
inline void prefetch_lanes(const feinwerk_weight& w, NextLanes next, int64_t t, int64_t lanes) {
  if (next.n + t >= w.nf4.rows || next.k >= w.nf4.cols) return;
  const int64_t begin = (next.n + t) * w.nf4.cols + next.k;
  const int64_t end = begin + min64(lanes, w.nf4.cols - next.k);
  prefetch_weight(w, begin, end);
}

// From one group of B to the next, in units. Rows of W are decoded across all groups, and with a
// power of two between them every line of a row would fall into the same cache set.
constexpr int64_t lane_stride(int64_t depth) { return (depth + 1) * kWidth; }

// B from rows of W: lanes are `lanes` columns from k on, the contraction runs over rows n + t.
template <class Dtype>
inline void decode_lanes(Fp32Engine, const feinwerk_weight& w, int64_t n, int64_t depth, int64_t k,
                         int64_t lanes, NextLanes next, float* b) {
  const int64_t end = min64(w.nf4.cols, k + lanes);
  for (int64_t t = 0; t < depth; ++t) {
    const auto at = [=](int64_t i) { return b + i / kWidth * lane_stride(depth) + t * kWidth; };
    prefetch_lanes(w, next, t, lanes);
    if (n + t < w.nf4.rows)
      weight_row<Dtype>(w, (n + t) * w.nf4.cols + k, (n + t) * w.nf4.cols + end, lanes, at);
    else
      for (int64_t i = 0; i < lanes; i += kWidth) store(at(i), zero());
  }
}
#if defined(FEINWERK_BF16_DOT)
template <class Dtype>
inline void decode_lanes(PairEngine, const feinwerk_weight& w, int64_t n, int64_t depth, int64_t k,
                         int64_t lanes, NextLanes next, uint32_t* b) {
  // Word 2 i of a result is word i of the even row, word 2 i + 1 that of the odd row.
  alignas(64) static constexpr uint16_t kFirst[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const I first = _mm512_load_si512(kFirst);
  const I second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const int64_t end = min64(w.nf4.cols, k + lanes);
  for (int64_t t = 0; t < depth; ++t) {
    alignas(64) uint16_t rows[2][kMaxRow];
    for (int64_t p = 0; p < 2; ++p) {
      const int64_t row = n + 2 * t + p;
      prefetch_lanes(w, next, 2 * t + p, lanes);
      const auto at = [&](int64_t i) { return rows[p] + i; };
      if (row < w.nf4.rows)
        weight_row_bf16(w, row * w.nf4.cols + k, row * w.nf4.cols + end, lanes, at);
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

// Turns C^T round: sink(m, n, v, w) gets v = C[n .. n + kWidth)[m] for every lane m in
// [begin, begin + count) and every n in steps of kWidth, and w the same of lane m + other (v itself
// when other is 0); values past n_count are zero.
template <class Sink>
inline void for_each_row(const float* c, int64_t c_stride, int64_t n_count, int64_t begin,
                         int64_t count, int64_t other, const Sink& sink) {
  const auto turn = [&](int64_t n, int64_t lane, F(&rows)[kWidth]) {
    for (int64_t i = 0; i < kWidth; ++i)
      rows[i] = n + i < n_count ? load(c + (n + i) * c_stride + lane) : zero();
    transpose(rows);
  };
  for (int64_t n = 0; n < n_count; n += kWidth)
    for (int64_t m = 0; m < count; m += kWidth) {
      F v[kWidth], w[kWidth];
      turn(n, begin + m, v);
      if (other) turn(n, begin + m + other, w);
      for (int64_t i = 0; i < min64(kWidth, count - m); ++i)
        sink(begin + m + i, n, v[i], other ? w[i] : v[i]);
    }
}

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_PANELS_H_
