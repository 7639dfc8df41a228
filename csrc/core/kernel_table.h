// The table of kernels that every instruction set fills in once, and the plan of the two products.
//
// A kernel is a function of (arguments, range): no allocation, threads, exceptions or globals.
// csrc/core validates, chooses a table and splits the work; csrc/kernels computes.
#ifndef FEINWERK_CORE_KERNEL_TABLE_H_
#define FEINWERK_CORE_KERNEL_TABLE_H_

#include <stdint.h>

#include "feinwerk/feinwerk.h"

namespace feinwerk {

constexpr int64_t kNestedBlocksize = 256;

// How one product is cut: the rows of the activations in chunks, each chunk in two phases.
//   pack phase: `pack_units` independent pieces rearrange the activations into `shared`
//   work phase: `units` independent pieces of the weight, each with its own `scratch`
// Both depend on shapes, dtype and ISA only, so results do not depend on the number of threads.
struct ProductPlan {
  int64_t chunk_rows;  // rows of x (or grad_y) handled at once, at least 1
  int64_t pack_units;
  int64_t units;
  int64_t shared_bytes;   // multiple of 64
  int64_t scratch_bytes;  // per running task, multiple of 64
};

struct KernelTable {
  // Blocks [begin, end) of the weight. Returns 0 when a NaN or an infinity was met.
  int (*nf4_quantize)(const feinwerk_nf4_quantize_args& args, int64_t begin, int64_t end);
  // Elements [begin, end) of the flattened weight; out points at element `begin`.
  void (*nf4_dequantize)(const feinwerk_nf4_weight& weight, int64_t begin, int64_t end,
                         feinwerk_dtype dtype, void* out);
  void (*blockwise_quantize)(const feinwerk_blockwise_quantize_args& args, float offset,
                             const uint8_t* bins, int64_t begin, int64_t end);
  void (*blockwise_dequantize)(const feinwerk_blockwise_dequantize_args& args, int64_t begin,
                               int64_t end);

  ProductPlan (*nf4_linear_plan)(const feinwerk_nf4_linear_args& args);
  void (*nf4_linear_pack)(const feinwerk_nf4_linear_args& args, int64_t row, int64_t rows,
                          int64_t unit, uint8_t* shared);
  void (*nf4_linear_unit)(const feinwerk_nf4_linear_args& args, int64_t row, int64_t rows,
                          int64_t unit, const uint8_t* shared, uint8_t* scratch);

  ProductPlan (*nf4_linear_backward_plan)(const feinwerk_nf4_linear_backward_args& args);
  void (*nf4_linear_backward_pack)(const feinwerk_nf4_linear_backward_args& args, int64_t row,
                                   int64_t rows, int64_t unit, uint8_t* shared);
  void (*nf4_linear_backward_unit)(const feinwerk_nf4_linear_backward_args& args, int64_t row,
                                   int64_t rows, int64_t unit, const uint8_t* shared,
                                   uint8_t* scratch);
};

// One definition per instruction set, in csrc/kernels/table.cpp.
#define FEINWERK_DECLARE_TABLE(isa) \
  namespace isa {                   \
  extern const KernelTable kTable;  \
  }
FEINWERK_DECLARE_TABLE(scalar)
#if defined(__x86_64__)
FEINWERK_DECLARE_TABLE(avx2)
FEINWERK_DECLARE_TABLE(avx512)
FEINWERK_DECLARE_TABLE(avx512_vnni)
FEINWERK_DECLARE_TABLE(avx512_bf16)
FEINWERK_DECLARE_TABLE(amx)
#elif defined(__aarch64__)
FEINWERK_DECLARE_TABLE(neon)
#endif
#undef FEINWERK_DECLARE_TABLE

}  // namespace feinwerk

#endif  // FEINWERK_CORE_KERNEL_TABLE_H_
