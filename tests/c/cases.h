// Runs every operation of the C ABI on one set of sizes and compares it with plain C.
#ifndef FEINWERK_TESTS_C_CASES_H_
#define FEINWERK_TESTS_C_CASES_H_

#include <stdint.h>

#include "feinwerk/feinwerk.h"

typedef struct test_case {
  int64_t m, n, k, blocksize;
  feinwerk_dtype dtype;
  int nested;      /* double quantization */
  int shift;       /* 1: buffers start one element past an aligned address */
  int64_t rank;    /* of the first adapter; 0: random */
  int64_t threads; /* more than 1: tasks run through an executor, the last first */
  uint64_t seed;
} test_case;

/* A deterministic stream of 64 random bits. */
uint64_t next_random(uint64_t* state);

/* Prints what differs and exits with 1 unless every operation gives the right values. */
void check_case(const test_case* test);

/* check_case on every ISA that this CPU has. */
void check_case_on_every_isa(const test_case* test);

#endif /* FEINWERK_TESTS_C_CASES_H_ */
