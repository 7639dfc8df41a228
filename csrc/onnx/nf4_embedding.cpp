// NF4Embedding: rows of a table held in NF4; docs/onnx_ops.md.
#include "onnx/nf4_inputs.h"
#include "onnx/op.h"

namespace feinwerk::onnx {

namespace {

// The output's type as attribute `to` gives it; undefined for one that the operator lacks.
ort::ElementType element_type(int64_t to) {
  switch (to) {
    case ort::kFloat:
      return ort::kFloat;
    case ort::kFloat16:
      return ort::kFloat16;
    case ort::kBfloat16:
      return ort::kBfloat16;
    default:
      return ort::kUndefined;
  }
}

class Nf4Embedding {
 public:
  static constexpr const char* kName = "NF4Embedding";
  // Its type follows from an attribute, which only an output that counts as optional may do.
  static constexpr ort::Characteristic kOutput = ort::kOptional;
  static constexpr InputRule kInputs[] = {
      {"indices", InputType::kInt64, ort::kRequired},
      {"packed", InputType::kUint8, ort::kRequired},
      {"absmax", InputType::kAbsmax, ort::kRequired},
      {"nested_absmax", InputType::kFloat, ort::kOptional},
      {"nested_codebook", InputType::kFloat, ort::kOptional},
      {"nested_offset", InputType::kFloat, ort::kOptional},
  };
  enum : size_t { kIndices, kPacked, kAbsmax, kNestedAbsmax, kNestedCodebook, kNestedOffset };

  Nf4Embedding(const Node& node, const Types& types)
      : dtype_(core_dtype(kName, "to", element_type(node.integer("to", ort::kFloat)))),
        weight_(node, {kPacked, kAbsmax, kNestedAbsmax, kNestedCodebook, kNestedOffset},
                types.absmax == ort::kUint8) {}

  void check(size_t index, const Tensor& tensor) const {
    const char* const name = kInputs[index].name;
    if (index == kIndices)
      check_type(kName, name, tensor, ort::kInt64);
    else
      weight_.check(kName, index, name, tensor);
  }

  void compute(const Run& run) const {
    const Tensor& indices = run[kIndices];
    if (!indices.exists) reject(kName, "indices", "be given", "none");
    feinwerk_nf4_embedding_args args = {};
    args.weight = weight_.weight(run);
    args.indices = static_cast<const int64_t*>(indices.data);
    args.indices_count = indices.count;
    args.out_count = checked_product(kName, "indices x K", indices.count, weight_.cols());
    args.dtype = dtype_;
    args.out = output(run.api(), run.context, indices, indices.rank, weight_.cols());
    if (indices.count == 0 || !args.out) return;
    const Executor executor(run.api(), run.context);
    require(feinwerk_nf4_embedding(&args, executor.get()));
  }

  static void infer(const Shapes& shapes) {
    Shapes::Shape shape;
    int64_t columns = 0, to = ort::kFloat;
    shapes.integer("to", &to);
    if (!shapes.get(kIndices, &shape) || !shapes.integer("K", &columns) || columns < 1) return;
    shape.dims.push_back(columns);
    shape.names.emplace_back();
    shape.type = element_type(to);
    // A type that the operator lacks is refused when the kernel is created.
    if (shape.type == ort::kUndefined) return;
    shapes.set_output(shape);
  }

 private:
  feinwerk_dtype dtype_;
  Nf4Inputs weight_;
};

}  // namespace

void add_nf4_embedding(const ort::Api* api, bool infers_shapes, OpStructs* out) {
  for (const ort::ElementType absmax : {ort::kFloat, ort::kUint8})
    out->push_back(make_struct<Nf4Embedding>(api, infers_shapes, {ort::kUndefined, absmax}));
}

}  // namespace feinwerk::onnx
