// Attributes, inputs and errors between the operators and ONNX Runtime.
#include "onnx/host.h"

namespace feinwerk::onnx {

namespace {

const char* type_name(ort::ElementType type) {
  switch (type) {
    case ort::kFloat:
      return "float32";
    case ort::kFloat16:
      return "float16";
    case ort::kBfloat16:
      return "bfloat16";
    case ort::kUint8:
      return "uint8";
    case ort::kInt64:
      return "int64";
    case ort::kUndefined:
      break;
  }
  return "another type";
}

}  // namespace

void reject(const char* op, const std::string& name, const std::string& rule,
            const std::string& value) {
  throw Failure{ort::kInvalidArgument,
                std::string(op) + ": " + name + " must " + rule + ", got " + value};
}

bool succeeded(const ort::Api* api, OrtStatus* status) {
  if (status) ort::ReleaseStatus(api, status);
  return status == nullptr;
}

void require(const ort::Api* api, OrtStatus* status) {
  if (!succeeded(api, status))
    throw Failure{ort::kRuntimeException, "feinwerk: ONNX Runtime refused a call of its interface"};
}

void require(feinwerk_status status) {
  switch (status) {
    case FEINWERK_OK:
      return;
    case FEINWERK_INVALID_ARGUMENT:
    case FEINWERK_OUT_OF_RANGE:
    case FEINWERK_NON_FINITE:
      throw Failure{ort::kInvalidArgument, feinwerk_last_error()};
    case FEINWERK_UNSUPPORTED:
      throw Failure{ort::kNotImplemented, feinwerk_last_error()};
    case FEINWERK_INTERNAL:
      break;
  }
  throw Failure{ort::kRuntimeException, feinwerk_last_error()};
}

std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.rank; ++i) text += (i ? ", " : "") + std::to_string(tensor.dims[i]);
  return text + "]";
}

bool Node::find(const char* name, int64_t* value) const {
  if (succeeded(api, ort::KernelInfoGetAttribute_int64(api, info, name, value))) return true;
  // Missing, or of another type? The getters of other types know it.
  float number;
  size_t size = 0;
  if (succeeded(api, ort::KernelInfoGetAttribute_float(api, info, name, &number)))
    reject(op, name, "be an int attribute", "a float");
  if (succeeded(api, ort::KernelInfoGetAttribute_string(api, info, name, nullptr, &size)))
    reject(op, name, "be an int attribute", "a string");
  if (succeeded(api, ort::KernelInfoGetAttributeArray_int64(api, info, name, nullptr, &size)) ||
      succeeded(api, ort::KernelInfoGetAttributeArray_float(api, info, name, nullptr, &size)))
    reject(op, name, "be an int attribute", "another type");
  return false;
}

int64_t Node::integer(const char* name) const {
  int64_t value = 0;
  if (!find(name, &value)) reject(op, name, "be given as an int attribute", "none");
  return value;
}

int64_t Node::integer(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  return find(name, &value) ? value : otherwise;
}

bool Node::has(size_t index) const {
  size_t count = 0, size = 0;
  require(api, ort::KernelInfo_GetInputCount(api, info, &count));
  if (index >= count) return false;
  // Its name's size, the final zero included: an absent input has an empty name.
  require(api, ort::KernelInfo_GetInputName(api, info, index, nullptr, &size));
  return size > 1;
}

Inputs::Inputs(const Node& node, const char* const* names, size_t count)
    : api_(node.api), op_(node.op), names_(names), constants_(count) {
  for (size_t i = 0; i < count; ++i) {
    if (!node.has(i)) continue;
    int32_t is_constant = 0;
    const OrtValue* value = nullptr;
    require(api_, ort::KernelInfoGetConstantInput_tensor(api_, node.info, i, &is_constant, &value));
    if (is_constant && value) constants_[i] = read(value, i);
  }
}

