// What one run of a case shares: its sizes, its buffers of the exact size, its random data, and how
// results are compared.
#ifndef FEINWERK_TESTS_C_CONTEXT_H_
#define FEINWERK_TESTS_C_CONTEXT_H_

#include "cases.h"
#include "plain.h"

enum { kMaxBuffers = 512 };

extern const feinwerk_dtype kDtypes[3];

typedef struct context {
  const test_case* test;
  const char* isa;
  const char* step; /* what is being checked, for messages */
  uint64_t random;
  feinwerk_executor executor;
  void* buffers[kMaxBuffers];
  int buffer_count;
} context;

void fail(const context* run, const char* what, int64_t index, double got, double want);
void expect_ok(const context* run, feinwerk_status status);

// `count` elements that end where the heap block ends, so that ASan sees one byte too far. Filled
// with 0xff: NaN to the floating-point types, so an element left unwritten is noticed.
void* take(context* run, int64_t count, size_t element);
void* take_workspace(context* run, int64_t bytes);
void free_buffers(context* run, int keep);  // all but the first ones

int64_t below(context* run, int64_t limit);  // in [0, limit)
float uniform(context* run);                 // in (-1, 1)
// Roughly normal, a zero stretch and an outlier here and there.
void* random_values(context* run, int64_t count, feinwerk_dtype dtype);
double* widen(context* run, const void* values, feinwerk_dtype dtype, int64_t count);

void same_bytes(context* run, const char* what, const void* got, const void* want, int64_t bytes);
// Each value within its budget and one ulp of the largest: `got` was rounded once to dtype.
void check_values(context* run, const char* what, const void* got, feinwerk_dtype dtype,
                  const double* want, const double* budget, int64_t count);
// How far a sum of `depth` products may be off in fp32 when their sizes add up to `size`.
double sum_error(int64_t depth, double size);
// What rounding x to 8 bits per 64 elements, and the codebook to 8 bits, may add to each y.
double* int8_slack(context* run, const void* x, const feinwerk_nf4_weight* weight,
                   const double* dense);

#endif  // FEINWERK_TESTS_C_CONTEXT_H_
