// The part of ONNX Runtime's C interface that the custom-op library uses, declared by ourselves:
// its headers come in no package that a build could depend on.
//
// The interface is a table of functions that only ever grows at its end, so an entry's place and
// signature are a contract for all versions from the one that brought it. Everything here is in
// version 17 (ONNX Runtime 1.17); tests/onnx/test_onnx_abi.py compares the numbers with the real
// header where a package that has it can be downloaded.
#ifndef FEINWERK_ONNX_ORT_ABI_H_
#define FEINWERK_ONNX_ORT_ABI_H_

#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtStatus;
struct OrtValue;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtOpAttr;
}

namespace feinwerk::ort {

constexpr uint32_t kApiVersion = 17;
constexpr int kApiEntries = 276;  // of version 17

// The table; only Entry below reads it.
struct Api {
  void* entries[kApiEntries];
};

// What a library gets at registration. get_api returns null for a version that the runtime lacks.
struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// ONNXTensorElementDataType
enum ElementType : int32_t {
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt64 = 7,
  kFloat16 = 10,
  kBfloat16 = 16
};
// OrtErrorCode
enum ErrorCode : int32_t {
  kFail = 1,
  kInvalidArgument = 2,
  kRuntimeException = 6,
  kNotImplemented = 9
};
// OrtCustomOpInputOutputCharacteristic
enum Characteristic : int32_t { kRequired = 0, kOptional = 1 };
// OrtOpAttrType
enum AttributeType : int32_t { kAttributeInt = 1 };

// OrtCustomOp of version 17: what ONNX Runtime asks of an operator. `self` is the struct itself;
// where both forms of a function exist, the second, which returns a status, is used.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp* self, const Api* api, const OrtKernelInfo* info);
  const char* (*get_name)(const CustomOp* self);
  const char* (*get_provider)(const CustomOp* self);
  ElementType (*get_input_type)(const CustomOp* self, size_t index);
  size_t (*get_input_count)(const CustomOp* self);
  ElementType (*get_output_type)(const CustomOp* self, size_t index);
  size_t (*get_output_count)(const CustomOp* self);
  void (*compute)(void* kernel, OrtKernelContext* context);
  void (*destroy_kernel)(void* kernel);
  Characteristic (*get_input_characteristic)(const CustomOp* self, size_t index);
  Characteristic (*get_output_characteristic)(const CustomOp* self, size_t index);
  int32_t (*get_input_memory_type)(const CustomOp* self, size_t index);  // 0: where the op runs
  int32_t (*get_variadic_input_min_arity)(const CustomOp* self);
  int32_t (*get_variadic_input_homogeneity)(const CustomOp* self);
  int32_t (*get_variadic_output_min_arity)(const CustomOp* self);
  int32_t (*get_variadic_output_homogeneity)(const CustomOp* self);
  OrtStatus* (*create_kernel_v2)(const CustomOp* self, const Api* api, const OrtKernelInfo* info,
                                 void** kernel);
  OrtStatus* (*compute_v2)(void* kernel, OrtKernelContext* context);
  OrtStatus* (*infer_output_shape)(const CustomOp* self, OrtShapeInferContext* context);
  int32_t (*get_start_version)(const CustomOp* self);
  int32_t (*get_end_version)(const CustomOp* self);
};

// One function of the table, by its place and type.
template <int place, class Function>
struct Entry;
template <int place, class Result, class... Arguments>
struct Entry<place, Result(Arguments...)> {
  static_assert(place < kApiEntries);
  Result operator()(const Api* api, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(api->entries[place])(arguments...);
  }
};

