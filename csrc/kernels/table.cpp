// The table of one instruction set.
#include "kernels/kernels.h"

namespace feinwerk {
namespace FEINWERK_ISA_NAME {

extern const KernelTable kTable = {
    nf4_quantize,
    nf4_dequantize,
    blockwise_quantize,
    blockwise_dequantize,
    nf4_linear_plan,
    nf4_linear_pack,
    nf4_linear_unit,
    nf4_linear_backward_plan,
    nf4_linear_backward_pack,
    nf4_linear_backward_unit,
};

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
