// Chooses the instruction set: the last supported one of the list, or the one that is forced.
#include "core/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/cpu_features.h"
#include "core/status.h"

namespace feinwerk {

namespace {

const Isa kIsas[] = {
    {"scalar", &scalar::kTable, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &avx2::kTable, cpu_has_avx2},
    {"avx512", &avx512::kTable, cpu_has_avx512},
    {"avx512_vnni", &avx512_vnni::kTable, cpu_has_avx512_vnni},
    {"avx512_bf16", &avx512_bf16::kTable, cpu_has_avx512_bf16},
    {"amx", &amx::kTable, cpu_has_amx},
#elif defined(__aarch64__)
    {"neon", &neon::kTable, cpu_has_neon},
#endif
};
constexpr int64_t kIsaCount = static_cast<int64_t>(sizeof(kIsas) / sizeof(kIsas[0]));

std::atomic<const Isa*> active{nullptr};

std::string names() {
  std::string list;
  for (const Isa& isa : kIsas) list += std::string(list.empty() ? "" : ", ") + isa.name;
  return list;
}

const Isa& find(const char* source, const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) != 0) continue;
    if (!isa.supported())
      throw Failure{FEINWERK_UNSUPPORTED, std::string(source) + ": this CPU lacks " + name};
    return isa;
  }
  invalid(source, "the instruction set", "be one of " + names(), name);
}

const Isa& default_isa() {
  const char* forced = std::getenv("FEINWERK_ISA");
  if (forced && *forced) return find("FEINWERK_ISA", forced);
  const Isa* best = &kIsas[0];
  for (const Isa& isa : kIsas)
    if (isa.supported()) best = &isa;
  return *best;
}

const Isa& active_isa() {
  const Isa* isa = active.load(std::memory_order_acquire);
  if (!isa) {
    isa = &default_isa();
    active.store(isa, std::memory_order_release);
  }
  return *isa;
}

}  // namespace

const KernelTable& active_table() { return *active_isa().table; }

}  // namespace feinwerk

int64_t feinwerk_isa_count(void) { return feinwerk::kIsaCount; }

const char* feinwerk_isa_name(int64_t index) {
  return index >= 0 && index < feinwerk::kIsaCount ? feinwerk::kIsas[index].name : nullptr;
}

int32_t feinwerk_isa_available(int64_t index) {
  return index >= 0 && index < feinwerk::kIsaCount && feinwerk::kIsas[index].supported() ? 1 : 0;
}

feinwerk_status feinwerk_active_isa(const char** name) {
  return feinwerk::guarded([&] {
    if (!name) feinwerk::invalid("active_isa", "name", "not be null", "null");
    *name = feinwerk::active_isa().name;
  });
}

feinwerk_status feinwerk_force_isa(const char* name) {
  return feinwerk::guarded([&] {
    feinwerk::active = name ? &feinwerk::find("force_isa", name) : &feinwerk::default_isa();
  });
}
