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

ProductPlan linear_plan(const LinearArgs& args);
void linear_pack(const LinearArgs& args, int64_t row, int64_t rows, int64_t unit, uint8_t* shared,
                 uint8_t* scratch);
void linear_unit(const LinearArgs& args, int64_t row, int64_t rows, int64_t unit,
                 const uint8_t* shared, uint8_t* scratch);
ProductPlan linear_backward_plan(const LinearBackwardArgs& args);
void linear_backward_pack(const LinearBackwardArgs& args, int64_t row, int64_t rows, int64_t unit,
                          uint8_t* shared, uint8_t* scratch);
void linear_backward_unit(const LinearBackwardArgs& args, int64_t row, int64_t rows, int64_t unit,
                          const uint8_t* shared, uint8_t* scratch);
AdapterPlan adapter_plan(const LinearBackwardArgs& args);
void adapter_rows(const LinearBackwardArgs& args, int64_t unit, uint8_t* scratch);
int adapter_columns(const LinearBackwardArgs& args, int64_t unit, uint8_t* scratch);
void adamw_step(const feinwerk_adamw_step_args& args, const feinwerk_adamw_tensor& tensor,
                const AdamwScalars& scalars, const DynamicMap (&maps)[2], int64_t begin,
                int64_t end);
void square_sum(const feinwerk_rows& rows, int64_t begin, int64_t end, int64_t* limbs);

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_KERNELS_H_
