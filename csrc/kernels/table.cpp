// The table of one instruction set.
#include "kernels/kernels.h"

namespace feinwerk {
namespace FEINWERK_ISA_NAME {

extern const KernelTable kTable = {
    nf4_quantize, nf4_dequantize, blockwise_quantize,   blockwise_dequantize, linear_plan,
    linear_pack,  linear_unit,    linear_backward_plan, linear_backward_pack, linear_backward_unit,
    adapter_plan, adapter_rows,   adapter_columns,      adamw_step,           square_sum,
};

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
