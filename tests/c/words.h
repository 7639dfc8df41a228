// The two vocabularies under test_simd_words.cpp, whether the CPU has them, comparisons of what
// they say, and inputs.
#ifndef FEINWERK_TESTS_C_WORDS_H_
#define FEINWERK_TESTS_C_WORDS_H_

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <initializer_list>

#include "core/codebook.h"
#include "feinwerk/feinwerk.h"

namespace meaning {
#include "simd/scalar.h"
}  // namespace meaning
// Once more for the instruction set under test, in a namespace of its own.
#undef FEINWERK_SIMD_SCALAR_H_
#undef FEINWERK_SIMD_CONVERT_H_
#include "simd/simd.h"

namespace {

namespace fw = feinwerk;
namespace ref = meaning::feinwerk;

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
constexpr char kIsa[] = TEXT(FEINWERK_ISA_NAME);
constexpr int kWidth = fw::kWidth;
constexpr int kGroup = ref::kWidth;  // the meaning comes in groups of 4 lanes
static_assert(kWidth % kGroup == 0, "the lanes are whole groups");

bool cpu_has_it() {
  for (int64_t i = 0; i < feinwerk_isa_count(); ++i)
    if (strcmp(feinwerk_isa_name(i), kIsa) == 0) return feinwerk_isa_available(i);
  return false;
}

int64_t checks = 0, failures = 0;

void same(const char* word, const void* got, const void* want, size_t bytes, uint32_t input) {
  ++checks;
  if (memcmp(got, want, bytes) == 0 || ++failures > 20) return;
  const auto *a = static_cast<const uint8_t*>(got), *b = static_cast<const uint8_t*>(want);
  size_t i = 0;
  while (a[i] == b[i]) ++i;
  printf("FAILED %s on %s near %08x: byte %d is %02x, want %02x\n", word, kIsa, input,
         static_cast<int>(i), a[i], b[i]);
}

// Which NaN an arithmetic word gives is open; that it gives one is not.
void same_numbers(const char* word, fw::F got, const float* want, uint32_t input) {
  float a[kWidth], b[kWidth];
  fw::store(a, got);
  for (int i = 0; i < kWidth; ++i) {
    if (isnan(a[i])) a[i] = NAN;
    b[i] = isnan(want[i]) ? NAN : want[i];
  }
  same(word, a, b, sizeof(a), input);
}
void same_bits(const char* word, fw::F got, const float* want, uint32_t input) {
  float a[kWidth];
  fw::store(a, got);
  same(word, a, want, sizeof(a), input);
}
void same_bits(const char* word, fw::I got, const int32_t* want, uint32_t input) {
  int32_t a[kWidth];
  memcpy(a, &got, sizeof(a));
  same(word, a, want, sizeof(a), input);
}

template <int j>
void check_nibble(fw::Table16 table, const float* values, const uint32_t* dwords) {
  float want[kWidth];
  for (int i = 0; i < kWidth; ++i) want[i] = values[dwords[i] >> (4 * j) & 15];
  same_bits("decode_nibble", fw::decode_nibble<j>(table, fw::load_dwords(dwords)), want, dwords[0]);
}

uint64_t state = 1;
uint32_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}
float random_float() { return static_cast<float>(random_bits()) * 0x1p-31f - 1.0f; }
int8_t random_quant() {  // -127 .. 127, the ends often
  const uint32_t bits = random_bits();
  if (bits % 4 == 0) return static_cast<int8_t>(bits & 16 ? 127 : -127);
  return static_cast<int8_t>(static_cast<int32_t>((bits >> 8) % 255) - 127);
}

// Zeros, subnormals, ends of ranges, infinities, quiet and signalling NaNs, ordinary numbers.
constexpr uint32_t kSpecial[] = {
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007fffff, 0x00800000, 0x807fffff, 0x00012345,
    0x33000000, 0x33000001, 0x387fffff, 0x38800000, 0x477fefff, 0x477ff000, 0x7f7fffff, 0xff7fffff,
    0x7f800000, 0xff800000, 0x7f800001, 0xff800001, 0x7fc00000, 0xffc00000, 0x7fffffff, 0xffffffff,
    0x3f800000, 0xbf800000, 0x3f7fffff, 0x3f000000, 0x40490fdb, 0xc2f6e979, 0x7e967699, 0x00800001,
};
constexpr int kSpecials = static_cast<int>(sizeof(kSpecial) / sizeof(kSpecial[0]));
float special(int i) { return ref::float_of_bits(kSpecial[i % kSpecials]); }

}  // namespace

#endif  // FEINWERK_TESTS_C_WORDS_H_
