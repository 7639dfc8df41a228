// What 8-bit block quantization does once a call, before its blocks are quantized in parallel.
#ifndef FEINWERK_CORE_BLOCKWISE_H_
#define FEINWERK_CORE_BLOCKWISE_H_

#include <stdint.h>

namespace feinwerk {

// The mean of x in the one order of docs/ops/blockwise_quantize.md.
float ordered_mean(const float* x, int64_t count);

// The code of each of 65,536 equal bins of [-1, 1] (rule "cpu").
constexpr int64_t kBinCount = 65536;
void fill_bins(const float* codebook, uint8_t* bins);

}  // namespace feinwerk

#endif  // FEINWERK_CORE_BLOCKWISE_H_
