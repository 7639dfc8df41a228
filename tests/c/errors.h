// What the tests of errors share: a small quantized weight that they break in turn, and macros that
// say what is rejected with which message.
#ifndef FEINWERK_TESTS_C_ERRORS_H_
#define FEINWERK_TESTS_C_ERRORS_H_

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "feinwerk/feinwerk.h"

enum { kRows = 6, kCols = 50, kCount = kRows * kCols, kBlocks = (kCount + 63) / 64, kM = 3 };

extern int checks;

#define CHECK(condition)                                                     \
  do {                                                                       \
    ++checks;                                                                \
    if (!(condition)) {                                                      \
      fprintf(stderr, "FAILED %s:%d: %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                               \
    }                                                                        \
  } while (0)

void expect_at(const char* file, int line, feinwerk_status want, const char* message,
               feinwerk_status got);
#define expect(line, want, message, got) expect_at(__FILE__, line, want, message, got)

// Copies the arguments `good` of an operation, breaks one field and expects "<op>: <message>...".
#define REJECTS(op, good, field, value, message)                                              \
  do {                                                                                        \
    feinwerk_##op##_args bad = good;                                                          \
    bad.field = value;                                                                        \
    expect(__LINE__, FEINWERK_INVALID_ARGUMENT, #op ": " message, feinwerk_##op(&bad, NULL)); \
  } while (0)

#define ACCEPTS(call) expect(__LINE__, FEINWERK_OK, NULL, call)

// The rules of a weight hold in every operation that takes one; `w` is the field that it is in.
#define TEST_WEIGHT_ERRORS(op, args, w)                                                  \
  do {                                                                                   \
    feinwerk_##op##_args base = args;                                                    \
    ACCEPTS(feinwerk_##op(&base, NULL));                                                 \
    expect(__LINE__, FEINWERK_INVALID_ARGUMENT, #op ": args must not be null",           \
           feinwerk_##op(NULL, NULL));                                                   \
    REJECTS(op, base, w.packed, NULL, "packed must not be null");                        \
    REJECTS(op, base, w.packed_bytes, 149, "packed_bytes must be 150");                  \
    REJECTS(op, base, w.packed_bytes, 300, "packed_bytes must be 150");                  \
    REJECTS(op, base, w.absmax, NULL, "absmax must not be null");                        \
    REJECTS(op, base, w.absmax_count, 4, "absmax_count must be 5, got 4");               \
    REJECTS(op, base, w.absmax_codes, codes, "absmax must be given either");             \
    REJECTS(op, base, w.blocksize, 96, "blocksize must be a power of two");              \
    REJECTS(op, base, w.rows, -1, "rows x cols must not be negative");                   \
    REJECTS(op, base, w.cols, -1, "rows x cols must not be negative");                   \
    REJECTS(op, base, w.rows, INT64_MAX, "rows x cols must stay below");                 \
    REJECTS(op, base, w.rows, kRows + 1, "packed_bytes must be 175");                    \
    REJECTS(op, base, dtype, (feinwerk_dtype)7, "dtype must be float32");                \
    REJECTS(op, base, dtype, (feinwerk_dtype) - 1, "dtype must be float32");             \
    base.w = nested_weight();                                                            \
    ACCEPTS(feinwerk_##op(&base, NULL));                                                 \
    REJECTS(op, base, w.nested_absmax, NULL, "nested_absmax must not be");               \
    REJECTS(op, base, w.nested_codebook, NULL, "nested_codebook must not");              \
    REJECTS(op, base, w.nested_offset, NULL, "nested_offset must not be");               \
    REJECTS(op, base, w.nested_absmax_count, 2, "nested_absmax_count must be 1, got 2"); \
  } while (0)

extern float values[kCount], absmax[kBlocks], x[kM * kCols], y[kM * kCols], out[kM * kCols * 8];
extern float nested_absmax[1], nested_codebook[256], nested_offset[1], bias[kRows];
extern uint8_t packed[kCount / 2], codes[kCount];
extern int64_t indices[kM];

feinwerk_nf4_weight plain_weight(void);
feinwerk_nf4_weight nested_weight(void);
void* workspace(int64_t bytes);

// adapter_errors.c and adamw_errors.c: everything wrong in a call of their operations.
void test_adapter_errors(void);
void test_adamw_errors(void);
void test_square_sum_errors(void);

#endif  // FEINWERK_TESTS_C_ERRORS_H_
