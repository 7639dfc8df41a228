// What adamw_step does with one vector, and how pieces of parameters and gradients become fp32.
#ifndef FEINWERK_KERNELS_ADAMW_PIECES_H_
#define FEINWERK_KERNELS_ADAMW_PIECES_H_

#include "kernels/decode.h"
#include "kernels/dropout.h"

namespace feinwerk {
namespace {

// Floats of a piece. A block of codes up to this size keeps its new moments until its absmax is
// known; a larger one computes them twice.
constexpr int64_t kPiece = 1024;
// Elements of smaller blocks together, and how far ahead memory is asked for: with the states, two
// pieces and what comes next this leaves the first-level cache half empty.
constexpr int64_t kTogether = 512;
constexpr uint32_t kNan = 0x7fc00000;

// The scalars in every lane.
struct Lanes {
  F factor, weight1, beta2, weight2, eps, shrink, step_size, correction;
};
inline Lanes lanes_of(const AdamwScalars& s) {
  return {set1(s.grad_factor), set1(s.weight1), set1(s.beta2),     set1(s.weight2),
          set1(s.eps),         set1(s.shrink),  set1(s.step_size), set1(s.correction)};
}

// Where one vector of a parameter, its gradient and its moments lies.
struct Vectors {
  float* param;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
};

inline F advance_first(const Lanes& s, F grad, F exp_avg) {
  const F g = mul(grad, s.factor);
  return add(exp_avg, mul(sub(g, exp_avg), s.weight1));
}
inline F advance_second(const Lanes& s, F grad, F exp_avg_sq) {
  const F g = mul(grad, s.factor);
  return add(mul(exp_avg_sq, s.beta2), mul(mul(g, g), s.weight2));
}

inline F denominator(const Lanes& s, F exp_avg_sq) {
  return add(mul(square_root(exp_avg_sq), s.correction), s.eps);
}
inline F descend(const Lanes& s, F param, F exp_avg, F below) {
  return sub(mul(param, s.shrink), mul(div(exp_avg, below), s.step_size));
}

// Calls body(pointers, index) for every vector; the last elements come by way of copies, zeros
// beside them. A null pointer stays null.
template <class Body>
inline void for_each_vector(const Vectors& at, int64_t count, const Body& body) {
  const auto ahead = [](auto* p, int64_t i) { return p ? p + i : p; };
  const auto moved = [&](int64_t i) {
    return Vectors{ahead(at.param, i), ahead(at.grad, i), at.exp_avg + i, at.exp_avg_sq + i};
  };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) body(moved(i), i);
  if (i == count) return;
  const Vectors from = moved(i);
  float p[kWidth] = {}, g[kWidth] = {}, m[kWidth] = {}, v[kWidth] = {};
  const auto bytes = static_cast<size_t>(count - i) * sizeof(float);
  if (from.param) memcpy(p, from.param, bytes);
  if (from.grad) memcpy(g, from.grad, bytes);
  memcpy(m, from.exp_avg, bytes);
  memcpy(v, from.exp_avg_sq, bytes);
  body(Vectors{p, g, m, v}, i);
  if (from.param) memcpy(from.param, p, bytes);
  memcpy(from.exp_avg, m, bytes);
  memcpy(from.exp_avg_sq, v, bytes);
}

inline void update(const Lanes& s, const Vectors& vectors, int64_t count) {
  for_each_vector(vectors, count, [&](const Vectors& at, int64_t) {
    const F grad = load(at.grad);
    const F m = advance_first(s, grad, load(at.exp_avg));
    const F v = advance_second(s, grad, load(at.exp_avg_sq));
    store(at.param, descend(s, load(at.param), m, denominator(s, v)));
    store(at.exp_avg, m);
    store(at.exp_avg_sq, v);
  });
}

template <class Dtype>
inline void widen(const void* from, int64_t begin, int64_t count, float* to) {
  const auto* p = static_cast<const typename Dtype::Element*>(from) + begin;
  for (int64_t i = 0; i < count; i += kWidth)
    write_part<Float32>(to + i, count - i, read_part<Dtype>(p + i, count - i));
}

inline void narrow(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += kWidth)
    write_part<Bfloat16>(to + i, count - i, read_part<Float32>(from + i, count - i));
}

// What is in memory as fp32, or its copy in a piece.
inline const float* grad_piece(const feinwerk_adamw_step_args& args,
                               const feinwerk_adamw_tensor& tensor, int64_t begin, int64_t count,
                               float* piece) {
  if (args.grad_dtype == FEINWERK_FLOAT32) return static_cast<const float*>(tensor.grad) + begin;
  if (args.grad_dtype == FEINWERK_BFLOAT16)
    widen<Bfloat16>(tensor.grad, begin, count, piece);
  else
    widen<Float16>(tensor.grad, begin, count, piece);
  return piece;
}

inline float* param_piece(const feinwerk_adamw_step_args& args, const feinwerk_adamw_tensor& tensor,
                          int64_t begin, int64_t count, float* piece) {
  if (args.master == FEINWERK_MASTER_FLOAT32) return static_cast<float*>(tensor.param) + begin;
  if (args.master == FEINWERK_MASTER_STOCHASTIC) {
    widen<Bfloat16>(tensor.param, begin, count, piece);
    return piece;
  }
  const uint16_t* const high = static_cast<const uint16_t*>(tensor.param) + begin;
  const int16_t* const low = tensor.remainder + begin;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = (static_cast<uint32_t>(high[i]) << 16) + static_cast<uint32_t>(low[i]);
    memcpy(piece + i, &bits, 4);
  }
  return piece;
}

inline uint32_t bits_or_nan(float x) { return x == x ? bits_of(x) : kNan; }

inline void store_param(const feinwerk_adamw_step_args& args, const feinwerk_adamw_tensor& tensor,
                        int64_t begin, int64_t count, const float* piece) {
  if (args.master == FEINWERK_MASTER_FLOAT32) return;
  uint16_t* const high = static_cast<uint16_t*>(tensor.param) + begin;
  if (args.master == FEINWERK_MASTER_REMAINDER) {
    int16_t* const low = tensor.remainder + begin;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_or_nan(piece[i]);
      high[i] = static_cast<uint16_t>((bits + 0x8000) >> 16);
      low[i] = static_cast<int16_t>(bits & 0xffff);
    }
    return;
  }
  // Words come in blocks of 64 elements, which a piece may begin inside of.
  constexpr int64_t kPair = 2 * kDropBlock;
  uint32_t words[kPiece + 2 * kPair];
  const int64_t first = tensor.first_element + begin, inside = first % kDropBlock;
  const int64_t row = tensor.step << 32 | tensor.parameter;
  for (int64_t i = 0; i < inside + count; i += kPair)
    random_blocks<2>(args.seed, row, (first - inside + i) / kDropBlock, words + i);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_or_nan(piece[i]);
    const uint32_t random = piece[i] == piece[i] ? words[inside + i] >> 16 : 0;
    high[i] = static_cast<uint16_t>((bits + random) >> 16);
  }
}

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_ADAMW_PIECES_H_
