// adamw_step: decode, update, encode in one pass over the memory, a piece in cache at a time.
//
//   param  ─ join ──> p ┐                     ┌> p ─ split, round ──> param
//   grad   ─ widen ─> g ├─ update (fp32) ─────┤
//   states ─ decode > m, v ┘                  └> m, v ─ encode ─────> states
//
// What is fp32 in memory is updated where it lies, the rest through pieces of kPiece floats.
#include "kernels/adamw_pieces.h"
#include "kernels/dynamic_codes.h"
#include "kernels/kernels.h"

namespace feinwerk {
namespace {

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
inline void store_absmax(float most, float most_sq, float* absmax, float* absmax_sq) {
  const bool finite = most < __builtin_inff() && most_sq < __builtin_inff();
  *absmax = finite ? most : 0.0f;
  *absmax_sq = finite ? most_sq : 0.0f;
}

// Codebook entries to new moments; the maxima of their magnitudes leave NaN out.
template <bool each>
inline Maxima new_moments(const Lanes& lanes, const float* grad, Factors<each> absmax,
                          Factors<each> absmax_sq, int64_t count, float* m, float* v, Maxima most) {
  const Lanes s = lanes;
  for_each_vector({nullptr, grad, m, v}, count, [&](const Vectors& at, int64_t i) {
    F first = mul(load(at.exp_avg), absmax.vector(i));
    F second = mul(load(at.exp_avg_sq), absmax_sq.vector(i));
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
template <bool each>
inline void finish(const Coded& coded, int64_t count, Factors<each> inverse, const float* m,
                   const float* v, float* p, uint8_t* codes) {
  const Lanes s = coded.lanes;
  int64_t i = 0;
#if defined(__AVX512BW__)
  const Encoder16<true> encoder(coded.maps[0]);
  for (; i + kWidth <= count; i += kWidth) {
    const F first = load(m + i);
    store(p + i, descend(s, load(p + i), first, load(v + i)));
    if (__builtin_expect(encoder(first, inverse.vector(i), codes + i) != 0, 0))
      moment_codes<true>(coded.maps[0], m, inverse, i, i + kWidth, codes);
  }
#endif
  moment_codes<true>(coded.maps[0], m, inverse, i, count, codes);
  for (; i < count; i += kWidth) {
    const F first = read_part<Float32>(m + i, count - i);
    const F second = read_part<Float32>(v + i, count - i);
    const F param = read_part<Float32>(p + i, count - i);
    write_part<Float32>(p + i, count - i, descend(s, param, first, second));
  }
}

template <bool each>
inline void finish_sq(const DynamicMap& map, int64_t count, Factors<each> inverse, const float* v,
                      uint8_t* codes) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  const Encoder16<false> encoder(map);
  for (; i + kWidth <= count; i += kWidth)
    if (__builtin_expect(encoder(load(v + i), inverse.vector(i), codes + i) != 0, 0))
      moment_codes<false>(map, v, inverse, i, i + kWidth, codes);
#endif
  moment_codes<false>(map, v, inverse, i, count, codes);
}

// Consecutive blocks of at most kPiece elements together; ends[] from `begin` on.
constexpr int kRun = 128;
struct Run {
  int64_t begin;
  int blocks;
  int64_t ends[kRun];
  float *absmax, *absmax_sq;
};

// Calls body(block, first, end) for the blocks of a run.
template <class Body>
inline void for_each_block_of(const Run& run, const Body& body) {
  for (int64_t b = 0, i = 0; b < run.blocks; i = run.ends[b++]) body(b, i, run.ends[b]);
}

inline void step_run(const Coded& coded, const Run& run) {
  float params[kPiece], grads[kPiece], first[kPiece], second[kPiece];
  float inverse[kRun], inverse_sq[kRun];
  const int64_t begin = run.begin, count = run.ends[run.blocks - 1];
  const float* const g = grad_piece(coded.args, coded.tensor, begin, count, grads);
  float* const p = param_piece(coded.args, coded.tensor, begin, count, params);
  coded.look_up_moments(begin, count, first, second);
  for_each_block_of(run, [&](int64_t b, int64_t i, int64_t end) {
    const Factors<false> old{run.absmax + b}, old_sq{run.absmax_sq + b};
    const Maxima most = new_moments(coded.lanes, g + i, old, old_sq, end - i, first + i, second + i,
                                    {zero(), zero()});
    store_absmax(reduce_max(most.exp_avg), reduce_max(most.exp_avg_sq), run.absmax + b,
                 run.absmax_sq + b);
    inverse[b] = reciprocal(run.absmax[b]);
    inverse_sq[b] = reciprocal(run.absmax_sq[b]);
  });
  for_each_block_of(run, [&](int64_t b, int64_t i, int64_t end) {
    finish(coded, end - i, Factors<false>{inverse + b}, first + i, second + i, p + i,
           coded.codes(begin + i));
  });
  for_each_block_of(run, [&](int64_t b, int64_t i, int64_t end) {
    finish_sq(coded.maps[1], end - i, Factors<false>{inverse_sq + b}, second + i,
              coded.codes_sq(begin + i));
  });
  store_param(coded.args, coded.tensor, begin, count, p);
}

// Blocks below this size, such as the rows of lora_B, do not fill vectors: those go across blocks,
// with factors of their own for every element.
constexpr int64_t kShort = 64;
constexpr int64_t kPadded = kPiece + 2 * kShort;
constexpr size_t kPadding = 2 * kShort * sizeof(float);

// factors[i] = values[block of i]; each block overwrites what the one before it wrote too far.
inline void spread(const Run& run, const float* values, float* factors) {
  for_each_block_of(run, [&](int64_t b, int64_t first, int64_t end) {
    const F value = set1(values[b]);
    for (int64_t i = first; i < end; i += kWidth) store(factors + i, value);
  });
}

// most[b] = the largest magnitude of block b but for NaN: maxima of spans that double up to the
// size of most blocks, two of which then cover one.
inline void short_maxima(const Run& run, const float* x, float* most) {
  float spans[kPadded];
  const int64_t count = run.ends[run.blocks - 1], size = run.ends[0];
  memset(spans + count, 0, kPadding);
  for (int64_t i = 0; i < count; i += kWidth) {
    const F magnitude = max_number(absolute(read_part<Float32>(x + i, count - i)), zero());
    store(spans + i, magnitude);
  }
  int64_t span = 1;
  for (; 2 * span <= size; span *= 2)
    for (int64_t i = 0; i < count; i += kWidth)
      store(spans + i, max_number(load(spans + i), load(spans + i + span)));
  for_each_block_of(run, [&](int64_t b, int64_t first, int64_t end) {
    float all = 0;
    if (end - first == size) {
      const float head = spans[first], tail = spans[end - span];
      all = head > tail ? head : tail;
    } else {  // the last of a row
      for (int64_t i = first; i < end; ++i) {
        const float magnitude = x[i] < 0 ? -x[i] : x[i];
        all = magnitude > all ? magnitude : all;
      }
    }
    most[b] = all;
  });
}

inline void step_short_run(const Coded& coded, const Run& run) {
  float params[kPiece], grads[kPiece], first[kPiece], second[kPiece];
  float factors[kPadded], factors_sq[kPadded], most[kRun], most_sq[kRun];
  const Factors<true> each{factors}, each_sq{factors_sq};
  const int64_t begin = run.begin, count = run.ends[run.blocks - 1];
  const float* const g = grad_piece(coded.args, coded.tensor, begin, count, grads);
  float* const p = param_piece(coded.args, coded.tensor, begin, count, params);
  coded.look_up_moments(begin, count, first, second);
  memset(factors + count, 0, kPadding);
  memset(factors_sq + count, 0, kPadding);
  spread(run, run.absmax, factors);
  spread(run, run.absmax_sq, factors_sq);
  new_moments(coded.lanes, g, each, each_sq, count, first, second, {zero(), zero()});
  short_maxima(run, first, most);
  short_maxima(run, second, most_sq);
  for (int b = 0; b < run.blocks; ++b) {
    store_absmax(most[b], most_sq[b], run.absmax + b, run.absmax_sq + b);
    most[b] = reciprocal(run.absmax[b]);
    most_sq[b] = reciprocal(run.absmax_sq[b]);
  }
  spread(run, most, factors);
  spread(run, most_sq, factors_sq);
  finish(coded, count, each, first, second, p, coded.codes(begin));
  finish_sq(coded.maps[1], count, each_sq, second, coded.codes_sq(begin));
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
    most = new_moments(coded.lanes, g, Factors<false>{&old}, Factors<false>{&old_sq}, count, first,
                       second, most);
  };
  for (int64_t i = begin; i < end; i += kPiece) moments(i, min64(kPiece, end - i));
  store_absmax(reduce_max(most.exp_avg), reduce_max(most.exp_avg_sq), absmax, absmax_sq);
  const float inverse = reciprocal(*absmax), inverse_sq = reciprocal(*absmax_sq);
  for (int64_t i = begin; i < end; i += kPiece) {
    const int64_t count = min64(kPiece, end - i);
    moments(i, count);
    float* const p = param_piece(coded.args, coded.tensor, i, count, params);
    finish(coded, count, Factors<false>{&inverse}, first, second, p, coded.codes(i));
    finish_sq(coded.maps[1], count, Factors<false>{&inverse_sq}, second, coded.codes_sq(i));
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
  Run run = {};
  const auto step_blocks = [&] {
    if (!run.blocks) return;
    if (run.ends[0] < kShort)
      step_short_run(coded, run);
    else
      step_run(coded, run);
    run.blocks = 0;
  };
  for (int64_t block = begin; block < end; ++block) {
    const auto [first, last] = row_block(tensor.cols, args.blocksize, block);
    float* const absmax = tensor.exp_avg_absmax + block;
    float* const absmax_sq = tensor.exp_avg_sq_absmax + block;
    // Blocks of a short run are no longer than its first.
    const bool longer = run.blocks && run.ends[0] < kShort && last - first > run.ends[0];
    if (longer || run.blocks == kRun || last - run.begin > kPiece) step_blocks();
    if (last - first > kPiece) {
      step_large_block(coded, first, last, absmax, absmax_sq);
      continue;
    }
    if (!run.blocks) {
      run.begin = first;
      run.absmax = absmax;
      run.absmax_sq = absmax_sq;
    }
    run.ends[run.blocks++] = last - run.begin;
  }
  step_blocks();
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
