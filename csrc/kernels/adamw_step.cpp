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

// Infinity times the code of zero would be NaN, in the whole block: where a moment has overflowed
// the block starts afresh, both moments alike.
inline void store_absmax(float most, float most_sq, float* absmax, float* absmax_sq) {
  const bool finite = most < __builtin_inff() && most_sq < __builtin_inff();
  *absmax = finite ? most : 0.0f;
  *absmax_sq = finite ? most_sq : 0.0f;
}

// The entries of a map, in the form that suits the instruction set beside the plain one.
struct Entries {
  const float* values;
#if defined(FEINWERK_BYTE_TABLES)
  ByteTables tables;
  explicit Entries(const DynamicMap& map) : values(map.values), tables(map.values) {}
#else
  explicit Entries(const DynamicMap& map) : values(map.values) {}
#endif
};

// Codes to new moments, one of the two at a time: their tables fill the registers. Without tables
// of bytes the entries are in `moments`. Returns `most` with the maxima of the magnitudes, which
// leave NaN out.
template <bool second, bool each>
inline F new_moments(const Lanes& lanes, const Entries& entries, const float* grad,
                     Factors<each> absmax, int64_t count, const uint8_t* codes, float* moments,
                     F most) {
  (void)entries, (void)codes;
  const Lanes s = lanes;
  int64_t i = 0;
  const auto advance = [&](F entry, int64_t at, F g) {
    const F old = mul(entry, absmax.vector(at));
    const F x = second ? advance_second(s, g, old) : advance_first(s, g, old);
    most = max_number(second ? x : absolute(x), most);
    return x;
  };
#if defined(FEINWERK_BYTE_TABLES)
  const ByteTables tables = entries.tables;
  for (; i + 64 <= count; i += 64) {
    F entry[4];
    tables.look_up(codes + i, entry);
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t at = i + j * kWidth;
      store(moments + at, advance(entry[j], at, load(grad + at)));
    }
  }
  look_up(entries.values, codes + i, count - i, moments + i);
#endif
  for (; i < count; i += kWidth) {
    const F entry = read_part<Float32>(moments + i, count - i);
    const F g = read_part<Float32>(grad + i, count - i);
    write_part<Float32>(moments + i, count - i, advance(entry, i, g));
  }
  return most;
}

// 64 elements that come next: hardware prefetchers stop at the end of a page, every second run.
inline void ask_for(const void* p, int64_t element_size) {
  const char* const at = static_cast<const char*>(p);
  for (int64_t line = 0; line < element_size; ++line) __builtin_prefetch(at + 64 * line);
}

// A parameter with codes.
struct Coded {
  const feinwerk_adamw_step_args& args;
  const feinwerk_adamw_tensor& tensor;
  const DynamicMap (&maps)[2];
  const Entries entries, entries_sq;
  const Lanes lanes;

  Coded(const feinwerk_adamw_step_args& all, const feinwerk_adamw_tensor& one,
        const DynamicMap (&both)[2], const AdamwScalars& scalars)
      : args(all),
        tensor(one),
        maps(both),
        entries(both[0]),
        entries_sq(both[1]),
        lanes(lanes_of(scalars)) {}

  uint8_t* codes(int64_t i) const { return static_cast<uint8_t*>(tensor.exp_avg) + i; }
  uint8_t* codes_sq(int64_t i) const { return static_cast<uint8_t*>(tensor.exp_avg_sq) + i; }

  void ask_for_grad(int64_t i) const {
    const int64_t size = args.grad_dtype == FEINWERK_FLOAT32 ? 4 : 2;
    ask_for(static_cast<const char*>(tensor.grad) + (i + kTogether) * size, size);
  }
  void ask_for_param(int64_t i) const {
    const int64_t size = args.master == FEINWERK_MASTER_FLOAT32 ? 4 : 2;
    ask_for(static_cast<const char*>(tensor.param) + (i + kTogether) * size, size);
  }

