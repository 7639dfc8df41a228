// Random sizes, dtypes and options, the same ones on every run: fuzz [iterations] [seed].
// Built with AddressSanitizer it shows that nothing outside a buffer is touched.
#include <stdio.h>
#include <stdlib.h>

#include "cases.h"

static int64_t below(uint64_t* random, int64_t limit) {
  return (int64_t)(next_random(random) % (uint64_t)limit);
}

int main(int argc, char** argv) {
  const long iterations = argc > 1 ? strtol(argv[1], NULL, 10) : 40;
  uint64_t random = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
  for (long i = 0; i < iterations; ++i) {
    const int wide = below(&random, 8) == 0;    // now and then past a tile in every direction
    const int vector = below(&random, 4) == 0;  // shapes that the matrix-vector kernels take
    const test_case test = {
        .m = vector ? 1 + below(&random, 6) : below(&random, wide ? 80 : 20),
        .n = below(&random, wide ? 90 : 40),
        .k = vector ? 64 * (1 + below(&random, 6)) : below(&random, wide ? 700 : 300),
        .blocksize = (int64_t)32 << below(&random, 8),
        .dtype = (feinwerk_dtype)below(&random, 3),
        .nested = (int)below(&random, 2),
        .shift = (int)below(&random, 2),
        .threads = 1 + below(&random, 4),
        .seed = next_random(&random),
    };
    check_case_on_every_isa(&test);
  }
  printf("fuzz: %ld cases passed on every instruction set\n", iterations);
  return 0;
}
