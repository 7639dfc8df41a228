// Nearest codes of the 8-bit dynamic maps, exact: ties take the lower code.
#ifndef FEINWERK_KERNELS_DYNAMIC_CODES_H_
#define FEINWERK_KERNELS_DYNAMIC_CODES_H_

#include "core/kernel_table.h"
#include "simd/simd.h"

namespace feinwerk {
namespace {

// s in [-1 - 2^-20, 1 + 2^-20], not NaN: the least code of its bucket, or the next.
inline uint8_t nearest_code(const DynamicMap& map, float s) {
  const uint32_t bits = bits_of(s);
  const int bucket = static_cast<int>(bits >> 16 & 0x7fff) - DynamicMap::kLowest;
  const int code = map.first[bits >> 31][bucket > 0 ? bucket : 0];
  return static_cast<uint8_t>(code + (s > map.midpoints[code]));
}

// A positive second moment never becomes zero: the step would be divided by eps alone.
template <bool is_signed>
inline uint8_t moment_code(const DynamicMap& map, float s) {
  const uint8_t code = nearest_code(map, s);
  return !is_signed && code == 0 && s > 0 ? 1 : code;
}

#if defined(__AVX512BW__)
// 16 codes by arithmetic. Values so near a boundary that rounding could matter, about one vector in
// a hundred, are left to the table.
template <bool is_signed>
inline void nearest_codes16(const DynamicMap& map, F s, uint8_t* codes) {
  constexpr float kNear = 0x1p-11f;  // of a cell; the error of `position` stays below 2^-13
  const I bits = _mm512_castps_si512(s);
  const I magnitude_bits = is_signed ? _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)) : bits;
  // 2^-31 stands for everything below.
  const I clamped = _mm512_max_epi32(magnitude_bits, _mm512_set1_epi32(96 << 23));
  const F a = _mm512_castsi512_ps(clamped);
  const I octave = _mm512_srli_epi32(clamped, 23);  // look-ups read its low 5 bits
  const F threshold = _mm512_permutex2var_ps(load(map.threshold), octave, load(map.threshold + 16));
  const I first =
      _mm512_permutex2var_epi32(load_dwords(map.group), octave, load_dwords(map.group + 16));
  const __mmask16 above = _mm512_cmp_ps_mask(a, threshold, _CMP_GT_OQ);
  const I group = _mm512_mask_add_epi32(first, above, first, _mm512_set1_epi32(1));
  const F multiply = _mm512_permutexvar_ps(group, load(map.multiply));
  const F offset = _mm512_permutexvar_ps(group, load(map.offset));
  const F top = _mm512_permutexvar_ps(group, load(map.top));
  const F position = fma(a, multiply, offset);
  const F whole = _mm512_roundscale_ps(position, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const F fraction = sub(position, whole);
  const F from_middle = _mm512_abs_ps(sub(fraction, set1(0.5f)));
  __mmask16 unsure = _mm512_cmp_ps_mask(from_middle, set1(0.5f - kNear), _CMP_GT_OQ);
  if (is_signed) unsure |= _mm512_cmp_ps_mask(a, threshold, _CMP_EQ_OQ);
  if (__builtin_expect(unsure != 0, 0)) {
    float values[16];
    store(values, s);
    for (int i = 0; i < 16; ++i) codes[i] = moment_code<is_signed>(map, values[i]);
    return;
  }
  const I number = _mm512_cvttps_epi32(_mm512_min_ps(whole, top));
  I code;
  if (is_signed) {
    const I zero = _mm512_set1_epi32(127);
    const __mmask16 negative = _mm512_movepi32_mask(bits);
    code = _mm512_mask_sub_epi32(_mm512_add_epi32(zero, number), negative, zero, number);
    code = _mm512_max_epi32(code, _mm512_setzero_si512());  // there is no -1
  } else {
    const __mmask16 positive = _mm512_test_epi32_mask(bits, bits);
    code = _mm512_mask_max_epi32(number, positive, number, _mm512_set1_epi32(1));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code));
}
#endif

// codes[i] = the nearest code of x[i] * inverse; NaN counts as zero.
template <bool is_signed>
inline void moment_codes(const DynamicMap& map, const float* x, float inverse, int64_t count,
                         uint8_t* codes) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  for (; i + kWidth <= count; i += kWidth)
    nearest_codes16<is_signed>(map, zero_nan(mul(load(x + i), set1(inverse))), codes + i);
#endif
  for (; i < count; ++i) {
    const float s = x[i] * inverse;
    codes[i] = moment_code<is_signed>(map, s == s ? s : 0.0f);
  }
}

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_DYNAMIC_CODES_H_
