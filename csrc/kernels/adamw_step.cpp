// adamw_step: decode, update, encode in one pass over the memory, a piece in cache at a time.
//
//   param  ─ join ──> p ┐                     ┌> p ─ split, round ──> param
//   grad   ─ widen ─> g ├─ update (fp32) ─────┤
//   states ─ decode > m, v ┘                  └> m, v ─ encode ─────> states
//
// What is fp32 in memory is updated where it lies, the rest through pieces of kPiece floats.
#include "kernels/decode.h"
#include "kernels/dropout.h"
#include "kernels/dynamic_codes.h"
#include "kernels/kernels.h"

namespace feinwerk {
namespace {

constexpr int64_t kPiece = 256;
// A block of codes up to this size keeps its new moments until its absmax is known; a larger one
// computes them twice.
constexpr int64_t kKept = 1024;
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

inline void advance(const Lanes& s, F grad, F* exp_avg, F* exp_avg_sq) {
  const F g = mul(grad, s.factor);
  *exp_avg = add(*exp_avg, mul(sub(g, *exp_avg), s.weight1));
  *exp_avg_sq = add(mul(*exp_avg_sq, s.beta2), mul(mul(g, g), s.weight2));
}

inline F descend(const Lanes& s, F param, F exp_avg, F exp_avg_sq) {
  const F ratio = div(exp_avg, add(mul(square_root(exp_avg_sq), s.correction), s.eps));
  return sub(mul(param, s.shrink), mul(ratio, s.step_size));
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

inline void prefetch(const Vectors& at, int64_t i) {
  constexpr int64_t kAhead = 256;  // floats
  __builtin_prefetch(at.param + i + kAhead, 1);
  __builtin_prefetch(at.grad + i + kAhead);
  __builtin_prefetch(at.exp_avg + i + kAhead, 1);
  __builtin_prefetch(at.exp_avg_sq + i + kAhead, 1);
}

inline void update(const Lanes& s, const Vectors& vectors, int64_t count) {
  for_each_vector(vectors, count, [&](const Vectors& at, int64_t i) {
    prefetch(vectors, i);
    F m = load(at.exp_avg), v = load(at.exp_avg_sq);
    advance(s, load(at.grad), &m, &v);
    store(at.param, descend(s, load(at.param), m, v));
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

inline void step_plain(const feinwerk_adamw_step_args& args, const feinwerk_adamw_tensor& tensor,
                       const AdamwScalars& scalars, int64_t begin, int64_t end) {
  float params[kPiece], grads[kPiece], first[kPiece], second[kPiece];
  const Lanes lanes = lanes_of(scalars);
  const bool narrow_states = args.state == FEINWERK_STATE_BFLOAT16;
  const bool direct = args.master == FEINWERK_MASTER_FLOAT32 && !narrow_states &&
                      args.grad_dtype == FEINWERK_FLOAT32;
  for (int64_t i = begin; i < end;) {
    const int64_t count = direct ? end - begin : min64(kPiece, end - i);
    const float* const g = grad_piece(args, tensor, i, count, grads);
    float* const p = param_piece(args, tensor, i, count, params);
    if (narrow_states) {
      widen<Bfloat16>(tensor.exp_avg, i, count, first);
      widen<Bfloat16>(tensor.exp_avg_sq, i, count, second);
    }
    float* const m = narrow_states ? first : static_cast<float*>(tensor.exp_avg) + i;
    float* const v = narrow_states ? second : static_cast<float*>(tensor.exp_avg_sq) + i;
    update(lanes, {p, g, m, v}, count);
    if (narrow_states) {
      narrow(m, count, static_cast<uint16_t*>(tensor.exp_avg) + i);
      narrow(v, count, static_cast<uint16_t*>(tensor.exp_avg_sq) + i);
    }
    store_param(args, tensor, i, count, p);
    i += count;
  }
}

// Below the smallest normal number the reciprocal overflows: such a block becomes zero.
inline float reciprocal(float absmax) { return absmax >= 0x1p-126f ? 1.0f / absmax : 0.0f; }

// One block of codes: elements [begin, end) of the parameter.
struct Block {
  const feinwerk_adamw_step_args& args;
  const feinwerk_adamw_tensor& tensor;
  const DynamicMap (&maps)[2];
  const Lanes& lanes;
  float old_absmax, old_absmax_sq;
  float inverse, inverse_sq;  // of the new ones
  F most, most_sq;

  uint8_t* codes() const { return static_cast<uint8_t*>(tensor.exp_avg); }
  uint8_t* codes_sq() const { return static_cast<uint8_t*>(tensor.exp_avg_sq); }

  // The new moments of `count` elements, and the maxima of their magnitudes but for NaN.
  void decode(int64_t i, int64_t count, float* m, float* v) {
    float grads[kPiece];
    look_up(maps[0].values, codes() + i, count, m);
    look_up(maps[1].values, codes_sq() + i, count, v);
    float* const g = const_cast<float*>(grad_piece(args, tensor, i, count, grads));
    const F absmax = set1(old_absmax), absmax_sq = set1(old_absmax_sq);
    const Lanes s = lanes;
    F high = most, high_sq = most_sq;
    for_each_vector({nullptr, g, m, v}, count, [&](const Vectors& at, int64_t) {
      F first = mul(load(at.exp_avg), absmax), second = mul(load(at.exp_avg_sq), absmax_sq);
      advance(s, load(at.grad), &first, &second);
      store(at.exp_avg, first);
      store(at.exp_avg_sq, second);
      high = max_number(absolute(first), high);
      high_sq = max_number(second, high_sq);
    });
    most = high;
    most_sq = high_sq;
  }

  // The parameter and the new codes. Division and square root, long in one unit, go beside the
  // encoding of exp_avg, which keeps the others busy.
  void encode(int64_t begin, int64_t count, float* m, float* v) const {
    float params[kPiece];
    float* const p = param_piece(args, tensor, begin, count, params);
    uint8_t* const to = codes() + begin;
    uint8_t* const to_sq = codes_sq() + begin;
    const Lanes s = lanes;
    int64_t i = 0;
#if defined(__AVX512BW__)
    const F scale = set1(inverse), scale_sq = set1(inverse_sq);
    const Encoder16<true> encoder(maps[0]);
    for (; i + kWidth <= count; i += kWidth) {
      const F first = load(m + i);
      store(p + i, descend(s, load(p + i), first, load(v + i)));
      if (__builtin_expect(encoder(mul(first, scale), to + i) != 0, 0))
        moment_codes<true>(maps[0], m + i, inverse, kWidth, to + i);
    }
    const Encoder16<false> encoder_sq(maps[1]);
    for (int64_t j = 0; j < i; j += kWidth)
      if (__builtin_expect(encoder_sq(mul(load(v + j), scale_sq), to_sq + j) != 0, 0))
        moment_codes<false>(maps[1], v + j, inverse_sq, kWidth, to_sq + j);
#endif
    for_each_vector({p + i, nullptr, m + i, v + i}, count - i, [&](const Vectors& at, int64_t) {
      store(at.param, descend(s, load(at.param), load(at.exp_avg), load(at.exp_avg_sq)));
    });
    moment_codes<true>(maps[0], m + i, inverse, count - i, to + i);
    moment_codes<false>(maps[1], v + i, inverse_sq, count - i, to_sq + i);
    store_param(args, tensor, begin, count, p);
  }
};

inline void step_block(Block& block, int64_t begin, int64_t end, float* absmax, float* absmax_sq) {
  float first[kKept], second[kKept];
  const bool keep = end - begin <= kKept;
  block.old_absmax = *absmax;
  block.old_absmax_sq = *absmax_sq;
  block.most = block.most_sq = zero();
  for (int64_t i = begin; i < end; i += kPiece) {
    const int64_t at = keep ? i - begin : 0;
    block.decode(i, min64(kPiece, end - i), first + at, second + at);
  }
  *absmax = reduce_max(block.most);
  *absmax_sq = reduce_max(block.most_sq);
  block.inverse = reciprocal(*absmax);
  block.inverse_sq = reciprocal(*absmax_sq);
  for (int64_t i = begin; i < end; i += kPiece) {
    const int64_t count = min64(kPiece, end - i), at = keep ? i - begin : 0;
    if (!keep) block.decode(i, count, first, second);
    block.encode(i, count, first + at, second + at);
  }
}

}  // namespace

namespace FEINWERK_ISA_NAME {

void adamw_step(const feinwerk_adamw_step_args& args, const feinwerk_adamw_tensor& tensor,
                const AdamwScalars& scalars, const DynamicMap (&maps)[2], int64_t begin,
                int64_t end) {
  if (args.state != FEINWERK_STATE_DYNAMIC8) return step_plain(args, tensor, scalars, begin, end);
  const Lanes lanes = lanes_of(scalars);
  Block shared = {args, tensor, maps, lanes, 0, 0, 0, 0, zero(), zero()};
  const int64_t blocks_a_row = (tensor.cols + args.blocksize - 1) / args.blocksize;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block / blocks_a_row;
    const int64_t column = (block - row * blocks_a_row) * args.blocksize;
    const int64_t first = row * tensor.cols + column;
    const int64_t last = first + min64(args.blocksize, tensor.cols - column);
    step_block(shared, first, last, tensor.exp_avg_absmax + block,
               tensor.exp_avg_sq_absmax + block);
  }
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
