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

struct Maxima {
  I exp_avg, exp_avg_sq;
};

// Moments are `decoded * absmax`; the maxima of their magnitudes leave NaN out.
template <bool coded>
inline void update(const AdamwScalars& scalars, int64_t count, float* param, const float* grad,
                   float* exp_avg, float* exp_avg_sq, float absmax, float absmax_sq,
                   Maxima* maxima) {
  const F factor = set1(scalars.grad_factor), weight1 = set1(scalars.weight1);
  const F beta2 = set1(scalars.beta2), weight2 = set1(scalars.weight2), eps = set1(scalars.eps);
  const F shrink = set1(scalars.shrink), step_size = set1(scalars.step_size);
  const F correction = set1(scalars.correction);
  I most = maxima->exp_avg, most_sq = maxima->exp_avg_sq;
  // Through pointers to whole vectors: the last elements come by way of copies.
  const auto vector = [&](float* p, const float* g, float* m, float* v) {
    const F x = mul(load(g), factor);
    F first = load(m), second = load(v);
    if (coded) {
      first = mul(first, set1(absmax));
      second = mul(second, set1(absmax_sq));
    }
    first = add(first, mul(sub(x, first), weight1));
    second = add(mul(second, beta2), mul(mul(x, x), weight2));
    const F ratio = div(first, add(mul(square_root(second), correction), eps));
    store(p, sub(mul(load(p), shrink), mul(ratio, step_size)));
    store(m, first);
    store(v, second);
    if (coded) {
      most = max_bits(most, abs_bits(zero_nan(first)));
      most_sq = max_bits(most_sq, abs_bits(zero_nan(second)));
    }
  };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) vector(param + i, grad + i, exp_avg + i, exp_avg_sq + i);
  if (i < count) {
    // Past the end every operand is zero, and so are the moments.
    float p[kWidth] = {}, g[kWidth] = {}, m[kWidth] = {}, v[kWidth] = {};
    const auto bytes = static_cast<size_t>(count - i) * sizeof(float);
    memcpy(p, param + i, bytes);
    memcpy(g, grad + i, bytes);
    memcpy(m, exp_avg + i, bytes);
    memcpy(v, exp_avg_sq + i, bytes);
    vector(p, g, m, v);
    memcpy(param + i, p, bytes);
    memcpy(exp_avg + i, m, bytes);
    memcpy(exp_avg_sq + i, v, bytes);
  }
  maxima->exp_avg = most;
  maxima->exp_avg_sq = most_sq;
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
  const bool narrow_states = args.state == FEINWERK_STATE_BFLOAT16;
  const bool direct = args.master == FEINWERK_MASTER_FLOAT32 && !narrow_states &&
                      args.grad_dtype == FEINWERK_FLOAT32;
  Maxima unused = {};
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
    update<false>(scalars, count, p, g, m, v, 1.0f, 1.0f, &unused);
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

// Elements [begin, end), at most kKept or a block of any size, that share one absmax.
inline void step_block(const feinwerk_adamw_step_args& args, const feinwerk_adamw_tensor& tensor,
                       const AdamwScalars& scalars, const DynamicMap (&maps)[2], int64_t begin,
                       int64_t end, float* absmax, float* absmax_sq) {
  float params[kPiece], grads[kPiece], first[kKept], second[kKept];
  uint8_t* const codes = static_cast<uint8_t*>(tensor.exp_avg);
  uint8_t* const codes_sq = static_cast<uint8_t*>(tensor.exp_avg_sq);
  const bool keep = end - begin <= kKept;
  const float old = *absmax, old_sq = *absmax_sq;
  Maxima maxima = {set1_words(0), set1_words(0)};
  float inverse = 0, inverse_sq = 0;
  const auto encode = [&](int64_t i, int64_t count, const float* m, const float* v) {
    moment_codes<true>(maps[0], m, inverse, count, codes + i);
    moment_codes<false>(maps[1], v, inverse_sq, count, codes_sq + i);
  };
  // The second pass is for large blocks only, and writes what the first has only computed.
  for (int pass = 0; pass < (keep ? 1 : 2); ++pass) {
    const bool writes = keep || pass == 1;
    for (int64_t i = begin; i < end; i += kPiece) {
      const int64_t count = min64(kPiece, end - i);
      float* const m = keep ? first + (i - begin) : first;
      float* const v = keep ? second + (i - begin) : second;
      look_up(maps[0].values, codes + i, count, m);
      look_up(maps[1].values, codes_sq + i, count, v);
      const float* const g = grad_piece(args, tensor, i, count, grads);
      float* p = param_piece(args, tensor, i, count, params);
      if (!writes && p != params) {
        memcpy(params, p, static_cast<size_t>(count) * 4);
        p = params;
      }
      update<true>(scalars, count, p, g, m, v, old, old_sq, &maxima);
      if (writes) store_param(args, tensor, i, count, p);
      if (pass == 1) encode(i, count, m, v);
    }
    if (pass == 0) {
      *absmax = float_of_bits(reduce_max_bits(maxima.exp_avg));
      *absmax_sq = float_of_bits(reduce_max_bits(maxima.exp_avg_sq));
      inverse = reciprocal(*absmax);
      inverse_sq = reciprocal(*absmax_sq);
    }
  }
  if (keep) encode(begin, end - begin, first, second);
}

}  // namespace

namespace FEINWERK_ISA_NAME {

void adamw_step(const feinwerk_adamw_step_args& args, const feinwerk_adamw_tensor& tensor,
                const AdamwScalars& scalars, const DynamicMap (&maps)[2], int64_t begin,
                int64_t end) {
  if (args.state != FEINWERK_STATE_DYNAMIC8) return step_plain(args, tensor, scalars, begin, end);
  const int64_t blocks_a_row = (tensor.cols + args.blocksize - 1) / args.blocksize;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block / blocks_a_row;
    const int64_t column = (block - row * blocks_a_row) * args.blocksize;
    const int64_t first = row * tensor.cols + column;
    const int64_t last = first + min64(args.blocksize, tensor.cols - column);
    step_block(args, tensor, scalars, maps, first, last, tensor.exp_avg_absmax + block,
               tensor.exp_avg_sq_absmax + block);
  }
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