Tensor Inputs::get(const OrtKernelContext* context, size_t index) const {
  if (constants_[index].exists) return constants_[index];
  const OrtValue* value = nullptr;
  require(api_, ort::KernelContext_GetInput(api_, context, index, &value));
  return value ? read(value, index) : Tensor{};
}

Tensor Inputs::read(const OrtValue* value, size_t index) const {
  TypeAndShape info(api_);
  Tensor tensor;
  int32_t type = 0;
  size_t rank = 0;
  require(api_, ort::GetTensorTypeAndShape(api_, value, &info.pointer));
  require(api_, ort::GetTensorElementType(api_, info.pointer, &type));
  require(api_, ort::GetDimensionsCount(api_, info.pointer, &rank));
  if (rank > kMaxRank)
    reject(op_, names_[index], "have at most " + std::to_string(kMaxRank) + " dimensions",
           std::to_string(rank));
  require(api_, ort::GetDimensions(api_, info.pointer, tensor.dims, rank));
  tensor.type = static_cast<ort::ElementType>(type);
  tensor.rank = static_cast<int>(rank);
  tensor.count = 1;
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.dims[i] < 0) reject(op_, names_[index], "have known dimensions", shape_text(tensor));
    tensor.count = checked_product(op_, names_[index], tensor.count, tensor.dims[i]);
  }
  if (tensor.count > 0) {
    void* data = nullptr;
    require(api_, ort::GetTensorMutableData(api_, const_cast<OrtValue*>(value), &data));
    tensor.data = data;
    if (!data) reject(op_, names_[index], "have data", "none");
  }
  tensor.exists = true;
  return tensor;
}

void check_type(const char* op, const char* name, const Tensor& tensor, ort::ElementType type) {
  if (tensor.type != type)
    reject(op, name, std::string("be ") + type_name(type), type_name(tensor.type));
}

void check_count(const char* op, const char* name, const Tensor& tensor, int64_t count) {
  if (tensor.count != count)
    reject(op, name, "have " + std::to_string(count) + " elements", std::to_string(tensor.count));
}

void check_matrix(const char* op, const char* name, const Tensor& tensor, int64_t rows,
                  int64_t cols, const std::string& shape) {
  if (tensor.rank != 2 || (rows >= 0 && tensor.dims[0] != rows) ||
      (cols >= 0 && tensor.dims[1] != cols))
    reject(op, name, "have shape " + shape, shape_text(tensor));
}

int64_t checked_product(const char* op, const char* name, int64_t a, int64_t b) {
  constexpr int64_t kLimit = int64_t{1} << 62;
  if (b != 0 && a > kLimit / b)
    reject(op, name, "stay below 2^62 elements", std::to_string(a) + " x " + std::to_string(b));
  return a * b;
}

feinwerk_dtype core_dtype(const char* op, const char* name, ort::ElementType type) {
  switch (type) {
    case ort::kFloat:
      return FEINWERK_FLOAT32;
    case ort::kBfloat16:
      return FEINWERK_BFLOAT16;
    case ort::kFloat16:
      return FEINWERK_FLOAT16;
    default:
      reject(op, name, "be float32, float16 or bfloat16", type_name(type));
  }
}

int64_t rows_of(const char* op, const char* name, const Tensor& x, int64_t cols) {
  if (x.rank < 1 || x.dims[x.rank - 1] != cols)
    reject(op, name, "have shape [..., K = " + std::to_string(cols) + "]", shape_text(x));
  return x.count / cols;
}

void* output(const ort::Api* api, OrtKernelContext* context, const Tensor& like, int rank,
             int64_t last) {
  int64_t dims[kMaxRank + 1];
  for (int i = 0; i < rank; ++i) dims[i] = like.dims[i];
  dims[rank] = last;
  OrtValue* value = nullptr;
  void* data = nullptr;
  require(api, ort::KernelContext_GetOutput(api, context, 0, dims, static_cast<size_t>(rank) + 1,
                                            &value));
  if (value) require(api, ort::GetTensorMutableData(api, value, &data));
  return data;
}

}  // namespace feinwerk::onnx
