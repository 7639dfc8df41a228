// Checks every size and pointer of an operation before anything is read through them.
#ifndef FEINWERK_CORE_VALIDATE_H_
#define FEINWERK_CORE_VALIDATE_H_

#include "feinwerk/feinwerk.h"

namespace feinwerk {

int64_t ceil_div(int64_t a, int64_t b);

void check_dtype(const char* op, const char* name, feinwerk_dtype dtype);
void check_count(const char* op, const char* name, int64_t got, int64_t want);
// A buffer of `count` > 0 elements must not be null.
void check_buffer(const char* op, const char* name, const void* pointer, int64_t count);
void check_nf4_blocksize(const char* op, int64_t blocksize);
void check_rule(const char* op, feinwerk_rule rule);
void check_weight(const char* op, const feinwerk_nf4_weight& weight);
void check_weight(const char* op, const feinwerk_weight& weight);
// The product of two sizes; fails when either is negative or the product passes 2^62.
int64_t checked_product(const char* op, const char* name, int64_t a, int64_t b);

}  // namespace feinwerk

#endif  // FEINWERK_CORE_VALIDATE_H_
