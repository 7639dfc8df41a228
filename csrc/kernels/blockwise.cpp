// blockwise_quantize and blockwise_dequantize: 8-bit codes into a sorted 256-entry codebook.
#include "kernels/decode.h"
#include "kernels/kernels.h"

namespace feinwerk {
namespace {

// The bin of s in [-1, 1] of 65,536; a true fused multiply-add, which double precision gives exactly.
inline uint8_t code_by_bin(float s, const uint8_t* bins) {
  if (s != s) return bins[0];
  const float clamped = s < -1.0f ? -1.0f : s > 1.0f ? 1.0f : s;
  const float half = (clamped + 1.0f) * 0.5f;
  const float bin = static_cast<float>(static_cast<double>(half) * 65535.0 + 0.5);
  return bins[static_cast<int32_t>(bin)];
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

}  // namespace

namespace FEINWERK_ISA_NAME {

void blockwise_quantize(const feinwerk_blockwise_quantize_args& args, float offset,
                        const uint8_t* bins, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * args.blocksize;
    const int64_t last = min64(args.count, first + args.blocksize);
    const auto value = [&](int64_t i) { return args.center ? args.x[i] - offset : args.x[i]; };
    float absmax = 0;
    for (int64_t i = first; i < last; ++i) {
      const float magnitude = float_of_bits(bits_of(value(i)) & 0x7fffffffu);
      absmax = magnitude > absmax ? magnitude : absmax;  // false for NaN
    }
    args.absmax[block] = absmax;
    const float inverse = 1.0f / absmax;
    if (args.rule == FEINWERK_RULE_CUDA) {
      for (int64_t i = first; i < last; ++i)
        args.codes[i] = code_by_distance(value(i) * inverse, args.codebook);
    } else if (absmax == 0) {
      memset(args.codes + first, 0, static_cast<size_t>(last - first));
    } else {
      for (int64_t i = first; i < last; ++i)
        args.codes[i] = code_by_bin(value(i) * inverse, bins);
    }
  }
}

void blockwise_dequantize(const feinwerk_blockwise_dequantize_args& args, int64_t begin,
                          int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * args.blocksize;
    const int64_t last = min64(args.count, first + args.blocksize);
    const F absmax = set1(args.absmax[block]);
    for (int64_t i = first; i < last; i += kWidth) {
      const int64_t count = min64(kWidth, last - i);
      uint8_t codes[kWidth] = {};
      memcpy(codes, args.codes + i, static_cast<size_t>(count));
      const F product = mul(gather_bytes(args.codebook, codes), absmax);
      write_part<Float32>(args.out + i, count,
                          args.offset ? add(product, set1(*args.offset)) : product);
    }
  }
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