// clang-format off
inline constexpr Entry<0, OrtStatus*(int32_t code, const char* message)> CreateStatus;
inline constexpr Entry<26, OrtStatus*(const char* name, OrtCustomOpDomain** out)> CreateCustomOpDomain;
inline constexpr Entry<27, OrtStatus*(OrtCustomOpDomain*, const CustomOp*)> CustomOpDomain_Add;
inline constexpr Entry<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> AddCustomOpDomain;
// GetTensorMutableData takes no const: the data of an input is only read.
inline constexpr Entry<51, OrtStatus*(OrtValue*, void** out)> GetTensorMutableData;
inline constexpr Entry<57, OrtStatus*(OrtTensorTypeAndShapeInfo** out)> CreateTensorTypeAndShapeInfo;
inline constexpr Entry<58, OrtStatus*(OrtTensorTypeAndShapeInfo*, int32_t type)> SetTensorElementType;
inline constexpr Entry<59, OrtStatus*(OrtTensorTypeAndShapeInfo*, const int64_t* dims, size_t count)> SetDimensions;
inline constexpr Entry<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int32_t* out)> GetTensorElementType;
inline constexpr Entry<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t* out)> GetDimensionsCount;
inline constexpr Entry<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t count)> GetDimensions;
inline constexpr Entry<63, OrtStatus*(const OrtTensorTypeAndShapeInfo*, const char** names, size_t count)> GetSymbolicDimensions;
inline constexpr Entry<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo** out)> GetTensorTypeAndShape;
inline constexpr Entry<85, OrtStatus*(const OrtKernelInfo*, const char* name, float* out)> KernelInfoGetAttribute_float;
inline constexpr Entry<86, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t* out)> KernelInfoGetAttribute_int64;
inline constexpr Entry<87, OrtStatus*(const OrtKernelInfo*, const char* name, char* out, size_t* size)> KernelInfoGetAttribute_string;
inline constexpr Entry<90, OrtStatus*(const OrtKernelContext*, size_t index, const OrtValue** out)> KernelContext_GetInput;
inline constexpr Entry<91, OrtStatus*(OrtKernelContext*, size_t index, const int64_t* dims, size_t count, OrtValue** out)> KernelContext_GetOutput;
inline constexpr Entry<93, void(OrtStatus*)> ReleaseStatus;
inline constexpr Entry<99, void(OrtTensorTypeAndShapeInfo*)> ReleaseTensorTypeAndShapeInfo;
inline constexpr Entry<130, OrtStatus*(OrtSessionOptions*, const char* key, const char* value)> AddSessionConfigEntry;
inline constexpr Entry<162, OrtStatus*(const OrtKernelInfo*, const char* name, float* out, size_t* size)> KernelInfoGetAttributeArray_float;
inline constexpr Entry<163, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t* out, size_t* size)> KernelInfoGetAttributeArray_int64;
inline constexpr Entry<230, OrtStatus*(const OrtKernelInfo*, size_t* out)> KernelInfo_GetInputCount;
inline constexpr Entry<232, OrtStatus*(const OrtKernelInfo*, size_t index, char* out, size_t* size)> KernelInfo_GetInputName;
inline constexpr Entry<237, OrtStatus*(const OrtSessionOptions*, const char* key, int32_t* out)> HasSessionConfigEntry;
inline constexpr Entry<249, OrtStatus*(const OrtKernelInfo*, size_t index, int32_t* is_constant, const OrtValue** out)> KernelInfoGetConstantInput_tensor;
inline constexpr Entry<267, OrtStatus*(const OrtShapeInferContext*, size_t* out)> ShapeInferContext_GetInputCount;
inline constexpr Entry<268, OrtStatus*(const OrtShapeInferContext*, size_t index, OrtTensorTypeAndShapeInfo** out)> ShapeInferContext_GetInputTypeShape;
inline constexpr Entry<269, OrtStatus*(const OrtShapeInferContext*, const char* name, const OrtOpAttr** out)> ShapeInferContext_GetAttribute;
inline constexpr Entry<270, OrtStatus*(const OrtShapeInferContext*, size_t index, const OrtTensorTypeAndShapeInfo*)> ShapeInferContext_SetOutputTypeShape;
inline constexpr Entry<271, OrtStatus*(OrtTensorTypeAndShapeInfo*, const char** names, size_t count)> SetSymbolicDimensions;
inline constexpr Entry<272, OrtStatus*(const OrtOpAttr*, int32_t type, void* data, size_t size, size_t* out)> ReadOpAttr;
inline constexpr Entry<274, OrtStatus*(const OrtKernelContext*, void (*fn)(void*, size_t), size_t total, size_t batches, void*)> KernelContext_ParallelFor;
// clang-format on

}  // namespace feinwerk::ort

#endif  // FEINWERK_ONNX_ORT_ABI_H_
