/* A stand-in for ONNX Runtime's header of the same name, with what tests/c/onnx_example.cpp uses.
 *
 * The onnxruntime wheel brings the shared library but no header. A program of your own includes the
 * official one, of an ONNX Runtime release, and compiles unchanged. OrtApi is a table of function
 * pointers that only ever grows at its end, so that a member's place, its slot, is the same in
 * every version; unnamed slots are left out here. tests/onnx/test_onnx_example.py checks the
 * places.
 */
#ifndef FEINWERK_TESTS_ONNXRUNTIME_C_API_H_
#define FEINWERK_TESTS_ONNXRUNTIME_C_API_H_

#include <stddef.h>
#include <stdint.h>

/* The interface that GetApi is asked for: ONNX Runtime 1.20, the first with adapter files. */
#define ORT_API_VERSION 20

#ifdef __cplusplus
extern "C" {
#endif

typedef struct OrtStatus OrtStatus;
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtValue OrtValue;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtLoraAdapter OrtLoraAdapter;

typedef enum OrtLoggingLevel { ORT_LOGGING_LEVEL_WARNING = 2 } OrtLoggingLevel;
typedef enum OrtAllocatorType { OrtArenaAllocator = 1 } OrtAllocatorType;
typedef enum OrtMemType { OrtMemTypeDefault = 0 } OrtMemType;
typedef enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1
} ONNXTensorElementDataType;

typedef struct OrtApi {
  void* slots_0_1[2];
  const char* (*GetErrorMessage)(const OrtStatus* status);
  OrtStatus* (*CreateEnv)(OrtLoggingLevel level, const char* name, OrtEnv** out);
  void* slots_4_6[3];
  OrtStatus* (*CreateSession)(const OrtEnv* env, const char* path, const OrtSessionOptions* options,
                              OrtSession** out);
  void* slot_8;
  OrtStatus* (*Run)(OrtSession* session, const OrtRunOptions* options,
                    const char* const* input_names, const OrtValue* const* inputs, size_t inputs_n,
                    const char* const* output_names, size_t outputs_n, OrtValue** outputs);
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions** out);
  void* slots_11_23[13];
  OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions* options, int threads);
  void* slots_25_29[5];
  OrtStatus* (*SessionGetInputCount)(const OrtSession* session, size_t* out);
  OrtStatus* (*SessionGetOutputCount)(const OrtSession* session, size_t* out);
  void* slots_32_35[4];
  OrtStatus* (*SessionGetInputName)(const OrtSession* session, size_t index,
                                    OrtAllocator* allocator, char** out);
  OrtStatus* (*SessionGetOutputName)(const OrtSession* session, size_t index,
                                     OrtAllocator* allocator, char** out);
  void* slot_38;
  OrtStatus* (*CreateRunOptions)(OrtRunOptions** out);
  void* slots_40_48[9];
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo* info, void* data, size_t bytes,
                                               const int64_t* shape, size_t dims,
                                               ONNXTensorElementDataType type, OrtValue** out);
  void* slot_50;
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** out);
  void* slots_52_59[8];
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info,
                                     ONNXTensorElementDataType* out);
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* values,
                              size_t values_n);
  void* slot_63;
  OrtStatus* (*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** out);
  void* slots_66_68[3];
  OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType type, OrtMemType memory, OrtMemoryInfo** out);
  void* slots_70_75[6];
  OrtStatus* (*AllocatorFree)(OrtAllocator* allocator, void* data);
  void* slot_77;
  OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator** out);
  void* slots_79_91[13];
  void (*ReleaseEnv)(OrtEnv* value);
  void (*ReleaseStatus)(OrtStatus* value);
  void (*ReleaseMemoryInfo)(OrtMemoryInfo* value);
  void (*ReleaseSession)(OrtSession* value);
  void (*ReleaseValue)(OrtValue* value);
  void (*ReleaseRunOptions)(OrtRunOptions* value);
  void* slot_98;
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* value);
  void (*ReleaseSessionOptions)(OrtSessionOptions* value);
  void* slots_101_227[127];
  OrtStatus* (*RegisterCustomOpsLibrary_V2)(OrtSessionOptions* options, const char* path);
  void* slots_229_279[51];
  OrtStatus* (*CreateLoraAdapter)(const char* path, OrtAllocator* allocator, OrtLoraAdapter** out);
  void* slot_281;
  void (*ReleaseLoraAdapter)(OrtLoraAdapter* value);
  OrtStatus* (*RunOptionsAddActiveLoraAdapter)(OrtRunOptions* options,
                                               const OrtLoraAdapter* adapter);
} OrtApi;

typedef struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)(void);
} OrtApiBase;

#ifdef __cplusplus
}
#endif

#endif /* FEINWERK_TESTS_ONNXRUNTIME_C_API_H_ */
