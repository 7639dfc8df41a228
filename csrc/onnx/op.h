// From a kernel class to the struct of functions that ONNX Runtime calls.
//
// A kernel class has
//   - kName, kInputs and kOutput: its name, its inputs in order, whether it may lack an output;
//   - Kernel(const Node&, const Types&), which reads attributes and throws Failure;
//   - check(index, tensor): the rules of one input;
//   - compute(const Run&): one run;
//   - infer(const Shapes&): the output's shape, as far as it is known.
//
// A node's types choose among several structs of one name, since a custom operator cannot derive
// its output's type from one of several inputs: one struct for each type of x and of absmax.
#ifndef FEINWERK_ONNX_OP_H_
#define FEINWERK_ONNX_OP_H_

#include <iterator>
#include <string>
#include <vector>

#include "onnx/executor.h"
#include "onnx/host.h"
#include "onnx/scratch.h"

namespace feinwerk::onnx {

// The types that tell structs of one name apart.
struct Types {
  ort::ElementType x;       // of x, weight and bias
  ort::ElementType absmax;  // kFloat or kUint8
};

// How an input's type follows from those.
enum class InputType { kX, kAbsmax, kFloat, kUint8, kInt64 };

struct InputRule {
  const char* name;
  InputType type;
  ort::Characteristic characteristic;
};

// One run of a kernel.
struct Run {
  const Inputs& inputs;
  OrtKernelContext* context;
  const Tensor* tensors;  // one for every input, checked

  const ort::Api* api() const { return inputs.api(); }
  const Tensor& operator[](size_t index) const { return tensors[index]; }
};

// What is known of a node's inputs before any run.
class Shapes {
 public:
  struct Shape {
    ort::ElementType type;
    std::vector<int64_t> dims;       // -1 where unknown
    std::vector<std::string> names;  // of symbolic dimensions
  };
  Shapes(const ort::Api* api, const OrtShapeInferContext* context) : api_(api), context_(context) {}
  // Whether input `index` has a known shape of at least one dimension.
  bool get(size_t index, Shape* shape) const;
  bool integer(const char* name, int64_t* value) const;
  void set_output(const Shape& shape) const;

 private:
  const ort::Api* api_;
  const OrtShapeInferContext* context_;
};

// A registered struct: what ONNX Runtime reads, then what is ours.
struct OpStruct : ort::CustomOp {
  const ort::Api* api;
  Types types;
};

// Structs that stay alive for the process: sessions refer to them.
using OpStructs = std::vector<OpStruct*>;

void add_nf4_linear(const ort::Api* api, bool infers_shapes, OpStructs* out);
void add_nf4_lora_linear(const ort::Api* api, bool infers_shapes, OpStructs* out);
void add_lora_linear(const ort::Api* api, bool infers_shapes, OpStructs* out);
void add_nf4_embedding(const ort::Api* api, bool infers_shapes, OpStructs* out);

template <class Kernel>
class Instance {
 public:
  Instance(const ort::Api* api, const OrtKernelInfo* info, const Types& types)
      : node_{api, info, Kernel::kName}, kernel_(node_, types), inputs_(node_, names(), size()) {
    for (size_t i = 0; i < size(); ++i)
      if (inputs_.is_constant(i)) kernel_.check(i, inputs_.constant(i));
  }
  void compute(OrtKernelContext* context) const {
    Tensor tensors[size()];
    for (size_t i = 0; i < size(); ++i) {
      tensors[i] = inputs_.get(context, i);
      if (tensors[i].exists && !inputs_.is_constant(i)) kernel_.check(i, tensors[i]);
    }
    kernel_.compute({inputs_, context, tensors});
  }
  const ort::Api* api() const { return inputs_.api(); }

 private:
  static constexpr size_t size() { return std::size(Kernel::kInputs); }
  static const char* const* names() {
    static const auto list = [] {
      std::vector<const char*> all;
      for (const InputRule& rule : Kernel::kInputs) all.push_back(rule.name);
      return all;
    }();
    return list.data();
  }

