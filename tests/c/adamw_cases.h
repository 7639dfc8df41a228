// adamw_step and square_sum of the C ABI on one case, compared with plain C.
#ifndef FEINWERK_TESTS_C_ADAMW_CASES_H_
#define FEINWERK_TESTS_C_ADAMW_CASES_H_

#include "context.h"

// A few steps over lists of parameters, with every kind of parameter and of state; exits with 1
// unless every bit is right.
void check_adamw(context* run);
// Tensors of all kinds of shapes in one sum.
void check_square_sum(context* run);

#endif  // FEINWERK_TESTS_C_ADAMW_CASES_H_
