// The blocked matrix product under nf4_linear and its gradient: C[rows, lanes] += A[rows, T] B[T,
// lanes].
//
// Forward:   C = y^T,  A = W decoded (rows: out_features),  B = x packed    (lanes: rows of x)
// Backward:  C = dX,   A = dY packed (rows: rows of dY),    B = W decoded   (lanes: in_features)
//
// An engine fixes the unit of the contraction: one fp32 value, or a pair of bf16 values in a dword.
//   A  rows x T units; row-major for Fp32Engine and Bf16Engine, 16 x 16 tiles for AmxEngine
//   B  groups of kWidth lanes: [group][T][kWidth]
//   C  fp32, row-major
// Depth blocks of kDepth units keep a group of B in L1 and the block of A in L2.
#ifndef FEINWERK_KERNELS_PRODUCT_H_
#define FEINWERK_KERNELS_PRODUCT_H_

#include "kernels/decode.h"

namespace feinwerk {
namespace {

constexpr int64_t kRun = 32;  // elements decoded at a time; divides every blocksize

struct Fp32Engine {
  using Unit = float;
  static constexpr int64_t kPair = 1;     // elements of the contraction a unit
  static constexpr int64_t kDepth = 256;  // units a depth block
  static constexpr int64_t kRowUnit = 1;  // C and A are padded to a multiple of this many rows
  static int64_t a_offset(int64_t row, int64_t t) { return row * kDepth + t; }
};

template <int n_rows, int n_groups>
inline void micro(Fp32Engine, const float* a, const float* b, int64_t b_stride, int64_t depth,
                  float* c, int64_t c_stride, bool first) {
  F acc[n_rows][n_groups];
#pragma GCC unroll 16
  for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < n_groups; ++g)
      acc[r][g] = first ? zero() : load(c + r * c_stride + g * kWidth);
  for (int64_t t = 0; t < depth; ++t) {
    F lanes[n_groups];
#pragma GCC unroll 4
    for (int g = 0; g < n_groups; ++g) lanes[g] = load(b + g * b_stride + t * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; ++r) {
      const F value = set1(a[r * Fp32Engine::kDepth + t]);
#pragma GCC unroll 4
      for (int g = 0; g < n_groups; ++g) acc[r][g] = fma(value, lanes[g], acc[r][g]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < n_groups; ++g) store(c + r * c_stride + g * kWidth, acc[r][g]);
}

#if defined(FEINWERK_BF16_DOT)
struct PairEngine {
  using Unit = uint32_t;
  static constexpr int64_t kPair = 2;
  static constexpr int64_t kDepth = 256;
};

struct Bf16Engine : PairEngine {
  static constexpr int64_t kRowUnit = 1;
  static int64_t a_offset(int64_t row, int64_t t) { return row * kDepth + t; }
};

template <int n_rows, int n_groups>
inline void micro(Bf16Engine, const uint32_t* a, const uint32_t* b, int64_t b_stride, int64_t depth,
                  float* c, int64_t c_stride, bool first) {
  F acc[n_rows][n_groups];
#pragma GCC unroll 16
  for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < n_groups; ++g)
      acc[r][g] = first ? zero() : load(c + r * c_stride + g * kWidth);
  for (int64_t t = 0; t < depth; ++t) {
    I lanes[n_groups];
#pragma GCC unroll 4
    for (int g = 0; g < n_groups; ++g) lanes[g] = load_dwords(b + g * b_stride + t * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; ++r) {
      const I value = _mm512_set1_epi32(static_cast<int32_t>(a[r * Bf16Engine::kDepth + t]));
#pragma GCC unroll 4
      for (int g = 0; g < n_groups; ++g) acc[r][g] = dot_bf16(acc[r][g], value, lanes[g]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < n_groups; ++g) store(c + r * c_stride + g * kWidth, acc[r][g]);
}
#endif

// All rows against n_groups groups, in register tiles of kMicroRows and smaller.
template <int n_groups, class Engine>
inline void sweep_rows(Engine engine, const typename Engine::Unit* a, int64_t rows,
                       const typename Engine::Unit* b, int64_t b_stride, int64_t depth, float* c,
                       int64_t c_stride, bool first) {
  int64_t r = 0;
  const auto step = [&](auto count) {
    constexpr int n = decltype(count)::value;
    for (; r + n <= rows; r += n)
      micro<n, n_groups>(engine, a + Engine::a_offset(r, 0), b, b_stride, depth, c + r * c_stride,
                         c_stride, first);
  };
  struct Full {
    enum { value = kMicroRows };
  };
  struct Half {
    enum { value = kMicroRows / 2 };
  };
  struct Two {
    enum { value = 2 };
  };
  struct One {
    enum { value = 1 };
  };
  step(Full{});
  step(Half{});
  step(Two{});
  step(One{});
}

// C[rows, groups * kWidth] (+)= A B over one depth block.
template <class Engine>
inline void multiply(Engine engine, const typename Engine::Unit* a, int64_t rows,
                     const typename Engine::Unit* b, int64_t groups, int64_t depth, float* c,
                     int64_t c_stride, bool first) {
  const int64_t b_stride = depth * kWidth;
  int64_t g = 0;
  for (; g + kMicroVectors <= groups; g += kMicroVectors)
    sweep_rows<kMicroVectors>(engine, a, rows, b + g * b_stride, b_stride, depth, c + g * kWidth,
                              c_stride, first);
  for (; g < groups; ++g)
    sweep_rows<1>(engine, a, rows, b + g * b_stride, b_stride, depth, c + g * kWidth, c_stride,
                  first);
}

#if defined(FEINWERK_AMX)
// 16 rows of 16 pairs a tile, tiles of one block row after the other.
struct AmxEngine : PairEngine {
  static constexpr int64_t kRowUnit = 16;
  static int64_t a_offset(int64_t row, int64_t t) {
    return row / 16 * (16 * kDepth) + t / 16 * 256 + row % 16 * 16 + t % 16;
  }
};

// Every tile register: 16 rows of 64 bytes. Held by the thread until tiles_off().
inline void tiles_on() {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const config;
  _tile_loadconfig(&config);
}
inline void tiles_off() { _tile_release(); }

// Tile registers: C in 0-3, A in 4 and 5, B in 6 and 7.
template <int a_tiles, int b_tiles>
inline void amx_micro(const uint32_t* a, const uint32_t* b, int64_t b_stride, int64_t depth,
                      float* c, int64_t c_stride, bool first) {
  const size_t c_bytes = static_cast<size_t>(c_stride) * 4;
  float* const c10 = c + 16 * c_stride;
  if (first) {
    _tile_zero(0);
    if (b_tiles > 1) _tile_zero(1);
    if (a_tiles > 1) _tile_zero(2);
    if (a_tiles > 1 && b_tiles > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_bytes);
    if (b_tiles > 1) _tile_loadd(1, c + 16, c_bytes);
    if (a_tiles > 1) _tile_loadd(2, c10, c_bytes);
    if (a_tiles > 1 && b_tiles > 1) _tile_loadd(3, c10 + 16, c_bytes);
  }
  const uint32_t* const a1 = a + 16 * AmxEngine::kDepth;
  for (int64_t t = 0; t < depth; t += 16) {
    _tile_loadd(4, a + t * 16, 64);
    _tile_loadd(6, b + t * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (b_tiles > 1) {
      _tile_loadd(7, b + b_stride + t * 16, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (a_tiles > 1) {
      _tile_loadd(5, a1 + t * 16, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (b_tiles > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (b_tiles > 1) _tile_stored(1, c + 16, c_bytes);
  if (a_tiles > 1) _tile_stored(2, c10, c_bytes);
  if (a_tiles > 1 && b_tiles > 1) _tile_stored(3, c10 + 16, c_bytes);
}

// depth is a multiple of 16 units, rows of 16.
inline void multiply(AmxEngine, const uint32_t* a, int64_t rows, const uint32_t* b, int64_t groups,
                     int64_t depth, float* c, int64_t c_stride, bool first) {
  const int64_t b_stride = depth * 16;
  for (int64_t g = 0; g < groups; g += 2)
    for (int64_t r = 0; r < rows; r += 32) {
      const uint32_t* const a_tile = a + AmxEngine::a_offset(r, 0);
      const uint32_t* const b_tile = b + g * b_stride;
      float* const c_tile = c + r * c_stride + g * 16;
      const bool two_a = r + 16 < rows, two_b = g + 1 < groups;
      if (two_a && two_b)
        amx_micro<2, 2>(a_tile, b_tile, b_stride, depth, c_tile, c_stride, first);
      else if (two_a)
        amx_micro<2, 1>(a_tile, b_tile, b_stride, depth, c_tile, c_stride, first);
      else if (two_b)
        amx_micro<1, 2>(a_tile, b_tile, b_stride, depth, c_tile, c_stride, first);
      else
        amx_micro<1, 1>(a_tile, b_tile, b_stride, depth, c_tile, c_stride, first);
    }
}
#endif

// The engine a dtype runs on. fp16, and bf16 where no bf16 product exists, run in fp32 on weights
// and activations that are exact in their dtype.
template <class Body>
inline auto with_engine(feinwerk_dtype dtype, const Body& body) {
#if defined(FEINWERK_AMX)
  if (dtype == FEINWERK_BFLOAT16) return body(AmxEngine{}, Bfloat16{});
#elif defined(FEINWERK_BF16_DOT)
  if (dtype == FEINWERK_BFLOAT16) return body(Bf16Engine{}, Bfloat16{});
#else
  if (dtype == FEINWERK_BFLOAT16) return body(Fp32Engine{}, Bfloat16{});
#endif
  if (dtype == FEINWERK_FLOAT16) return body(Fp32Engine{}, Float16{});
  return body(Fp32Engine{}, Float32{});
}

// AMX needs its tiles configured on the thread that computes.
template <class Engine>
struct Tiles {
  Tiles() {}
};
#if defined(FEINWERK_AMX)
template <>
struct Tiles<AmxEngine> {
  Tiles() { tiles_on(); }
  ~Tiles() { tiles_off(); }
};
#endif

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
    const auto at = [&](int64_t i) { return a + Engine::a_offset(r, i / Engine::kPair); };
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

constexpr int64_t kRowsAhead = 16;  // rows between asking for codes and decoding them

inline void prefetch_row(const feinwerk_nf4_weight& w, int64_t row, int64_t k, int64_t end) {
  if (row < w.rows) prefetch_codes(w, row * w.cols + k, row * w.cols + end);
}

// B from rows of W: lanes are `lanes` columns from k on, the contraction runs over rows n + t.
template <class Dtype>
inline void decode_lanes(Fp32Engine, const feinwerk_nf4_weight& w, int64_t n, int64_t depth,
                         int64_t k, int64_t lanes, float* b) {
  const int64_t end = min64(w.cols, k + lanes);
  for (int64_t t = 0; t < depth; ++t) {
    const auto at = [&](int64_t i) { return b + i * depth + t * kWidth; };
    prefetch_row(w, n + t + kRowsAhead, k, end);
    if (n + t < w.rows)
      decode_panel_row<Dtype>(w, (n + t) * w.cols + k, (n + t) * w.cols + end, lanes, at);
    else
      for (int64_t i = 0; i < lanes; i += kWidth) store(at(i), zero());
  }
}
#if defined(FEINWERK_BF16_DOT)
template <class Dtype>
inline void decode_lanes(PairEngine, const feinwerk_nf4_weight& w, int64_t n, int64_t depth,
                         int64_t k, int64_t lanes, uint32_t* b) {
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
      prefetch_row(w, row + kRowsAhead, k, end);
      const auto at = [&](int64_t i) { return rows[p] + i; };
      if (row < w.rows)
        decode_panel_row_bf16(w, row * w.cols + k, row * w.cols + end, lanes, at);
      else
        memset(rows[p], 0, static_cast<size_t>(lanes) * 2);
    }
    for (int64_t i = 0; i < lanes; i += 32) {
      const I even = _mm512_load_si512(rows[0] + i), odd = _mm512_load_si512(rows[1] + i);
      _mm512_storeu_si512(b + i * depth + t * 16, _mm512_permutex2var_epi16(even, first, odd));
      _mm512_storeu_si512(b + (i + 16) * depth + t * 16,
                          _mm512_permutex2var_epi16(even, second, odd));
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

#endif  // FEINWERK_KERNELS_PRODUCT_H_
