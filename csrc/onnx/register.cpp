// RegisterCustomOps: the only function that the library shows, called by ONNX Runtime when a
// session option names the library.
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#include "onnx/op.h"

namespace feinwerk::onnx {

namespace {

// The operators as one copy of ONNX Runtime knows them. A process may have two copies (the Python
// package's and one that another library brings), each with its own table.
struct Registration {
  const ort::Api* api;
  OrtCustomOpDomain* domain;
};

// Never destroyed, as sessions refer to domain and structs until the process ends; the library is
// linked so that it stays loaded (-z nodelete).
struct Registry {
  std::mutex mutex;
  std::vector<Registration> all;
};

// Before 1.24 ONNX Runtime reads a null pointer when an operator with a shape function has an
// absent input between others. There it gets none: shapes stay unknown until a run, results are the
// same.
bool infers_shapes(const char* version) {
  char* end = nullptr;
  const long major = std::strtol(version, &end, 10);
  const long minor = *end == '.' ? std::strtol(end + 1, nullptr, 10) : 0;
  return major > 1 || (major == 1 && minor >= 24);
}

OrtCustomOpDomain* make_domain(const ort::Api* api, const char* version) {
  OpStructs ops;
  const bool infers = infers_shapes(version);
  add_nf4_linear(api, infers, &ops);
  add_nf4_lora_linear(api, infers, &ops);
  add_lora_linear(api, infers, &ops);
  add_nf4_embedding(api, infers, &ops);
  OrtCustomOpDomain* domain = nullptr;
  require(api, ort::CreateCustomOpDomain(api, "feinwerk", &domain));
  for (const OpStruct* const op : ops) require(api, ort::CustomOpDomain_Add(api, domain, op));
  return domain;
}

OrtCustomOpDomain* domain_of(const ort::Api* api, const char* version) {
  static Registry* const registry = new Registry;
  const std::lock_guard<std::mutex> lock(registry->mutex);
  for (const Registration& registration : registry->all)
    if (registration.api == api) return registration.domain;
  registry->all.push_back({api, make_domain(api, version)});
  return registry->all.back().domain;
}

// CreateStatus is the first entry of every version: enough to say that a runtime is too old.
OrtStatus* too_old(const ort::ApiBase* base) {
  const std::string message =
      std::string("feinwerk: onnxruntime must be 1.17 or newer, got ") + base->get_version();
  for (uint32_t version = ort::kApiVersion; version-- > 1;)
    if (const ort::Api* const api = base->get_api(version))
      return ort::CreateStatus(api, ort::kFail, message.c_str());
  return nullptr;
}

}  // namespace

}  // namespace feinwerk::onnx

extern "C" FEINWERK_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                     const feinwerk::ort::ApiBase* base) {
  using namespace feinwerk;
  const ort::Api* const api = base->get_api(ort::kApiVersion);
  if (!api) return onnx::too_old(base);
  return onnx::guarded(api, [&] {
    // An unknown FEINWERK_ISA is said here, not in the middle of a run.
    const char* isa = nullptr;
    onnx::require(feinwerk_active_isa(&isa));
    // A domain may be added once; the options themselves remember it, and so do their copies.
    constexpr const char* kMark = "feinwerk.registered";
    int32_t registered = 0;
    onnx::require(api, ort::HasSessionConfigEntry(api, options, kMark, &registered));
    if (registered) return;
    OrtCustomOpDomain* const domain = onnx::domain_of(api, base->get_version());
    onnx::require(api, ort::AddCustomOpDomain(api, options, domain));
    onnx::require(api, ort::AddSessionConfigEntry(api, options, kMark, "1"));
  });
}
