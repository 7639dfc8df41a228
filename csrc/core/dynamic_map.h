// The two 8-bit dynamic maps of optimizer states, with what encodes into them.
#ifndef FEINWERK_CORE_DYNAMIC_MAP_H_
#define FEINWERK_CORE_DYNAMIC_MAP_H_

#include "core/kernel_table.h"

namespace feinwerk {

// [0] signed, for exp_avg; [1] unsigned, for exp_avg_sq. Made at first use.
const DynamicMap (&dynamic_maps())[2];

}  // namespace feinwerk

#endif  // FEINWERK_CORE_DYNAMIC_MAP_H_
