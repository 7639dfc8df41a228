// NF4Linear: y = x W^T + bias with W in NF4; docs/onnx_ops.md.
#include "onnx/linear_runs.h"

namespace feinwerk::onnx {

namespace {

class Nf4Linear {
 public:
  static constexpr const char* kName = "NF4Linear";
  static constexpr ort::Characteristic kOutput = ort::kRequired;
  static constexpr InputRule kInputs[] = {
      {"x", InputType::kX, ort::kRequired},
      {"packed", InputType::kUint8, ort::kRequired},
      {"absmax", InputType::kAbsmax, ort::kRequired},
      {"bias", InputType::kX, ort::kOptional},
      {"nested_absmax", InputType::kFloat, ort::kOptional},
      {"nested_codebook", InputType::kFloat, ort::kOptional},
      {"nested_offset", InputType::kFloat, ort::kOptional},
  };
  enum : size_t { kX, kPacked, kAbsmax, kBias, kNestedAbsmax, kNestedCodebook, kNestedOffset };

  Nf4Linear(const Node& node, const Types& types)
      : dtype_(core_dtype(kName, "x", types.x)),
        weight_(node, {kPacked, kAbsmax, kNestedAbsmax, kNestedCodebook, kNestedOffset},
                types.absmax == ort::kUint8) {}

  void check(size_t index, const Tensor& tensor) const {
    if (index == kX)
      rows_of(kName, "x", tensor, weight_.cols());
    else if (index == kBias)
      check_vector(kName, "bias", tensor, weight_.rows());
    else
      weight_.check(kName, index, kInputs[index].name, tensor);
  }

  void compute(const Run& run) const {
    run_nf4_linear(run, run[kX], weight_.weight(run), run[kBias].data, dtype_);
  }

  static void infer(const Shapes& shapes) { infer_last_dimension(shapes, kX, "N"); }

 private:
  feinwerk_dtype dtype_;
  Nf4Inputs weight_;
};

}  // namespace

void add_nf4_linear(const ort::Api* api, bool infers_shapes, OpStructs* out) {
  add_structs<Nf4Linear>(api, infers_shapes, true, out);
}

}  // namespace feinwerk::onnx
