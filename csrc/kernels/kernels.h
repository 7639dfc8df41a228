// The kernels of one instruction set, as csrc/kernels/table.cpp collects them.
#ifndef FEINWERK_KERNELS_KERNELS_H_
#define FEINWERK_KERNELS_KERNELS_H_

#include "core/kernel_table.h"

namespace feinwerk {
namespace FEINWERK_ISA_NAME {

int nf4_quantize(const feinwerk_nf4_quantize_args& args, int64_t begin, int64_t end);
void nf4_dequantize(const feinwerk_nf4_weight& weight, int64_t begin, int64_t end,
                    feinwerk_dtype dtype, void* out);
void blockwise_quantize(const feinwerk_blockwise_quantize_args& args, float offset,
                        const uint8_t* bins, int64_t begin, int64_t end);
void blockwise_dequantize(const feinwerk_blockwise_dequantize_args& args, int64_t begin,
                          int64_t end);

ProductPlan nf4_linear_plan(const feinwerk_nf4_linear_args& args);
void nf4_linear_pack(const feinwerk_nf4_linear_args& args, int64_t row, int64_t rows, int64_t unit,
                     uint8_t* shared);
void nf4_linear_unit(const feinwerk_nf4_linear_args& args, int64_t row, int64_t rows, int64_t unit,
                     const uint8_t* shared, uint8_t* scratch);
ProductPlan nf4_linear_backward_plan(const feinwerk_nf4_linear_backward_args& args);
void nf4_linear_backward_pack(const feinwerk_nf4_linear_backward_args& args, int64_t row,
                              int64_t rows, int64_t unit, uint8_t* shared);
void nf4_linear_backward_unit(const feinwerk_nf4_linear_backward_args& args, int64_t row,
                              int64_t rows, int64_t unit, const uint8_t* shared, uint8_t* scratch);

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_KERNELS_H_
