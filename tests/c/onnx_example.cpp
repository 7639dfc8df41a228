// Runs an exported model in C++: ONNX Runtime by its C interface, Feinwerk's ops registered by
// path.
//
//   onnx_example LIBONNXRUNTIME LIBFEINWERK_ONNX MODEL ROWS COLS [ADAPTER]
//
// The model takes one float32 input [ROWS, COLS] and gives one float32 output; ADAPTER is an
// .onnx_adapter file. Prints the output's shape, then one value a line.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

const OrtApi* ort = nullptr;

// Linking with -lonnxruntime and calling OrtGetApiBase() does the same; here the path is an
// argument, so that the library of a Python package can be used.
void load_onnxruntime(const char* path) {
  void* library = dlopen(path, RTLD_NOW);  // for the life of the process
  if (!library) throw std::runtime_error(dlerror());
  void* entry = dlsym(library, "OrtGetApiBase");
  if (!entry) throw std::runtime_error(std::string(path) + " is not ONNX Runtime");
  const OrtApiBase* base = reinterpret_cast<const OrtApiBase* (*)()>(entry)();
  ort = base->GetApi(ORT_API_VERSION);
  if (!ort) {
    throw std::runtime_error("ONNX Runtime must be 1." + std::to_string(ORT_API_VERSION) +
                             " or newer, got " + base->GetVersionString());
  }
}

// Every call returns a status, which is null when all went well.
void check(OrtStatus* status) {
  if (!status) return;
  const std::string message = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  throw std::runtime_error(message);
}

template <typename T>
using Handle = std::unique_ptr<T, void (*)(T*)>;

// Calls create(..., &object) and returns what releases the object at the end of the scope.
template <typename T, typename... Parameters, typename... Arguments>
Handle<T> make(void (*release)(T*), OrtStatus* (*create)(Parameters...), Arguments... arguments) {
  T* object = nullptr;
  check(create(arguments..., &object));
  return Handle<T>(object, release);
}

using Name = OrtStatus* (*)(const OrtSession*, size_t, OrtAllocator*, char**);

std::string first_name(const OrtSession* session, Name name_of) {
  OrtAllocator* allocator = nullptr;
  check(ort->GetAllocatorWithDefaultOptions(&allocator));
  char* text = nullptr;
  check(name_of(session, 0, allocator, &text));
  const std::string name = text;
  check(ort->AllocatorFree(allocator, text));
  return name;
}

void print(OrtValue* value) {
  const auto info = make(ort->ReleaseTensorTypeAndShapeInfo, ort->GetTensorTypeAndShape, value);
  ONNXTensorElementDataType type;
  size_t dims = 0, count = 0;
  check(ort->GetTensorElementType(info.get(), &type));
  if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    throw std::runtime_error("the model's output must be float32, got element type " +
                             std::to_string(type));
  }
  check(ort->GetDimensionsCount(info.get(), &dims));
  std::vector<int64_t> shape(dims);
  check(ort->GetDimensions(info.get(), shape.data(), dims));
  check(ort->GetTensorShapeElementCount(info.get(), &count));
  void* data = nullptr;
  check(ort->GetTensorMutableData(value, &data));

  std::printf("shape");
  for (const int64_t size : shape) std::printf(" %lld", static_cast<long long>(size));
  std::printf("\n");
  // Nine digits: reading them gives the same float.
  for (size_t i = 0; i < count; ++i) std::printf("%.9g\n", static_cast<const float*>(data)[i]);
}

void run(const char* feinwerk, const char* model, int64_t rows, int64_t cols, const char* adapter) {
  if (rows < 0 || cols < 0) throw std::runtime_error("ROWS and COLS must be sizes");
  const auto env = make(ort->ReleaseEnv, ort->CreateEnv, ORT_LOGGING_LEVEL_WARNING, "example");
  const auto options = make(ort->ReleaseSessionOptions, ort->CreateSessionOptions);
  check(ort->SetIntraOpNumThreads(options.get(), 2));
  // ONNX Runtime loads the library and keeps it; its ops run on the session's threads.
  check(ort->RegisterCustomOpsLibrary_V2(options.get(), feinwerk));
  const auto session =
      make(ort->ReleaseSession, ort->CreateSession, env.get(), model, options.get());

  size_t inputs = 0, outputs = 0;
  check(ort->SessionGetInputCount(session.get(), &inputs));
  check(ort->SessionGetOutputCount(session.get(), &outputs));
  if (inputs != 1 || outputs != 1) {
    throw std::runtime_error("the model must have one input and one output, got " +
                             std::to_string(inputs) + " and " + std::to_string(outputs));
  }
  const std::string x_name = first_name(session.get(), ort->SessionGetInputName);
  const std::string y_name = first_name(session.get(), ort->SessionGetOutputName);

  std::vector<float> x(static_cast<size_t>(rows * cols));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(7 * i % 31) / 16 - 1;
  const std::vector<int64_t> shape = {rows, cols};
  const auto memory =
      make(ort->ReleaseMemoryInfo, ort->CreateCpuMemoryInfo, OrtArenaAllocator, OrtMemTypeDefault);
  // The value refers to x, which outlives it.
  const auto x_value = make(ort->ReleaseValue, ort->CreateTensorWithDataAsOrtValue, memory.get(),
                            static_cast<void*>(x.data()), x.size() * sizeof(float), shape.data(),
                            shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);

  // Adapters are switched by the options of a run; the session stays as it is.
  const auto run_options = make(ort->ReleaseRunOptions, ort->CreateRunOptions);
#if ORT_API_VERSION >= 20
  Handle<OrtLoraAdapter> active(nullptr, ort->ReleaseLoraAdapter);
  if (adapter) {
    active = make(ort->ReleaseLoraAdapter, ort->CreateLoraAdapter, adapter,
                  static_cast<OrtAllocator*>(nullptr));
    check(ort->RunOptionsAddActiveLoraAdapter(run_options.get(), active.get()));
  }
#else
  if (adapter) throw std::runtime_error("adapter files need the header of ONNX Runtime 1.20");
#endif

  const char* x_names[] = {x_name.c_str()};
  const char* y_names[] = {y_name.c_str()};
  const OrtValue* x_values[] = {x_value.get()};
  OrtValue* y = nullptr;
  check(ort->Run(session.get(), run_options.get(), x_names, x_values, 1, y_names, 1, &y));
  const Handle<OrtValue> y_value(y, ort->ReleaseValue);
  print(y_value.get());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6 || argc > 7) {
    std::fprintf(stderr, "usage: %s LIBONNXRUNTIME LIBFEINWERK_ONNX MODEL ROWS COLS [ADAPTER]\n",
                 argv[0]);
    return 2;
  }
  try {
    load_onnxruntime(argv[1]);
    run(argv[2], argv[3], std::atoll(argv[4]), std::atoll(argv[5]), argc == 7 ? argv[6] : nullptr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
