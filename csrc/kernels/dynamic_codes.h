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
// 16 codes at a time by arithmetic, with the map's tables in registers.
template <bool is_signed>
class Encoder16 {
 public:
  explicit Encoder16(const DynamicMap& map)
      : threshold_{load(map.threshold), load(map.threshold + 16)},
        group_{load_dwords(map.group), load_dwords(map.group + 16)},
        multiply_(load(map.multiply)),
        offset_(load(map.offset)),
        top_(load_dwords(map.top)) {}

  // Of x * inverse. Returns the lanes, about one in a thousand,
  // that lie so near a boundary that rounding could matter: those need the table.
  __mmask16 operator()(F x, F inverse, uint8_t* codes) const {
    const F s = mul(x, inverse);
    // 2^-31 stands for everything below, and for NaN: a maximum takes its second operand then.
    const F a = _mm512_max_ps(is_signed ? absolute(s) : s, set1(0x1p-31f));
    const I octave = _mm512_srli_epi32(_mm512_castps_si512(a), 23);  // its low 5 bits are read
    const F threshold = _mm512_permutex2var_ps(threshold_[0], octave, threshold_[1]);
    const I first = _mm512_permutex2var_epi32(group_[0], octave, group_[1]);
    const __mmask16 above = _mm512_cmp_ps_mask(a, threshold, _CMP_GT_OQ);
    const I group = _mm512_mask_add_epi32(first, above, first, _mm512_set1_epi32(1));
    const F multiply = _mm512_permutexvar_ps(group, multiply_);
    const F offset = _mm512_permutexvar_ps(group, offset_);
    const I top = _mm512_permutexvar_epi32(group, top_);
    const I position = _mm512_cvttps_epi32(fma(a, multiply, offset));
    constexpr int kFar = DynamicMap::kCell - 2 * DynamicMap::kNear;  // the bits above 2 kNear
    __mmask16 unsure = _mm512_testn_epi32_mask(position, _mm512_set1_epi32(kFar));
    const I number =
        _mm512_min_epi32(_mm512_srli_epi32(position, __builtin_ctz(DynamicMap::kCell)), top);
    I code;
    if (is_signed) {
      // On a threshold the sign decides which is the lower code.
      unsure |= _mm512_cmp_ps_mask(a, threshold, _CMP_EQ_OQ);
      const I zero = _mm512_set1_epi32(127);
      const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(s));
      code = _mm512_mask_sub_epi32(_mm512_add_epi32(zero, number), negative, zero, number);
      code = _mm512_max_epi32(code, _mm512_setzero_si512());  // there is no -1
    } else {
      // Not where the inverse is 0: see floor_of_zero.
      const __mmask16 finite = _mm512_cmp_ps_mask(inverse, zero(), _CMP_GT_OQ);
      const __mmask16 positive = _mm512_mask_cmp_ps_mask(finite, x, zero(), _CMP_GT_OQ);
      code = _mm512_mask_max_epi32(number, positive, number, _mm512_set1_epi32(1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code));
    return unsure;
  }

 private:
  F threshold_[2];
  I group_[2];
  F multiply_, offset_;
  I top_;
};
#endif

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_DYNAMIC_CODES_H_
