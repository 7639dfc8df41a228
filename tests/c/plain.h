// The operations once more in plain C, element by element: what the C ABI is compared with.
// plain.c has NF4 and the 8-bit codes, plain_adapters.c the adapters, in doubles, plain_adamw.c the
// optimizer.
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

// Rows of row_length elements, which blocks do not cross.
void plain_blockwise_quantize(const float* x, float offset, int center, int64_t count,
                              int64_t row_length, int64_t blocksize, const float* codebook,
                              feinwerk_rule rule, uint8_t* codes, float* absmax);

void plain_dynamic_map(int is_signed, float map[256]);
void plain_adamw_step(const feinwerk_adamw_step_args* args);
// Adds to limbs[FEINWERK_SQUARE_SUM_LENGTH].
void plain_square_sum(const feinwerk_rows* rows, int64_t* limbs);

// Philox4x32-10.
void plain_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]);
// What dropout multiplies element (row, column) by.
double plain_dropout(const feinwerk_dropout* dropout, int64_t row, int64_t column);

// A result in doubles. `size` is the sum of |terms| of the products that a value is the sum of:
// arithmetic is off by a small multiple of it.
typedef struct plain_result {
  double *value, *size;
} plain_result;

// || W + scaling B A || row by row, squared in `size`: the sum of (|W| + |scaling| |B| |A|)^2.
// Of what the halves of A in bf16 lose only the products with W know: *cross is their part.
void plain_weight_norm(const feinwerk_adapter* adapter, const double* weight, int64_t n, int64_t k,
                       plain_result norm, double* cross);
// y [m, n] and S [m, s_cols] of a call whose weight is `weight` in doubles; DoRA divides by
// weight_norm as it stands. S is left alone where no adapter has a rank.
void plain_lora_linear(const feinwerk_lora_linear_args* args, const double* weight, plain_result y,
                       plain_result s);
// The gradients. `scaled` [m, k] is the part of grad_x's size that went through W after DoRA's
// gain, and `lost` [adapters][n] what rounding y, as it is given, makes of grad_magnitude.
typedef struct plain_gradients {
  plain_result x, bias;                   // [m, k], [n]
  plain_result A[4], B[4], magnitude[4];  // as in feinwerk_adapter
  double *scaled, *lost[4];
} plain_gradients;
void plain_lora_linear_backward(const feinwerk_lora_linear_backward_args* args,
                                const double* weight, const plain_gradients* out);

#endif  // FEINWERK_TESTS_C_PLAIN_H_
