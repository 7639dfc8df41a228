// Shape inference: the shapes that ONNX Runtime knows when it loads a model.
#include <atomic>

#include "onnx/op.h"

namespace feinwerk::onnx {

namespace {

// A dimension without a name gets one: two of them may differ, and ONNX Runtime would take -1 for a
// size.
std::string fresh_name() {
  static std::atomic<int64_t> count{0};
  return "feinwerk_dim_" + std::to_string(count++);
}

}  // namespace

bool Shapes::get(size_t index, Shape* shape) const {
  size_t inputs = 0, rank = 0;
  require(api_, ort::ShapeInferContext_GetInputCount(api_, context_, &inputs));
  if (index >= inputs) return false;
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
  if (!succeeded(api_, ort::ShapeInferContext_GetInputTypeShape(api_, context_, index, &info)))
    return false;
  int32_t type = 0;
  require(api_, ort::GetTensorElementType(api_, info, &type));
  shape->type = static_cast<ort::ElementType>(type);
  require(api_, ort::GetDimensionsCount(api_, info, &rank));
  // An unknown shape reads as one without dimensions.
  if (rank == 0 || rank > kMaxRank) return false;
  std::vector<const char*> names(rank, nullptr);
  shape->dims.resize(rank);
  require(api_, ort::GetDimensions(api_, info, shape->dims.data(), rank));
  require(api_, ort::GetSymbolicDimensions(api_, info, names.data(), rank));
  shape->names.assign(rank, "");
  for (size_t i = 0; i < rank; ++i)
    if (shape->dims[i] < 0) shape->names[i] = names[i] && *names[i] ? names[i] : fresh_name();
  return true;
}

bool Shapes::integer(const char* name, int64_t* value) const {
  const OrtOpAttr* attribute = nullptr;
  size_t size = 0;
  return succeeded(api_, ort::ShapeInferContext_GetAttribute(api_, context_, name, &attribute)) &&
         succeeded(api_, ort::ReadOpAttr(api_, attribute, ort::kAttributeInt, value, sizeof *value,
                                         &size));
}

void Shapes::set_output(const Shape& shape) const {
  TypeAndShape info(api_);
  require(api_, ort::CreateTensorTypeAndShapeInfo(api_, &info.pointer));
  require(api_, ort::SetTensorElementType(api_, info.pointer, shape.type));
  require(api_, ort::SetDimensions(api_, info.pointer, shape.dims.data(), shape.dims.size()));
  std::vector<const char*> names;
  for (const std::string& name : shape.names) names.push_back(name.c_str());
  require(api_, ort::SetSymbolicDimensions(api_, info.pointer, names.data(), names.size()));
  require(api_, ort::ShapeInferContext_SetOutputTypeShape(api_, context_, 0, info.pointer));
}

}  // namespace feinwerk::onnx
