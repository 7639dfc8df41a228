// LoraLinear: y = gain * (x W^T + scaling * (x A^T) B^T) + bias over a dense W; docs/onnx_ops.md.
#include "onnx/linear_runs.h"

namespace feinwerk::onnx {

namespace {

class LoraLinear {
 public:
  static constexpr const char* kName = "LoraLinear";
  static constexpr ort::Characteristic kOutput = ort::kRequired;
  static constexpr InputRule kInputs[] = {
      {"x", InputType::kX, ort::kRequired},           {"weight", InputType::kX, ort::kRequired},
      {"lora_A", InputType::kFloat, ort::kRequired},  {"lora_B", InputType::kFloat, ort::kRequired},
      {"scaling", InputType::kFloat, ort::kRequired}, {"gain", InputType::kFloat, ort::kOptional},
      {"bias", InputType::kX, ort::kOptional},
  };
  enum : size_t { kX, kWeight, kLoraA, kLoraB, kScaling, kGain, kBias };

  LoraLinear(const Node&, const Types& types)
      : dtype_(core_dtype(kName, "x", types.x)), adapter_(kName, kLoraA) {}

  // N and K are the weight's, which may be known in a run only: the others are checked there.
  void check(size_t index, const Tensor& tensor) const {
    if (index != kWeight) return;
    check_matrix(kName, "weight", tensor, -1, -1, "[N, K]");
    if (tensor.count == 0) reject(kName, "weight", "have at least 1 element", shape_text(tensor));
  }

  void compute(const Run& run) const {
    const Tensor& w = run[kWeight];
    feinwerk_weight weight = {};
    weight.nf4.rows = w.dims[0];
    weight.nf4.cols = w.dims[1];
    weight.dense = w.data;
    weight.dense_dtype = dtype_;
    rows_of(kName, "x", run[kX], w.dims[1]);
    for (size_t index = kLoraA; index <= kGain; ++index)
      if (run[index].exists)
        adapter_.check(index, kInputs[index].name, run[index], w.dims[0], w.dims[1]);
    if (run[kBias].exists) check_vector(kName, "bias", run[kBias], w.dims[0]);
    run_lora_linear(run, run[kX], weight, adapter_.read(run), run[kBias].data, dtype_);
  }

  static void infer(const Shapes& shapes) {
    Shapes::Shape x, weight;
    if (!shapes.get(kX, &x) || !shapes.get(kWeight, &weight) || weight.dims.size() != 2) return;
    x.dims.back() = weight.dims[0];
    x.names.back() = weight.names[0];
    shapes.set_output(x);
  }

 private:
  feinwerk_dtype dtype_;
  AdapterInputs adapter_;
};

}  // namespace

void add_lora_linear(const ort::Api* api, bool infers_shapes, OpStructs* out) {
  add_structs<LoraLinear>(api, infers_shapes, false, out);
}

}  // namespace feinwerk::onnx
