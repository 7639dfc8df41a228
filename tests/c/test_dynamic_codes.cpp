// The 8-bit encoder of one instruction set against the definition of the nearest code.
//
//   test_dynamic_codes_<isa>         every float near a midpoint, and one in a thousand of the rest
//   test_dynamic_codes_<isa> --all   every float from 2^-32 to a little more than 1, either sign
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <initializer_list>

#include "core/dynamic_map.h"
#include "kernels/dynamic_codes.h"

namespace {

namespace fw = feinwerk;

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
constexpr char kIsa[] = TEXT(FEINWERK_ISA_NAME);

bool cpu_has_it() {
  for (int64_t i = 0; i < feinwerk_isa_count(); ++i)
    if (strcmp(feinwerk_isa_name(i), kIsa) == 0) return feinwerk_isa_available(i);
  return false;
}

int64_t checks = 0, failures = 0;

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

void same(const char* what, int got, int want, float x) {
  ++checks;
  if (got == want || ++failures > 20) return;
  printf("FAILED %s on %s at %.9g (%08x): code %d, want %d\n", what, kIsa, static_cast<double>(x),
         bits_of(x), got, want);
}

// What the code of a moment has to be, by the definition alone: a tie goes to the lower code, a
// positive second moment never to zero.
template <bool is_signed>
struct Oracle {
  const fw::DynamicMap& map;
  int code = 0;

  // Fast where calls ascend or descend.
  int operator()(float x) {
    while (code < 255 && x > middle(code)) ++code;
    while (code > 0 && !(x > middle(code - 1))) --code;
    return !is_signed && code == 0 && x > 0 ? 1 : code;
  }
  float middle(int i) const { return (map.values[i] + map.values[i + 1]) * 0.5f; }
};

constexpr int kFloats = 64;

// The way that the kernels encode them.
template <bool is_signed>
void encode(const fw::DynamicMap& map, const float* x, float inverse, const uint8_t* want) {
  uint8_t got[kFloats];
  fw::moment_codes<is_signed>(map, x, fw::Factors<false>{&inverse}, 0, kFloats, got);
  for (int i = 0; i < kFloats; ++i) same("moment_codes", got[i], want[i], x[i]);
#if defined(__AVX512BW__)
  const fw::Encoder64<is_signed> encoder(map);
  encoder(x, fw::Factors<false>{&inverse}, got);
  for (int i = 0; i < kFloats; ++i) same("Encoder64", got[i], want[i], x[i]);
#endif
}

// Floats whose bits go from `begin` to `end` in steps, with one sign.
template <bool is_signed>
void check_range(const fw::DynamicMap& map, uint32_t begin, uint32_t end, uint32_t step,
                 float sign) {
  Oracle<is_signed> oracle = {map};
  float x[kFloats];
  uint8_t want[kFloats];
  for (uint32_t bits = begin; bits < end; bits += kFloats * step) {
    for (uint32_t i = 0; i < kFloats; ++i) {
      const uint32_t at = bits + i * step;
      x[i] = float_of(at < end ? at : end - 1) * sign;
      want[i] = static_cast<uint8_t>(oracle(x[i]));
    }
    encode<is_signed>(map, x, 1.0f, want);
  }
}

template <bool is_signed>
void check_map(const fw::DynamicMap& map, bool all) {
  constexpr uint32_t kLow = (127 - 32) << 23;
  const uint32_t end = bits_of(1.0f + 0x1p-20f) + 1;
  for (const float sign : {1.0f, -1.0f}) {
    if (sign < 0 && !is_signed) continue;
    check_range<is_signed>(map, 0, kLow, 65537, sign);
    check_range<is_signed>(map, kLow, end, all ? 1 : 1009, sign);
    for (int i = 0; i < 255; ++i) {
      const uint32_t middle = bits_of(fabsf((map.values[i] + map.values[i + 1]) * 0.5f));
      check_range<is_signed>(map, middle - 40, middle + 40, 1, sign);
    }
    for (int i = 0; i < 256; ++i) {
      const uint32_t value = bits_of(fabsf(map.values[i]));
      check_range<is_signed>(map, value > 8 ? value - 8 : 0, value + 8, 1, sign);
    }
  }
  // NaN counts as zero; so does what an inverse of 0 makes of anything.
  const float odd[6] = {NAN, INFINITY, 1.0f, -NAN, -INFINITY, -1.0f};
  float x[kFloats];
  uint8_t want[kFloats];
  for (int i = 0; i < kFloats; ++i) x[i] = odd[i % (is_signed ? 6 : 3)];
  memset(want, is_signed ? 127 : 0, sizeof(want));
  encode<is_signed>(map, x, 0.0f, want);
  // Beside each other: zeros, which stay zero, and numbers that the guard raises.
  const float mixed[4] = {0.0f, 0x1p-149f, NAN, 0x1p-30f};
  for (int i = 0; i < kFloats; ++i) {
    x[i] = mixed[i % 4];
    want[i] = static_cast<uint8_t>(is_signed ? 127 : i % 2);
  }
  encode<is_signed>(map, x, 1.0f, want);
}

}  // namespace

int main(int argc, char** argv) {
  if (!cpu_has_it()) {
    printf("%s: not on this CPU\n", kIsa);
    return 77;
  }
  const bool all = argc > 1 && strcmp(argv[1], "--all") == 0;
  check_map<true>(fw::dynamic_maps()[0], all);
  check_map<false>(fw::dynamic_maps()[1], all);
  if (failures) return 1;
  printf("%s: %lld checks passed\n", kIsa, static_cast<long long>(checks));
  return 0;
}
