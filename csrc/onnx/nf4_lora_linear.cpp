// NF4LoraLinear: y = gain * (x W^T + scaling * (x A^T) B^T) + bias with W in NF4; docs/onnx_ops.md.
#include "onnx/linear_runs.h"

namespace feinwerk::onnx {

namespace {

class Nf4LoraLinear {
 public:
  static constexpr const char* kName = "NF4LoraLinear";
  static constexpr ort::Characteristic kOutput = ort::kRequired;
  static constexpr InputRule kInputs[] = {
      {"x", InputType::kX, ort::kRequired},
      {"packed", InputType::kUint8, ort::kRequired},
      {"absmax", InputType::kAbsmax, ort::kRequired},
      {"lora_A", InputType::kFloat, ort::kRequired},
      {"lora_B", InputType::kFloat, ort::kRequired},
      {"scaling", InputType::kFloat, ort::kRequired},
      {"gain", InputType::kFloat, ort::kOptional},
      {"bias", InputType::kX, ort::kOptional},
      {"nested_absmax", InputType::kFloat, ort::kOptional},
      {"nested_codebook", InputType::kFloat, ort::kOptional},
      {"nested_offset", InputType::kFloat, ort::kOptional},
  };
  enum : size_t { kX, kPacked, kAbsmax, kLoraA };
  enum : size_t { kBias = 7, kNestedAbsmax, kNestedCodebook, kNestedOffset };

  Nf4LoraLinear(const Node& node, const Types& types)
      : dtype_(core_dtype(kName, "x", types.x)),
        adapter_(kName, kLoraA),
        weight_(node, {kPacked, kAbsmax, kNestedAbsmax, kNestedCodebook, kNestedOffset},
                types.absmax == ort::kUint8) {}

  void check(size_t index, const Tensor& tensor) const {
    const char* const name = kInputs[index].name;
    if (index == kX)
      rows_of(kName, name, tensor, weight_.cols());
    else if (index == kBias)
      check_vector(kName, name, tensor, weight_.rows());
    else if (!adapter_.check(index, name, tensor, weight_.rows(), weight_.cols()))
      weight_.check(kName, index, name, tensor);
  }

  void compute(const Run& run) const {
    const AdapterInputs::Adapter adapter = adapter_.read(run);
    const feinwerk_nf4_weight nf4 = weight_.weight(run);
    if (!adapter.any()) return run_nf4_linear(run, run[kX], nf4, run[kBias].data, dtype_);
    feinwerk_weight weight = {};
    weight.nf4 = nf4;
    run_lora_linear(run, run[kX], weight, adapter, run[kBias].data, dtype_);
  }

  static void infer(const Shapes& shapes) { infer_last_dimension(shapes, kX, "N"); }

 private:
  feinwerk_dtype dtype_;
  AdapterInputs adapter_;
  Nf4Inputs weight_;
};

}  // namespace

void add_nf4_lora_linear(const ort::Api* api, bool infers_shapes, OpStructs* out) {
  add_structs<Nf4LoraLinear>(api, infers_shapes, true, out);
}

}  // namespace feinwerk::onnx
