// The ordered list of instruction sets and the choice among them.
#ifndef FEINWERK_CORE_DISPATCH_H_
#define FEINWERK_CORE_DISPATCH_H_

#include "core/kernel_table.h"

namespace feinwerk {

struct Isa {
  const char* name;
  const KernelTable* table;
  bool (*supported)();
};

// The table in use; throws Failure when FEINWERK_ISA names an unknown or unsupported one.
const KernelTable& active_table();

}  // namespace feinwerk

#endif  // FEINWERK_CORE_DISPATCH_H_
