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

// 16 floats, the way that the kernels encode them; returns how many lanes the vector left open.
template <bool is_signed>
int check(const fw::DynamicMap& map, const float* x, Oracle<is_signed>* oracle) {
  uint8_t want[16], got[16];
  for (int i = 0; i < 16; ++i) want[i] = static_cast<uint8_t>((*oracle)(x[i]));
  const float one = 1.0f;
  fw::moment_codes<is_signed>(map, x, fw::Factors<false>{&one}, 0, 16, got);
  for (int i = 0; i < 16; ++i) same("moment_codes", got[i], want[i], x[i]);
  int open = 0;
#if defined(__AVX512BW__)
  const fw::Encoder16<is_signed> encoder(map);
  const uint32_t unsure = encoder(fw::load(x), fw::set1(one), got);
  for (int i = 0; i < 16; ++i) {
    if (unsure >> i & 1)
      ++open;
    else
      same("Encoder16", got[i], want[i], x[i]);
  }
#endif
  return open;
}

// Floats whose bits go from `begin` to `end` in steps, with one sign.
template <bool is_signed>
void check_range(const fw::DynamicMap& map, uint32_t begin, uint32_t end, uint32_t step,
                 float sign) {
  Oracle<is_signed> oracle = {map};
  int64_t open = 0, all = 0;
  float x[16];
  for (uint32_t bits = begin; bits < end; bits += 16 * step) {
    for (uint32_t i = 0; i < 16; ++i) {
      const uint32_t at = bits + i * step;
      x[i] = float_of(at < end ? at : end - 1) * sign;
    }
    open += check<is_signed>(map, x, &oracle);
    all += 16;
  }
  // The vector is there to be fast: what it leaves to the table is the exception.
  if (all > 10000000 && open * 500 > all) {
    ++failures;
    printf("FAILED Encoder16 on %s leaves %lld of %lld open\n", kIsa, static_cast<long long>(open),
           static_cast<long long>(all));
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
  // NaN counts as zero; so does what an inverse of 0 makes of infinity.
  const float odd[4] = {NAN, -NAN, INFINITY, -INFINITY};
  float x[16];
  uint8_t codes[16];
  for (int i = 0; i < 16; ++i) x[i] = odd[i % (is_signed ? 4 : 3)];
  const float none = 0.0f;
  fw::moment_codes<is_signed>(map, x, fw::Factors<false>{&none}, 0, 16, codes);
  for (int i = 0; i < 16; ++i) same("moment_codes", codes[i], is_signed ? 127 : 0, x[i]);
#if defined(__AVX512BW__)
  const uint32_t unsure = fw::Encoder16<is_signed>(map)(fw::load(x), fw::set1(none), codes);
  for (int i = 0; i < 16; ++i)
    if (!(unsure >> i & 1)) same("Encoder16", codes[i], is_signed ? 127 : 0, x[i]);
#endif
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
