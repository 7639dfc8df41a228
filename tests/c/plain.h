// The operations once more in plain C, element by element: what the C ABI is compared with.
#ifndef FEINWERK_TESTS_C_PLAIN_H_
#define FEINWERK_TESTS_C_PLAIN_H_

#include <stddef.h>
#include <stdint.h>

#include "feinwerk/feinwerk.h"

extern const float plain_codebook[16];

size_t plain_size(feinwerk_dtype dtype);
float plain_load(const void* buffer, feinwerk_dtype dtype, int64_t index);
void plain_store(void* buffer, feinwerk_dtype dtype, int64_t index, float value);
float plain_round(float value, feinwerk_dtype dtype);
// The distance of neighbours of dtype around value.
double plain_ulp(double value, feinwerk_dtype dtype);

void plain_nf4_quantize(const void* weight, feinwerk_dtype dtype, int64_t count, int64_t blocksize,
                        feinwerk_rule rule, uint8_t* packed, float* absmax);
// The scale of one block, decoded when it is double-quantized.
float plain_nf4_absmax(const feinwerk_nf4_weight* weight, int64_t block);
// One element of the weight: codebook * absmax, rounded once to dtype.
float plain_nf4_element(const feinwerk_nf4_weight* weight, int64_t element, feinwerk_dtype dtype);

void plain_blockwise_quantize(const float* x, float offset, int center, int64_t count,
                              int64_t blocksize, const float* codebook, feinwerk_rule rule,
                              uint8_t* codes, float* absmax);

#endif  // FEINWERK_TESTS_C_PLAIN_H_
