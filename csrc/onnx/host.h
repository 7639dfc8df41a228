// What an operator sees of ONNX Runtime: attributes and inputs, checked, and the one way to fail.
#ifndef FEINWERK_ONNX_HOST_H_
#define FEINWERK_ONNX_HOST_H_

#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "feinwerk/feinwerk.h"
#include "onnx/ort_abi.h"

namespace feinwerk::onnx {

struct Failure {
  ort::ErrorCode code;
  std::string message;
};

// "<op>: <name> must <rule>, got <value>"
[[noreturn]] void reject(const char* op, const std::string& name, const std::string& rule,
                         const std::string& value);

// Turns a status of ONNX Runtime into a Failure, and one of the core.
void require(const ort::Api* api, OrtStatus* status);
void require(feinwerk_status status);

// Releases a status; whether there was none.
bool succeeded(const ort::Api* api, OrtStatus* status);

// Runs body; nothing crosses into ONNX Runtime but a status, null for success.
template <class Body>
OrtStatus* guarded(const ort::Api* api, Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
    return nullptr;
  } catch (const Failure& failure) {
    return ort::CreateStatus(api, failure.code, failure.message.c_str());
  } catch (const std::exception& error) {
    return ort::CreateStatus(api, ort::kRuntimeException, error.what());
  } catch (...) {
    return ort::CreateStatus(api, ort::kFail, "feinwerk: unknown C++ exception");
  }
}

// Type and shape as ONNX Runtime hands them out, released at the end.
struct TypeAndShape {
  explicit TypeAndShape(const ort::Api* api) : api(api) {}
  TypeAndShape(const TypeAndShape&) = delete;
  TypeAndShape& operator=(const TypeAndShape&) = delete;
  ~TypeAndShape() {
    if (pointer) ort::ReleaseTensorTypeAndShapeInfo(api, pointer);
  }
  const ort::Api* api;
  OrtTensorTypeAndShapeInfo* pointer = nullptr;
};

constexpr int kMaxRank = 16;

// An input's place in memory. One that is absent, or has no elements, has no data.
struct Tensor {
  const void* data = nullptr;
  ort::ElementType type = ort::kUndefined;
  int rank = 0;
  int64_t count = 0;
  int64_t dims[kMaxRank] = {};
  bool exists = false;

  const float* floats() const { return static_cast<const float*>(data); }
  const uint8_t* bytes() const { return static_cast<const uint8_t*>(data); }
};
std::string shape_text(const Tensor& tensor);

// The node that a kernel is created for.
struct Node {
  const ort::Api* api;
  const OrtKernelInfo* info;
  const char* op;

  // An attribute of type int; a missing one is an error unless it has a default.
  int64_t integer(const char* name) const;
  int64_t integer(const char* name, int64_t otherwise) const;
  // Whether input `index` is connected; it may still turn out to have no elements.
  bool has(size_t index) const;

 private:
  bool find(const char* name, int64_t* value) const;
};

// The inputs of a node. Those that are constant are read once, when the kernel is created.
class Inputs {
 public:
  Inputs(const Node& node, const char* const* names, size_t count);
  size_t count() const { return constants_.size(); }
  bool is_constant(size_t index) const { return constants_[index].exists; }
  const Tensor& constant(size_t index) const { return constants_[index]; }
  const char* name(size_t index) const { return names_[index]; }
  const char* op() const { return op_; }
  const ort::Api* api() const { return api_; }
  // Of one run: the constant, or what the run brings.
  Tensor get(const OrtKernelContext* context, size_t index) const;

 private:
  Tensor read(const OrtValue* value, size_t index) const;

  const ort::Api* api_;
  const char* op_;
  const char* const* names_;
  std::vector<Tensor> constants_;
};

// Rules that inputs share.
void check_type(const char* op, const char* name, const Tensor& tensor, ort::ElementType type);
void check_count(const char* op, const char* name, const Tensor& tensor, int64_t count);
void check_matrix(const char* op, const char* name, const Tensor& tensor, int64_t rows,
                  int64_t cols, const std::string& shape);
int64_t checked_product(const char* op, const char* name, int64_t a, int64_t b);
feinwerk_dtype core_dtype(const char* op, const char* name, ort::ElementType type);
inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Rows of x [..., K], K = cols at least 1: the product of all dimensions but the last.
int64_t rows_of(const char* op, const char* name, const Tensor& x, int64_t cols);
// Output 0 of `like`'s dimensions, `rank` of them, and then `last`; null when the node has none.
void* output(const ort::Api* api, OrtKernelContext* context, const Tensor& like, int rank,
             int64_t last);

}  // namespace feinwerk::onnx

#endif  // FEINWERK_ONNX_HOST_H_