  // Before new moments: one call for as many blocks as there are, as it makes tables of its own.
  void look_up_entries(int64_t begin, int64_t count, float* m, float* v) const {
#if !defined(FEINWERK_BYTE_TABLES)
    look_up(entries.values, codes(begin), count, m);
    look_up(entries_sq.values, codes_sq(begin), count, v);
#else
    (void)begin, (void)count, (void)m, (void)v;
#endif
  }
  // See new_moments: of the elements from `begin` on.
  template <bool each>
  F new_first(const float* grad, Factors<each> absmax, int64_t begin, int64_t count, float* m,
              F most) const {
    return new_moments<false>(lanes, entries, grad, absmax, count, codes(begin), m, most);
  }
  template <bool each>
  F new_second(const float* grad, Factors<each> absmax, int64_t begin, int64_t count, float* v,
               F most) const {
    return new_moments<true>(lanes, entries_sq, grad, absmax, count, codes_sq(begin), v, most);
  }
};

// Square root and division, long in one unit, go one by one beside the encoding, which keeps the
// other units busy. First the codes of exp_avg_sq, which becomes what exp_avg is divided by.
template <bool each>
inline void finish_second(const Coded& coded, int64_t begin, int64_t count, Factors<each> inverse,
                          float* v) {
  const Lanes s = coded.lanes;
  uint8_t* const codes = coded.codes_sq(begin);
  int64_t i = 0;
#if defined(__AVX512BW__)
  const Encoder64<false> encoder(coded.maps[1]);
  for (; i + encoder.kCodes <= count; i += encoder.kCodes) {
    F below[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) below[j] = denominator(s, load(v + i + j * kWidth));
    encoder(v + i, inverse.from(i), codes + i);
    coded.ask_for_grad(begin + i);
    ask_for(codes + i + kTogether, 1);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(v + i + j * kWidth, below[j]);
  }
#endif
  moment_codes<false>(coded.maps[1], v, inverse, i, count, codes);
  for (; i < count; i += kWidth) {
    const F second = read_part<Float32>(v + i, count - i);
    write_part<Float32>(v + i, count - i, denominator(s, second));
  }
}

// The codes of exp_avg and the parameters.
template <bool each>
inline void finish_first(const Coded& coded, int64_t begin, int64_t count, Factors<each> inverse,
                         const float* m, const float* below, float* p) {
  const Lanes s = coded.lanes;
  uint8_t* const codes = coded.codes(begin);
  int64_t i = 0;
#if defined(__AVX512BW__)
  const Encoder64<true> encoder(coded.maps[0]);
  for (; i + encoder.kCodes <= count; i += encoder.kCodes) {
#pragma GCC unroll 4
    for (int64_t j = i; j < i + encoder.kCodes; j += kWidth)
      store(p + j, descend(s, load(p + j), load(m + j), load(below + j)));
    encoder(m + i, inverse.from(i), codes + i);
    coded.ask_for_param(begin + i);
    ask_for(codes + i + kTogether, 1);
  }
#endif
  moment_codes<true>(coded.maps[0], m, inverse, i, count, codes);
  for (; i < count; i += kWidth) {
    const F first = read_part<Float32>(m + i, count - i);
    const F divisor = read_part<Float32>(below + i, count - i);
    const F param = read_part<Float32>(p + i, count - i);
    write_part<Float32>(p + i, count - i, descend(s, param, first, divisor));
  }
}

