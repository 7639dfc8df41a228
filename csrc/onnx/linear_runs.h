// The two products of the core as the linear operators run them, and the rules those share.
#ifndef FEINWERK_ONNX_LINEAR_RUNS_H_
#define FEINWERK_ONNX_LINEAR_RUNS_H_

#include "onnx/nf4_inputs.h"
#include "onnx/op.h"

namespace feinwerk::onnx {

// An optional vector: absent, [0] for the same, or [n].
void check_vector(const char* op, const char* name, const Tensor& tensor, int64_t n);

// One adapter's inputs, which follow one another from `lora_A` on: lora_A, lora_B, scaling, gain.
class AdapterInputs {
 public:
  AdapterInputs(const char* op, size_t first) : op_(op), first_(first) {}
  // Whether `index` is one of them, and then checked, against N and K.
  bool check(size_t index, const char* name, const Tensor& tensor, int64_t n, int64_t k) const;
  // Checks them against each other. Rank 0 without a gain is no adapter: adapter_count is 0.
  struct Adapter {
    int64_t r;
    const float *lora_A, *lora_B, *gain;  // gain is null when there is none
    float scaling;
    bool any() const { return r > 0 || gain; }
  };
  Adapter read(const Run& run) const;

 private:
  const char* op_;
  size_t first_;
};

// Computes and writes output 0.
void run_nf4_linear(const Run& run, const Tensor& x, const feinwerk_nf4_weight& weight,
                    const void* bias, feinwerk_dtype dtype);
void run_lora_linear(const Run& run, const Tensor& x, const feinwerk_weight& weight,
                     const AdapterInputs::Adapter& adapter, const void* bias, feinwerk_dtype dtype);

// The output is input `index` with its last dimension replaced by the attribute's value.
void infer_last_dimension(const Shapes& shapes, size_t index, const char* attribute);

}  // namespace feinwerk::onnx

#endif  // FEINWERK_ONNX_LINEAR_RUNS_H_