  ScratchUser scratch_user_;
  Node node_;
  Kernel kernel_;
  Inputs inputs_;
};

template <class Kernel>
OpStruct* make_struct(const ort::Api* api, bool infers_shapes, const Types& types) {
  auto* const op = new OpStruct{};
  op->api = api;
  op->types = types;
  op->version = ort::kApiVersion;
  op->get_name = [](const ort::CustomOp*) { return Kernel::kName; };
  op->get_provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op->get_input_count = [](const ort::CustomOp*) -> size_t { return std::size(Kernel::kInputs); };
  op->get_input_type = [](const ort::CustomOp* self, size_t index) {
    const Types& types = static_cast<const OpStruct*>(self)->types;
    switch (Kernel::kInputs[index].type) {
      case InputType::kX:
        return types.x;
      case InputType::kAbsmax:
        return types.absmax;
      case InputType::kUint8:
        return ort::kUint8;
      case InputType::kInt64:
        return ort::kInt64;
      case InputType::kFloat:
        break;
    }
    return ort::kFloat;
  };
  op->get_input_characteristic = [](const ort::CustomOp*, size_t index) {
    return Kernel::kInputs[index].characteristic;
  };
  op->get_output_count = [](const ort::CustomOp*) -> size_t { return 1; };
  op->get_output_type = [](const ort::CustomOp* self, size_t) {
    return static_cast<const OpStruct*>(self)->types.x;
  };
  op->get_output_characteristic = [](const ort::CustomOp*, size_t) { return Kernel::kOutput; };
  op->get_input_memory_type = [](const ort::CustomOp*, size_t) -> int32_t { return 0; };
  // No input or output is variadic.
  const auto one = [](const ort::CustomOp*) -> int32_t { return 1; };
  op->get_variadic_input_min_arity = op->get_variadic_input_homogeneity = one;
  op->get_variadic_output_min_arity = op->get_variadic_output_homogeneity = one;
  op->get_start_version = one;
  op->get_end_version = [](const ort::CustomOp*) -> int32_t { return INT32_MAX; };
  op->create_kernel_v2 = [](const ort::CustomOp* self, const ort::Api* api,
                            const OrtKernelInfo* info, void** kernel) {
    return guarded(api, [&] {
      *kernel = new Instance<Kernel>(api, info, static_cast<const OpStruct*>(self)->types);
    });
  };
  op->compute_v2 = [](void* kernel, OrtKernelContext* context) {
    const auto* const instance = static_cast<const Instance<Kernel>*>(kernel);
    return guarded(instance->api(), [&] { instance->compute(context); });
  };
  op->destroy_kernel = [](void* kernel) { delete static_cast<Instance<Kernel>*>(kernel); };
  if (infers_shapes)
    op->infer_output_shape = [](const ort::CustomOp* self,
                                OrtShapeInferContext* context) -> OrtStatus* {
      const auto& op = *static_cast<const OpStruct*>(self);
      const Shapes shapes(op.api, context);
      // Nobody reads a status here; what is wrong is said when the kernel is created.
      if (OrtStatus* const status = guarded(op.api, [&] { Kernel::infer(shapes); }))
        ort::ReleaseStatus(op.api, status);
      return nullptr;
    };
  return op;
}

// One struct for each type of x, and of absmax where there is one.
template <class Kernel>
void add_structs(const ort::Api* api, bool infers_shapes, bool has_absmax, OpStructs* out) {
  for (const ort::ElementType x : {ort::kFloat, ort::kFloat16, ort::kBfloat16})
    for (const ort::ElementType absmax : {ort::kFloat, ort::kUint8})
      if (has_absmax || absmax == ort::kFloat)
        out->push_back(make_struct<Kernel>(api, infers_shapes, {x, absmax}));
}

}  // namespace feinwerk::onnx

#endif  // FEINWERK_ONNX_OP_H_
