// The adapter operations of the C ABI on one case, compared with plain C.
#ifndef FEINWERK_TESTS_C_ADAPTER_CASES_H_
#define FEINWERK_TESTS_C_ADAPTER_CASES_H_

#include "context.h"

// lora_linear and its gradient over `nf4` and over dense weights of every dtype, with random
// adapters; exits with 1 unless every value is right.
void check_adapters(context* run, const feinwerk_nf4_weight* nf4);

#endif  // FEINWERK_TESTS_C_ADAPTER_CASES_H_