// Consecutive blocks together, at most kTogether elements or one block; ends[] from `begin` on.
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
  float most[kRun], inverse[kRun], inverse_sq[kRun];
  const int64_t begin = run.begin, count = run.ends[run.blocks - 1];
  const float* const g = grad_piece(coded.args, coded.tensor, begin, count, grads);
  float* const p = param_piece(coded.args, coded.tensor, begin, count, params);
  coded.look_up_entries(begin, count, first, second);
  for_each_block_of(run, [&](int64_t b, int64_t i, int64_t end) {
    most[b] = reduce_max(coded.new_first(g + i, Factors<false>{run.absmax + b}, begin + i, end - i,
                                         first + i, zero()));
  });
  for_each_block_of(run, [&](int64_t b, int64_t i, int64_t end) {
    const F all = coded.new_second(g + i, Factors<false>{run.absmax_sq + b}, begin + i, end - i,
                                   second + i, zero());
    store_absmax(most[b], reduce_max(all), run.absmax + b, run.absmax_sq + b);
    inverse[b] = reciprocal(run.absmax[b]);
    inverse_sq[b] = reciprocal(run.absmax_sq[b]);
  });
  for_each_block_of(run, [&](int64_t b, int64_t i, int64_t end) {
    finish_second(coded, begin + i, end - i, Factors<false>{inverse_sq + b}, second + i);
  });
  for_each_block_of(run, [&](int64_t b, int64_t i, int64_t end) {
    finish_first(coded, begin + i, end - i, Factors<false>{inverse + b}, first + i, second + i,
                 p + i);
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
  memset(factors + count, 0, kPadding);
  memset(factors_sq + count, 0, kPadding);
  spread(run, run.absmax, factors);
  spread(run, run.absmax_sq, factors_sq);
  coded.look_up_entries(begin, count, first, second);
  coded.new_first(g, each, begin, count, first, zero());
  coded.new_second(g, each_sq, begin, count, second, zero());
  short_maxima(run, first, most);
  short_maxima(run, second, most_sq);
  for (int b = 0; b < run.blocks; ++b) {
    store_absmax(most[b], most_sq[b], run.absmax + b, run.absmax_sq + b);
    most[b] = reciprocal(run.absmax[b]);
    most_sq[b] = reciprocal(run.absmax_sq[b]);
  }
  spread(run, most, factors);
  spread(run, most_sq, factors_sq);
  finish_second(coded, begin, count, each_sq, second);
  finish_first(coded, begin, count, each, first, second, p);
  store_param(coded.args, coded.tensor, begin, count, p);
}

// A block that is not kept: its moments are found twice, for their maxima and to be written.
inline void step_large_block(const Coded& coded, int64_t begin, int64_t end, float* absmax,
                             float* absmax_sq) {
  float params[kPiece], grads[kPiece], first[kPiece], second[kPiece];
  const float old = *absmax, old_sq = *absmax_sq;
  F most = zero(), most_sq = zero();
  const auto moments = [&](int64_t i, int64_t count) {
    const float* const g = grad_piece(coded.args, coded.tensor, i, count, grads);
    coded.look_up_entries(i, count, first, second);
    most = coded.new_first(g, Factors<false>{&old}, i, count, first, most);
    most_sq = coded.new_second(g, Factors<false>{&old_sq}, i, count, second, most_sq);
  };
  for (int64_t i = begin; i < end; i += kPiece) moments(i, min64(kPiece, end - i));
  store_absmax(reduce_max(most), reduce_max(most_sq), absmax, absmax_sq);
  const float inverse = reciprocal(*absmax), inverse_sq = reciprocal(*absmax_sq);
  for (int64_t i = begin; i < end; i += kPiece) {
    const int64_t count = min64(kPiece, end - i);
    moments(i, count);
    float* const p = param_piece(coded.args, coded.tensor, i, count, params);
    finish_second(coded, i, count, Factors<false>{&inverse_sq}, second);
    finish_first(coded, i, count, Factors<false>{&inverse}, first, second, p);
    store_param(coded.args, coded.tensor, i, count, p);
  }
}

}  // namespace

namespace FEINWERK_ISA_NAME {

void adamw_step(const feinwerk_adamw_step_args& args, const feinwerk_adamw_tensor& tensor,
                const AdamwScalars& scalars, const DynamicMap (&maps)[2], int64_t begin,
                int64_t end) {
  if (args.state != FEINWERK_STATE_DYNAMIC8) return step_plain(args, tensor, scalars, begin, end);
  const Coded coded(args, tensor, maps, scalars);
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
    if (longer || run.blocks == kRun || last - run.begin > kTogether) step_blocks();
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
