// nf4_dequantize: codebook[code] * absmax in fp32, rounded once to the output dtype.
#include "kernels/decode.h"
#include "kernels/kernels.h"

namespace feinwerk {
namespace FEINWERK_ISA_NAME {

void nf4_dequantize(const feinwerk_nf4_weight& weight, int64_t begin, int64_t end,
                    feinwerk_dtype dtype, void* out) {
  if (dtype == FEINWERK_FLOAT32)
    return decode_floats<Float32>(weight, begin, end, static_cast<float*>(out));
#if defined(__AVX512BW__)
  if (dtype == FEINWERK_BFLOAT16)
    return decode_bf16(weight, begin, end, static_cast<uint16_t*>(out));
#endif
  auto* halves = static_cast<uint16_t*>(out);
  constexpr int64_t kPiece = 512;
  float piece[kPiece];
  for (int64_t e = begin; e < end; e += kPiece) {
    const int64_t count = min64(kPiece, end - e);
    decode_floats<Float32>(weight, e, e + count, piece);
    with_dtype(dtype, [&](auto tag) {
      using Dtype = decltype(tag);
      for (int64_t i = 0; i < count; i += kWidth)
        write_part<Dtype>(reinterpret_cast<typename Dtype::Element*>(halves) + (e - begin) + i,
                          count - i, load(piece + i));
    });
  }
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
