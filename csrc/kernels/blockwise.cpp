// blockwise_quantize and blockwise_dequantize: 8-bit codes into a sorted 256-entry codebook.
#include "kernels/decode.h"
#include "kernels/kernels.h"

namespace feinwerk {
namespace {

constexpr int64_t kPiece = 256;

// The bin of s in [-1, 1] among 65,536; NaN counts as -1. The multiply-add is fused: double
// precision holds the product exactly.
inline int32_t bin_of(float s) {
  const float above = s > -1.0f ? s : -1.0f;
  const float clamped = above < 1.0f ? above : 1.0f;
  const float half = (clamped + 1.0f) * 0.5f;
  return static_cast<int32_t>(static_cast<float>(static_cast<double>(half) * 65535.0 + 0.5));
}

// How many midpoints of the codebook lie strictly below s: a tie takes the lower code.
inline uint8_t code_by_distance(float s, const float* codebook) {
  if (s != s) return 0;
  int code = 0;
  for (int step = 128; step > 0; step /= 2) {
    const int next = code + step;
    if (s > (codebook[next - 1] + codebook[next]) * 0.5f) code = next;
  }
  return static_cast<uint8_t>(code);
}

// A block of the arguments; without rows all of it is one.
template <class Args>
inline RowBlock block_of(const Args& args, int64_t block) {
  return row_block(args.row_length ? args.row_length : args.count, args.blocksize, block);
}

}  // namespace

namespace FEINWERK_ISA_NAME {

void blockwise_quantize(const feinwerk_blockwise_quantize_args& args, float offset,
                        const uint8_t* bins, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const auto [first, last] = block_of(args, block);
    const auto value = [&](int64_t i) { return args.center ? args.x[i] - offset : args.x[i]; };
    // Magnitudes as integers: a loop of maxima over them vectorizes. NaN counts as zero.
    uint32_t most = 0;
    for (int64_t i = first; i < last; ++i) {
      const uint32_t bits = bits_of(value(i)) & 0x7fffffffu;
      const uint32_t number = bits > 0x7f800000u ? 0 : bits;
      most = number > most ? number : most;
    }
    const float absmax = float_of_bits(most);
    args.absmax[block] = absmax;
    const float inverse = 1.0f / absmax;
    if (args.rule == FEINWERK_RULE_CUDA) {
      for (int64_t i = first; i < last; ++i)
        args.codes[i] = code_by_distance(value(i) * inverse, args.codebook);
    } else if (absmax == 0) {
      memset(args.codes + first, 0, static_cast<size_t>(last - first));
    } else {
      // Arithmetic apart from the look-ups, so that the compiler vectorizes it.
      for (int64_t i = first; i < last; i += kPiece) {
        const int64_t count = min64(kPiece, last - i);
        int32_t bin[kPiece];
        for (int64_t j = 0; j < count; ++j)
          bin[j] = bin_of((args.center ? args.x[i + j] - offset : args.x[i + j]) * inverse);
        for (int64_t j = 0; j < count; ++j) args.codes[i + j] = bins[bin[j]];
      }
    }
  }
}

void blockwise_dequantize(const feinwerk_blockwise_dequantize_args& args, int64_t begin,
                          int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const auto [first, last] = block_of(args, block);
    const F absmax = set1(args.absmax[block]);
    float* const out = args.out + first;
    look_up(args.codebook, args.codes + first, last - first, out);
    for (int64_t i = 0; i < last - first; i += kWidth) {
      const F product = mul(read_part<Float32>(out + i, last - first - i), absmax);
      write_part<Float32>(out + i, last - first - i,
                          args.offset ? add(product, set1(*args.offset)) : product);
    }
  }
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
