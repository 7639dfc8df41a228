// nf4_quantize: the scale of every block, then the nearest of the 16 codes of every element.
#include "kernels/decode.h"
#include "kernels/kernels.h"

namespace feinwerk {
namespace {

constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kSmallestNormal = 0x00800000u;
constexpr int64_t kMaxBlocksize = 4096;

template <class Dtype>
uint32_t largest_magnitude(const typename Dtype::Element* x, int64_t count) {
  I most = abs_bits(Dtype::read(x));
  for (int64_t i = kWidth; i < count; i += kWidth)
    most = max_bits(most, abs_bits(Dtype::read(x + i)));
  return reduce_max_bits(most);
}

// CUDA's maximum passes over NaN. Rare, so plain.
template <class Dtype>
uint32_t largest_number(const typename Dtype::Element* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; i += kWidth) {
    float lanes[kWidth];
    store(lanes, Dtype::read(x + i));
    for (float lane : lanes) {
      const uint32_t bits = bits_of(lane) & 0x7fffffffu;
      if (bits <= kInfinity && bits > most) most = bits;
    }
  }
  return most;
}

template <class Dtype, bool cpu_rule>
void encode(const typename Dtype::Element* x, int64_t count, float factor, const CodeBins& bins,
            bool ordinary, uint8_t* packed) {
  const float* thresholds = cpu_rule ? kNf4ThresholdsCpu : kNf4ThresholdsCuda;
  const F inverse = set1(factor);
  if (ordinary) {
    for (int64_t i = 0; i < count; i += kWidth)
      store_codes(packed + i / 2, nf4_code_in_bins(mul(Dtype::read(x + i), inverse), bins));
    return;
  }
  for (int64_t i = 0; i < count; i += kWidth)
    store_codes(packed + i / 2, nf4_code<cpu_rule>(mul(Dtype::read(x + i), inverse), thresholds));
}

// bitsandbytes on CPU divides in a partial last block and stores its clamped scale.
template <class Dtype>
void encode_cpu_tail(const typename Dtype::Element* x, int64_t count, float divisor,
                     uint8_t* packed) {
  for (int64_t i = 0; i < count; i += kWidth) {
    float lanes[kWidth];
    store(lanes, Dtype::read(x + i));
    for (float& lane : lanes) lane = lane / divisor;
    store_codes(packed + i / 2, nf4_code<true>(load(lanes), kNf4ThresholdsCpu));
  }
}

template <class Dtype, bool cpu_rule>
int quantize(const feinwerk_nf4_quantize_args& args, int64_t begin, int64_t end) {
  using Element = typename Dtype::Element;
  constexpr float kSmallest = 1e-38f;  // bitsandbytes' clamp: the reciprocal stays finite
  const CodeBins bins = code_bins(cpu_rule ? kNf4ThresholdsCpu : kNf4ThresholdsCuda);
  int finite = 1;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * args.blocksize;
    const int64_t count = min64(args.blocksize, args.count - first);
    const bool tail = count < args.blocksize;
    const Element* x = static_cast<const Element*>(args.weight) + first;
    uint8_t* packed = args.packed + first / 2;
    Element padded[kMaxBlocksize];
    uint8_t tail_packed[kMaxBlocksize / 2];
    if (tail) {
      memset(padded, 0, sizeof(padded));
      memcpy(padded, x, static_cast<size_t>(count) * sizeof(Element));
      x = padded;
      packed = tail_packed;
    }
    const int64_t whole = tail ? round_up(count, 32) : count;
    const uint32_t bits = largest_magnitude<Dtype>(x, whole);
    finite &= bits < kInfinity;
    const bool ordinary = bits >= kSmallestNormal && bits < kInfinity;  // x / absmax is in [-1, 1]
    if (cpu_rule) {
      float absmax = bits > kInfinity ? float_of_bits(0x7fc00000u) : float_of_bits(bits);
      const float clamped = absmax < kSmallest ? kSmallest : absmax;
      if (tail) absmax = clamped;
      args.absmax[block] = absmax;
      if (tail)
        encode_cpu_tail<Dtype>(x, whole, clamped, packed);
      else
        encode<Dtype, true>(x, whole, 1.0f / clamped, bins, ordinary, packed);
    } else {
      const float absmax = float_of_bits(bits > kInfinity ? largest_number<Dtype>(x, whole) : bits);
      args.absmax[block] = absmax;
      encode<Dtype, false>(x, whole, 1.0f / absmax, bins, ordinary, packed);
    }
    if (tail) {
      if (cpu_rule && count % 2 == 1)
        tail_packed[count / 2] = static_cast<uint8_t>((tail_packed[count / 2] & 0xf0) | 7);
      memcpy(args.packed + first / 2, tail_packed, static_cast<size_t>((count + 1) / 2));
    }
  }
  return finite;
}

}  // namespace

namespace FEINWERK_ISA_NAME {

int nf4_quantize(const feinwerk_nf4_quantize_args& args, int64_t begin, int64_t end) {
  return with_dtype(args.dtype, [&](auto dtype) {
    using Dtype = decltype(dtype);
    return args.rule == FEINWERK_RULE_CPU ? quantize<Dtype, true>(args, begin, end)
                                          : quantize<Dtype, false>(args, begin, end);
  });
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
