// The vocabulary for AVX2 with FMA and F16C.
#ifndef FEINWERK_SIMD_AVX2_H_
#define FEINWERK_SIMD_AVX2_H_

#include <immintrin.h>

#include "simd/convert.h"

namespace feinwerk {
namespace {

constexpr int kWidth = 8;
constexpr int kMicroRows = 6;
constexpr int kMicroVectors = 2;
using F = __m256;
using I = __m256i;

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F square_root(F x) { return _mm256_sqrt_ps(x); }
inline F max_number(F x, F most) { return _mm256_max_ps(x, most); }
inline F absolute(F x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline float reduce_max(F x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline float reduce_add(F x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline F load_bf16(const uint16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline F load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// bf16 bits in the low half of every dword.
inline I bf16_bits(F x) {
  const I u = _mm256_castps_si256(x);
  const I odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const I rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const I quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const I nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}
inline void store_bf16(uint16_t* p, F x) {
  const I h = bf16_bits(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
}
inline void store_f16(uint16_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline I abs_bits(F x) {
  return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}
inline I max_bits(I a, I b) { return _mm256_max_epi32(a, b); }
inline uint32_t reduce_max_bits(I x) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

// vpermps holds 8 entries: two of them, chosen between by bit 3 of the code.
struct Table16 {
  F low, high;
};
inline Table16 table16(const float* p) { return {load(p), load(p + 8)}; }
inline Table16 scale(Table16 t, float s) { return {mul(t.low, set1(s)), mul(t.high, set1(s))}; }
inline F round_to_bf16(F x) { return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(x), 16)); }
inline F round_to_f16(F x) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Table16 round_bf16(Table16 t) { return {round_to_bf16(t.low), round_to_bf16(t.high)}; }
inline Table16 round_f16(Table16 t) { return {round_to_f16(t.low), round_to_f16(t.high)}; }

inline F lookup(const Table16& t, I codes) {
  const F low = _mm256_permutevar8x32_ps(t.low, codes);
  const F high = _mm256_permutevar8x32_ps(t.high, codes);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
inline F decode(const Table16& t, const uint8_t* p) {
  int32_t codes;
  memcpy(&codes, p, 4);
  const I shift = _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4);
  return lookup(t, _mm256_srlv_epi32(_mm256_set1_epi32(codes), shift));
}
inline I load_dwords(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline I load_half_dwords(const void* p) {
  return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
template <int j>
inline F decode_nibble(const Table16& t, I v) {
  return lookup(t, _mm256_srli_epi32(v, 4 * j));
}
inline F spread8(const float* p, int64_t c) { return _mm256_set1_ps(p[c]); }

template <bool nan_high>
inline I nf4_code(F x, const float* thresholds) {
  constexpr int kExceeds = nan_high ? _CMP_NLE_UQ : _CMP_GT_OQ;
  I code = _mm256_setzero_si256();
  for (int t = 0; t < 15; ++t) {
    const F exceeds = _mm256_cmp_ps(x, _mm256_set1_ps(thresholds[t]), kExceeds);
    code = _mm256_sub_epi32(code, _mm256_castps_si256(exceeds));
  }
  return code;
}
using CodeBins = const float*;
inline CodeBins code_bins(const float* thresholds) { return thresholds; }
inline I nf4_code_in_bins(F x, CodeBins thresholds) { return nf4_code<false>(x, thresholds); }
inline void store_codes(uint8_t* p, I codes) {
  // Every qword holds an even and an odd element: even * 16 + odd in its low byte.
  const I bytes = _mm256_or_si256(_mm256_slli_epi64(codes, 4), _mm256_srli_epi64(codes, 32));
  const I pick = _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                  0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const I packed = _mm256_shuffle_epi8(bytes, pick);
  const int low = _mm_cvtsi128_si32(_mm256_castsi256_si128(packed));
  const int high = _mm_cvtsi128_si32(_mm256_extracti128_si256(packed, 1));
  const int32_t both = (low & 0xffff) | high << 16;
  memcpy(p, &both, 4);
}

inline void transpose(F (&r)[kWidth]) {
  F t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x20);
    t[j + 4] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

constexpr int kBias8 = 0;
using Table8 = __m256i;
inline Table8 table8(const int8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// vpmaddubsw wants unsigned by signed: |w| by sign(w) x. 127 * 127 * 2 stays below 2^15.
inline I dot_i8(I acc, I w, I x) {
  const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I dot_codes(I acc, Table8 t, I codes, const int8_t* x_high, const int8_t* x_low) {
  const I nibble = _mm256_set1_epi8(15);
  const I high = _mm256_shuffle_epi8(t, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
  const I low = _mm256_shuffle_epi8(t, _mm256_and_si256(codes, nibble));
  return dot_i8(dot_i8(acc, high, load_dwords(x_high)), low, load_dwords(x_low));
}
inline F to_float(I x) { return _mm256_cvtepi32_ps(x); }

inline I set1_words(uint32_t x) { return _mm256_set1_epi32(static_cast<int32_t>(x)); }
inline void store_words(uint32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline I xor_words(I a, I b) { return _mm256_xor_si256(a, b); }
inline void multiply_words(I a, I b, I* high, I* low) {
  const I even = _mm256_mul_epu32(a, b);
  const I odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  *low = _mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xa0), 0xaa);
  *high = _mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xf5), odd, 0xaa);
}

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_SIMD_AVX2_H_
