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

// Floats of a piece. A block of codes up to this size keeps its new moments until its absmax is
// known; a larger one computes them twice.
constexpr int64_t kPiece = 1024;
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

// Calls body(pointers) for every vector; the last elements come by way of copies, zeros
// beside them. A null pointer stays null.
template <class Body>
inline void for_each_vector(const Vectors& at, int64_t count, const Body& body) {
  const auto ahead = [](auto* p, int64_t i) { return p ? p + i : p; };
  const auto moved = [&](int64_t i) {
    return Vectors{ahead(at.param, i), ahead(at.grad, i), at.exp_avg + i, at.exp_avg_sq + i};
  };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) body(moved(i));
  if (i == count) return;
  const Vectors from = moved(i);
  float p[kWidth] = {}, g[kWidth] = {}, m[kWidth] = {}, v[kWidth] = {};
  const auto bytes = static_cast<size_t>(count - i) * sizeof(float);
  if (from.param) memcpy(p, from.param, bytes);
  if (from.grad) memcpy(g, from.grad, bytes);
  memcpy(m, from.exp_avg, bytes);
  memcpy(v, from.exp_avg_sq, bytes);
  body(Vectors{p, g, m, v});
  if (from.param) memcpy(from.param, p, bytes);
  memcpy(from.exp_avg, m, bytes);
  memcpy(from.exp_avg_sq, v, bytes);
}

