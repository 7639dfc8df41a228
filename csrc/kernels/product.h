// The blocked matrix product under nf4_linear and its gradient:
// C[rows, lanes] += A[rows, T] B[T, lanes].
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
  using Lanes = F;                        // a unit of kWidth lanes
  static constexpr int64_t kPair = 1;     // elements of the contraction a unit
  static constexpr int64_t kDepth = 256;  // units a depth block
  static constexpr int64_t kRowUnit = 1;  // C and A are padded to a multiple of this many rows
  static int64_t a_offset(int64_t row, int64_t t) { return row * kDepth + t; }
  static Lanes lanes(const Unit* b) { return load(b); }
  static Lanes everywhere(Unit a) { return set1(a); }
  static F multiply_add(Lanes a, Lanes b, F c) { return fma(a, b, c); }
};

#if defined(FEINWERK_BF16_DOT)
struct PairEngine {
  using Unit = uint32_t;
  static constexpr int64_t kPair = 2;
  static constexpr int64_t kDepth = 256;
};

struct Bf16Engine : PairEngine {
  using Lanes = I;
  static constexpr int64_t kRowUnit = 1;
  static int64_t a_offset(int64_t row, int64_t t) { return row * kDepth + t; }
  static Lanes lanes(const Unit* b) { return load_dwords(b); }
  static Lanes everywhere(Unit a) { return _mm512_set1_epi32(static_cast<int32_t>(a)); }
  static F multiply_add(Lanes a, Lanes b, F c) { return dot_bf16(c, a, b); }
};
#endif

// The register tile: n_rows of A by n_groups of B over one depth block.
template <int n_rows, int n_groups, class Engine>
inline void micro(Engine, const typename Engine::Unit* a, const typename Engine::Unit* b,
                  int64_t b_stride, int64_t depth, float* c, int64_t c_stride, bool first) {
  F acc[n_rows][n_groups];
#pragma GCC unroll 16
  for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < n_groups; ++g)
      acc[r][g] = first ? zero() : load(c + r * c_stride + g * kWidth);
  for (int64_t t = 0; t < depth; ++t) {
    typename Engine::Lanes lanes[n_groups];
#pragma GCC unroll 4
    for (int g = 0; g < n_groups; ++g) lanes[g] = Engine::lanes(b + g * b_stride + t * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; ++r) {
      const typename Engine::Lanes value = Engine::everywhere(a[Engine::a_offset(r, t)]);
#pragma GCC unroll 4
      for (int g = 0; g < n_groups; ++g)
        acc[r][g] = Engine::multiply_add(value, lanes[g], acc[r][g]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < n_rows; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < n_groups; ++g) store(c + r * c_stride + g * kWidth, acc[r][g]);
}

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
  struct Third {
    enum { value = kMicroRows / 3 };
  };
  struct Two {
    enum { value = 2 };
  };
  struct One {
    enum { value = 1 };
  };
  step(Full{});
  step(Half{});
  step(Third{});
  step(Two{});
  step(One{});
}

// C[rows, groups * kWidth] (+)= A B over one depth block.
template <class Engine>
inline void multiply(Engine engine, const typename Engine::Unit* a, int64_t rows,
                     const typename Engine::Unit* b, int64_t b_stride, int64_t groups,
                     int64_t depth, float* c, int64_t c_stride, bool first) {
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
inline void multiply(AmxEngine, const uint32_t* a, int64_t rows, const uint32_t* b,
                     int64_t b_stride, int64_t groups, int64_t depth, float* c, int64_t c_stride,
                     bool first) {
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

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_PRODUCT_H_
