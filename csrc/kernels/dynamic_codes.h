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

// A second moment above this never takes the code of zero, not even where its product with the
// inverse underflows: the step would be divided by eps alone. A block whose inverse is 0 is zero.
inline float floor_of_zero(float inverse) { return inverse > 0 ? 0.0f : __builtin_inff(); }

// What elements are multiplied with: one factor for all, or one for each.
template <bool each>
struct Factors {
  const float* p;
  float at(int64_t i) const { return p[each ? i : 0]; }
  F vector(int64_t i) const { return each ? load(p + i) : set1(*p); }
  Factors from(int64_t i) const { return {each ? p + i : p}; }
};

// codes[i] = the nearest code of x[i] * inverse, for i in [begin, end); NaN counts as zero.
template <bool is_signed, bool each>
inline void moment_codes(const DynamicMap& map, const float* x, Factors<each> inverse,
                         int64_t begin, int64_t end, uint8_t* codes) {
  for (int64_t i = begin; i < end; ++i) {
    const float s = x[i] * inverse.at(i);
    const uint8_t code = nearest_code(map, s == s ? s : 0.0f);
    codes[i] = !is_signed && code == 0 && x[i] > floor_of_zero(inverse.at(i)) ? 1 : code;
  }
}

#if defined(__AVX512BW__)
// 64 codes at a time by arithmetic, with the map's tables in registers.
template <bool is_signed>
class Encoder64 {
 public:
  static constexpr int64_t kCodes = 64;

  explicit Encoder64(const DynamicMap& map)
      : map_(map),
        threshold_{load(map.threshold), load(map.threshold + 16)},
        group_{load_dwords(map.group), load_dwords(map.group + 16)},
        multiply_(load(map.multiply)),
        offset_(load(map.offset)),
        top_(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(map.top)))) {}

  // The codes of x[0 .. 63] * inverse.
  template <bool each>
  void operator()(const float* x, Factors<each> inverse, uint8_t* codes) const {
    I scaled[4], groups[4], places[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const F s = mul(load(x + 16 * j), inverse.vector(16 * j));
      // 2^-31 stands for everything below, and for NaN.
      const F least = set1(0x1p-31f);
      const F a = is_signed ? _mm512_range_ps(s, least, kLargerMagnitude) : max_number(s, least);
      const I octave = _mm512_srli_epi32(_mm512_castps_si512(a), 23);  // its low 5 bits are read
      const F threshold = _mm512_permutex2var_ps(threshold_[0], octave, threshold_[1]);
      const I first = _mm512_permutex2var_epi32(group_[0], octave, group_[1]);
      const __mmask16 above = _mm512_cmp_ps_mask(a, threshold, _CMP_GT_OQ);
      groups[j] = _mm512_mask_add_epi32(first, above, first, _mm512_set1_epi32(1));
      const F multiply = _mm512_permutexvar_ps(groups[j], multiply_);
      const F offset = _mm512_permutexvar_ps(groups[j], offset_);
      places[j] = _mm512_castps_si512(fma(a, multiply, offset));
      scaled[j] = _mm512_castps_si512(s);
    }
    const I top = _mm512_shuffle_epi8(top_, pack_bytes<0>(groups));
    const I number = _mm512_min_epu8(pack_bytes<2>(places), top);
    if (is_signed) {
      const I zero = _mm512_set1_epi8(127);
      const __mmask64 negative = _mm512_movepi8_mask(pack_bytes<3>(scaled));
      const I code = _mm512_mask_subs_epu8(_mm512_add_epi8(zero, number), negative, zero, number);
      _mm512_storeu_si512(codes, code);  // saturated: there is no -1
    } else {
      const I code = _mm512_sub_epi8(number, _mm512_set1_epi8(1));
      _mm512_storeu_si512(codes, code);
      const __mmask64 zeros = _mm512_testn_epi8_mask(code, code);
      if (__builtin_expect(zeros != 0, 0)) raise_zeros(x, inverse, codes);
    }
    const I least_place = _mm512_min_epu16(_mm512_min_epu16(places[0], places[1]),
                                           _mm512_min_epu16(places[2], places[3]));
    if (__builtin_expect(near_boundary(least_place) != 0, 0))
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)  // unrolled: otherwise places[] would live in memory
        for (uint32_t near = near_boundary(places[j]); near != 0; near &= near - 1) {
          const int64_t i = 16 * j + __builtin_ctz(near) / 2;
          moment_codes<is_signed>(map_, x, inverse, i, i + 1, codes);
        }
  }

 private:
  static constexpr int kLargerMagnitude = 0b1011;  // of vrangeps: the sign cleared

  // Where rounding could matter: there the table decides. One bit in two, for the low words.
  static uint32_t near_boundary(I place) {
    return _mm512_mask_cmple_epu16_mask(0x55555555, place,
                                        _mm512_set1_epi16(2 * DynamicMap::kNear));
  }

  // See floor_of_zero.
  template <bool each>
  static void raise_zeros(const float* x, Factors<each> inverse, uint8_t* codes) {
    for (int j = 0; j < 4; ++j) {
      const __mmask16 finite = _mm512_cmp_ps_mask(inverse.vector(16 * j), zero(), _CMP_GT_OQ);
      const __mmask16 positive =
          _mm512_mask_cmp_ps_mask(finite, load(x + 16 * j), zero(), _CMP_GT_OQ);
      auto* const p = reinterpret_cast<__m128i*>(codes + 16 * j);
      const __m128i code = _mm_loadu_si128(p);
      _mm_storeu_si128(p, _mm_mask_max_epu8(code, positive, code, _mm_set1_epi8(1)));
    }
  }

  const DynamicMap& map_;
  F threshold_[2];
  I group_[2];
  F multiply_, offset_;
  I top_;
};
#endif

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_DYNAMIC_CODES_H_
