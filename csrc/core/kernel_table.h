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

// The product of a frozen weight, with or without adapters. With grad_y it does not write y but
// grad_magnitude: for every DoRA adapter the sum over its rows of grad_y * (what magnitude / norm
// multiplies) / norm.
struct LinearArgs : feinwerk_lora_linear_args {
  const void* grad_y;
};

// Its gradient; `ds` [m, s_cols] is that of S, computed by adapter_rows.
struct LinearBackwardArgs : feinwerk_lora_linear_backward_args {
  float* ds;
};

inline bool drops(const feinwerk_dropout& dropout) { return dropout.drop_below != 0; }
inline bool is_dora(const feinwerk_adapter& adapter) { return adapter.magnitude != nullptr; }
inline bool finds_norm(const feinwerk_adapter& adapter) {
  return adapter.weight_norm && !adapter.weight_norm_known;
}
// Whether what DoRA scales is another sum than the base product's: PEFT's rule for dropout.
template <class Args>
bool has_dropped_product(const Args& args) {
  bool dora = false;
  for (int64_t e = 0; e < args.adapter_count; ++e) dora = dora || is_dora(args.adapters[e]);
  return dora && drops(args.dropout);
}

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
  bool finds_norms;       // weight norms come out of the same pass
};

// How the gradients of the adapters are cut: units of rows, then units of columns.
struct AdapterPlan {
  int64_t row_units, column_units;
  int64_t scratch_bytes;  // per running task, multiple of 64
};

// One 8-bit dynamic map and what finds a value's nearest entry (csrc/core/dynamic_map.cpp).
struct DynamicMap {
  // Values of like sign, 7 leading mantissa bits and exponent make a bucket; between 2^-25 and 1
  // none holds two midpoints.
  static constexpr int kLowest = (127 - 25) << 7;
  static constexpr int kBuckets = (25 << 7) + 1;
  float values[256];
  float midpoints[256];        // between an entry and the next; the last is infinity
  uint8_t first[2][kBuckets];  // by sign: the least code of a bucket
  // The same by arithmetic: magnitudes come in groups of equal cells: zero, seven decades, the last
  // cell of all with one. In every octave, by the low 5 bits of its exponent, starts group[] and,
  // above threshold[], the next. The bits of x * multiply + offset, a float from 2^23 on, hold in
  // bits 16 to 23 the magnitude's number, of the unsigned map the number + 1 (so that the last
  // decade has the exponent 24 to itself, and one is 0), at most top; in the lower bits where in
  // its cell x is. That is kNear too large, so that values nearer than kNear to a boundary have at
  // most 2 kNear there; rounding is less (measured over all floats).
  static constexpr int kNear = 6;
  int32_t group[32];
  float threshold[32];
  float multiply[16], offset[16];
  uint8_t top[16];
};

// The limbs of square_sum, and how many bits each has.
constexpr int kSquareSumLimbs = FEINWERK_SQUARE_SUM_LENGTH - 2, kSquareSumBits = 30;

// What one step multiplies with, in fp32.
struct AdamwScalars {
  float grad_factor, weight1, beta2, weight2, eps;  // weight = 1 - beta
  float shrink, step_size, correction;  // 1 - lr decay, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
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

  ProductPlan (*linear_plan)(const LinearArgs& args);
  void (*linear_pack)(const LinearArgs& args, int64_t row, int64_t rows, int64_t unit,
                      uint8_t* shared, uint8_t* scratch);
  void (*linear_unit)(const LinearArgs& args, int64_t row, int64_t rows, int64_t unit,
                      const uint8_t* shared, uint8_t* scratch);

  ProductPlan (*linear_backward_plan)(const LinearBackwardArgs& args);
  void (*linear_backward_pack)(const LinearBackwardArgs& args, int64_t row, int64_t rows,
                               int64_t unit, uint8_t* shared, uint8_t* scratch);
  void (*linear_backward_unit)(const LinearBackwardArgs& args, int64_t row, int64_t rows,
                               int64_t unit, const uint8_t* shared, uint8_t* scratch);

  // The gradients of the adapters in two passes: over rows (ds), then over columns (the others).
  // A unit of columns returns 0 where grad_magnitude cannot be had from y.
  AdapterPlan (*adapter_plan)(const LinearBackwardArgs& args);
  void (*adapter_rows)(const LinearBackwardArgs& args, int64_t unit, uint8_t* scratch);
  int (*adapter_columns)(const LinearBackwardArgs& args, int64_t unit, uint8_t* scratch);

  // Elements [begin, end) of a parameter; of one with codes, blocks [begin, end).
  void (*adamw_step)(const feinwerk_adamw_step_args& args, const feinwerk_adamw_tensor& tensor,
                     const AdamwScalars& scalars, const DynamicMap (&maps)[2], int64_t begin,
                     int64_t end);
  // Adds rows [begin, end) to the limbs and counters.
  void (*square_sum)(const feinwerk_rows& rows, int64_t begin, int64_t end, int64_t* limbs);
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
