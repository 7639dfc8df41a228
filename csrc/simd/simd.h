// The vocabulary of the kernels: each instruction set says these words its own way.
//
//   kWidth                     floats in a vector F; int32 lanes in I
//   zero set1 load store add mul fma          fp32 arithmetic (fma may round twice on `scalar`)
//   sub div square_root        the same, each rounded once
//   absolute max_number(x, most) reduce_max    max_number is `most` where x is NaN
//   load_bf16 load_f16 store_bf16 store_f16   conversions, round to nearest even, NaN stays NaN
//   abs_bits max_bits reduce_max_bits    magnitudes as int32: NaN > infinity > finite
//   reduce_add                 sum of the lanes, in a fixed order
//   Table16 table16 scale round_bf16 round_f16   16 values, looked up by the low 4 bits of a lane
//   decode(table, p)           kWidth elements in natural order from kWidth / 2 packed bytes
//   load_dwords(p)             kWidth dwords of packed bytes: 8 codes a lane
//   load_half_dwords(p)        kWidth / 2 of them, and zeros in the upper lanes
//   decode_nibble<j>(table, v) lane i: the element at bits [4j, 4j+4) of dword i
//   spread8(p, c)              lane i: p[(c * kWidth + i) / 8], one value per 64 codes
//   nf4_code<nan_high>(x, thresholds)  how many thresholds x exceeds; NaN gives 15 or 0
//   code_bins(thresholds) nf4_code_in_bins(x, bins)    the same for finite x in [-1, 1]
//   store_codes(p, codes)      packs kWidth codes into kWidth / 2 bytes
//   transpose(rows)            a kWidth x kWidth matrix of dwords in place
//   dot_codes(acc, table8, v, x_high, x_low)   8 products of signed bytes a lane (see kBias8)
//   set1_words store_words xor_words multiply_words(a, b, high, low)   lanes as unsigned words
//   kMicroRows kMicroVectors   the register tile of the matrix product
//
// AVX-512 adds decode32_bf16 (32 codes to bf16 at once) and pack_bytes<k> (byte k of 64 dwords);
// with VBMI ByteTables (256 floats, looked up by 64 bytes), under FEINWERK_BYTE_TABLES; with BF16
// or AMX flags also the words of their dot products, under FEINWERK_BF16_DOT and FEINWERK_AMX.
// Everything lives in an unnamed namespace: an inline function shared between objects built with
// different flags could be picked by the linker for a CPU that cannot run it.
#ifndef FEINWERK_SIMD_SIMD_H_
#define FEINWERK_SIMD_SIMD_H_

#include <stdint.h>
#include <string.h>

// The build names the instruction set; 1 when it is `scalar` (an undefined name counts as 0).
#define FEINWERK_JOIN_(a, b) a##b
#define FEINWERK_JOIN(a, b) FEINWERK_JOIN_(a, b)
#define FEINWERK_NAMED_scalar 1

#if FEINWERK_JOIN(FEINWERK_NAMED_, FEINWERK_ISA_NAME)
#include "simd/scalar.h"
#elif defined(__AVX512BW__)
#include "simd/avx512.h"
#elif defined(__AVX2__)
#include "simd/avx2.h"
#elif defined(__ARM_NEON)
#include "simd/neon.h"
#endif

#endif  // FEINWERK_SIMD_SIMD_H_