inline void update(const Lanes& s, const Vectors& vectors, int64_t count) {
  for_each_vector(vectors, count, [&](const Vectors& at) {
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

// A parameter with codes.
struct Coded {
  const feinwerk_adamw_step_args& args;
  const feinwerk_adamw_tensor& tensor;
  const DynamicMap (&maps)[2];
  const Lanes lanes;

  uint8_t* codes(int64_t i) const { return static_cast<uint8_t*>(tensor.exp_avg) + i; }
  uint8_t* codes_sq(int64_t i) const { return static_cast<uint8_t*>(tensor.exp_avg_sq) + i; }

  void look_up_moments(int64_t begin, int64_t count, float* m, float* v) const {
    look_up(maps[0].values, codes(begin), count, m);
    look_up(maps[1].values, codes_sq(begin), count, v);
  }
};

struct Maxima {
  F exp_avg, exp_avg_sq;
};

// Infinity times the code of zero would be NaN, in the whole block: where a moment has overflowed
// the block starts afresh, both moments alike.
inline void store_absmax(const Maxima& most, float* absmax, float* absmax_sq) {
  const float first = reduce_max(most.exp_avg), second = reduce_max(most.exp_avg_sq);
  const bool finite = first < __builtin_inff() && second < __builtin_inff();
  *absmax = finite ? first : 0.0f;
  *absmax_sq = finite ? second : 0.0f;
}

// Codebook entries to new moments; the maxima of their magnitudes leave NaN out.
inline Maxima new_moments(const Lanes& lanes, const float* grad, float absmax, float absmax_sq,
                          int64_t count, float* m, float* v, Maxima most) {
  const Lanes s = lanes;
  const F scale = set1(absmax), scale_sq = set1(absmax_sq);
  for_each_vector({nullptr, grad, m, v}, count, [&](const Vectors& at) {
    F first = mul(load(at.exp_avg), scale);
    F second = mul(load(at.exp_avg_sq), scale_sq);
    advance(s, load(at.grad), &first, &second);
    store(at.exp_avg, first);
    store(at.exp_avg_sq, second);
    most.exp_avg = max_number(absolute(first), most.exp_avg);
    most.exp_avg_sq = max_number(second, most.exp_avg_sq);
  });
  return most;
}

// The parameter and the codes of exp_avg. Division and square root, long in one unit, go beside the
// encoding, which keeps the others busy.
inline void finish(const Coded& coded, int64_t count, float inverse, const float* m, const float* v,
                   float* p, uint8_t* codes) {
  const Lanes s = coded.lanes;
  int64_t i = 0;
#if defined(__AVX512BW__)
  const Encoder16<true> encoder(coded.maps[0]);
  for (; i + kWidth <= count; i += kWidth) {
    const F first = load(m + i);
    store(p + i, descend(s, load(p + i), first, load(v + i)));
    if (__builtin_expect(encoder(first, set1(inverse), zero(), codes + i) != 0, 0))
      moment_codes<true>(coded.maps[0], m + i, inverse, kWidth, codes + i);
  }
#endif
  moment_codes<true>(coded.maps[0], m + i, inverse, count - i, codes + i);
  for (; i < count; i += kWidth) {
    const F first = read_part<Float32>(m + i, count - i);
    const F second = read_part<Float32>(v + i, count - i);
    const F param = read_part<Float32>(p + i, count - i);
    write_part<Float32>(p + i, count - i, descend(s, param, first, second));
  }
}

inline void finish_sq(const DynamicMap& map, int64_t count, float inverse, const float* v,
                      uint8_t* codes) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  const Encoder16<false> encoder(map);
  const F floor = set1(floor_of_zero(inverse));
  for (; i + kWidth <= count; i += kWidth)
    if (__builtin_expect(encoder(load(v + i), set1(inverse), floor, codes + i) != 0, 0))
      moment_codes<false>(map, v + i, inverse, kWidth, codes + i);
#endif
  moment_codes<false>(map, v + i, inverse, count - i, codes + i);
}

// Consecutive blocks of at most kPiece elements together; ends[] from `begin` on.
constexpr int kRun = 16;
struct Run {
  int64_t begin;
  int blocks;
  int64_t ends[kRun];
  float *absmax, *absmax_sq;
};

inline void step_run(const Coded& coded, const Run& run) {
  float params[kPiece], grads[kPiece], first[kPiece], second[kPiece];
  float inverse[kRun], inverse_sq[kRun];
  const int64_t begin = run.begin, count = run.ends[run.blocks - 1];
  const float* const g = grad_piece(coded.args, coded.tensor, begin, count, grads);
  float* const p = param_piece(coded.args, coded.tensor, begin, count, params);
  coded.look_up_moments(begin, count, first, second);
  for (int64_t b = 0, i = 0; b < run.blocks; i = run.ends[b++]) {
    const Maxima most = new_moments(coded.lanes, g + i, run.absmax[b], run.absmax_sq[b],
                                    run.ends[b] - i, first + i, second + i, {zero(), zero()});
    store_absmax(most, run.absmax + b, run.absmax_sq + b);
    inverse[b] = reciprocal(run.absmax[b]);
    inverse_sq[b] = reciprocal(run.absmax_sq[b]);
  }
  for (int64_t b = 0, i = 0; b < run.blocks; i = run.ends[b++])
    finish(coded, run.ends[b] - i, inverse[b], first + i, second + i, p + i,
           coded.codes(begin + i));
  for (int64_t b = 0, i = 0; b < run.blocks; i = run.ends[b++])
    finish_sq(coded.maps[1], run.ends[b] - i, inverse_sq[b], second + i, coded.codes_sq(begin + i));
  store_param(coded.args, coded.tensor, begin, count, p);
}

// A block that is not kept: its moments are found twice, for their maxima and to be written.
inline void step_large_block(const Coded& coded, int64_t begin, int64_t end, float* absmax,
                             float* absmax_sq) {
  float params[kPiece], grads[kPiece], first[kPiece], second[kPiece];
  const float old = *absmax, old_sq = *absmax_sq;
  Maxima most = {zero(), zero()};
  const auto moments = [&](int64_t i, int64_t count) {
    coded.look_up_moments(i, count, first, second);
    const float* const g = grad_piece(coded.args, coded.tensor, i, count, grads);
    most = new_moments(coded.lanes, g, old, old_sq, count, first, second, most);
  };
  for (int64_t i = begin; i < end; i += kPiece) moments(i, min64(kPiece, end - i));
  store_absmax(most, absmax, absmax_sq);
  for (int64_t i = begin; i < end; i += kPiece) {
    const int64_t count = min64(kPiece, end - i);
    moments(i, count);
    float* const p = param_piece(coded.args, coded.tensor, i, count, params);
    finish(coded, count, reciprocal(*absmax), first, second, p, coded.codes(i));
    finish_sq(coded.maps[1], count, reciprocal(*absmax_sq), second, coded.codes_sq(i));
    store_param(coded.args, coded.tensor, i, count, p);
  }
}

}  // namespace

namespace FEINWERK_ISA_NAME {

void adamw_step(const feinwerk_adamw_step_args& args, const feinwerk_adamw_tensor& tensor,
                const AdamwScalars& scalars, const DynamicMap (&maps)[2], int64_t begin,
                int64_t end) {
  if (args.state != FEINWERK_STATE_DYNAMIC8) return step_plain(args, tensor, scalars, begin, end);
  const Coded coded = {args, tensor, maps, lanes_of(scalars)};
  const int64_t blocks_a_row = 1 + (tensor.cols - 1) / args.blocksize;
  Run run = {};
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block / blocks_a_row;
    const int64_t column = (block - row * blocks_a_row) * args.blocksize;
    const int64_t first = row * tensor.cols + column;
    const int64_t last = first + min64(args.blocksize, tensor.cols - column);
    float* const absmax = tensor.exp_avg_absmax + block;
    float* const absmax_sq = tensor.exp_avg_sq_absmax + block;
    if (run.blocks && (run.blocks == kRun || last - run.begin > kPiece)) {
      step_run(coded, run);
      run.blocks = 0;
    }
    if (last - first > kPiece) {
      step_large_block(coded, first, last, absmax, absmax_sq);
      continue;
    }
    if (!run.blocks) run = {first, 0, {}, absmax, absmax_sq};
    run.ends[run.blocks++] = last - run.begin;
  }
  if (run.blocks) step_run(coded, run);
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
