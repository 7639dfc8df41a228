// The vocabulary for AVX-512 (F, BW, DQ, VL); VNNI, BF16 and AMX words where the flags allow them.
#ifndef FEINWERK_SIMD_AVX512_H_
#define FEINWERK_SIMD_AVX512_H_

#include <immintrin.h>

#include "simd/convert.h"

namespace feinwerk {
namespace {

constexpr int kWidth = 16;
constexpr int kMicroRows = 12;
constexpr int kMicroVectors = 2;
using F = __m512;
using I = __m512i;

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F square_root(F x) { return _mm512_sqrt_ps(x); }
inline F max_number(F x, F most) { return _mm512_max_ps(x, most); }
inline F absolute(F x) { return _mm512_abs_ps(x); }
inline float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline float reduce_add(F x) { return _mm512_reduce_add_ps(x); }

inline F load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline F load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// bf16 bits in the low half of every dword. In integers: the hardware conversion flushes
// subnormals.
inline I bf16_bits(F x) {
  const I u = _mm512_castps_si512(x);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const I rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
}
inline void store_bf16(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_bits(x)));
}
inline void store_f16(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline I abs_bits(F x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}
inline I max_bits(I a, I b) { return _mm512_max_epi32(a, b); }
inline uint32_t reduce_max_bits(I x) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(x)); }

using Table16 = __m512;
inline Table16 table16(const float* p) { return _mm512_loadu_ps(p); }
inline Table16 scale(Table16 t, float s) { return _mm512_mul_ps(t, _mm512_set1_ps(s)); }
inline Table16 round_bf16(Table16 t) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(t), 16));
}
inline Table16 round_f16(Table16 t) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// vpermps reads only the low 4 bits of a lane, so codes need no masking.
inline F decode(Table16 t, const uint8_t* p) {
  int32_t low, high;
  memcpy(&low, p, 4);
  memcpy(&high, p + 4, 4);
  const I codes = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
  const I shift = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(codes, shift), t);
}
inline I load_dwords(const void* p) { return _mm512_loadu_si512(p); }
inline I load_half_dwords(const void* p) {
  return _mm512_zextsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
template <int j>
inline F decode_nibble(Table16 t, I v) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * j), t);
}
inline F spread8(const float* p, int64_t c) {
  return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(p[2 * c]), _mm512_set1_ps(p[2 * c + 1]));
}

// 16 bf16 values, twice: vpermw reads 5 bits of a word, and bit 4 must not matter.
using TableBf16 = __m512i;
inline TableBf16 table_bf16(Table16 t) {
  return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(bf16_bits(t)));
}
// The codes of 32 elements, one a word in natural order: byte w / 2 goes to word w. Bits above the
// low four are arbitrary.
inline I words32(const uint8_t* p) {
  alignas(64) static constexpr uint16_t kByte[32] = {
      0x8000, 0x8000, 0x8001, 0x8001, 0x8002, 0x8002, 0x8003, 0x8003, 0x8004, 0x8004, 0x8005,
      0x8005, 0x8006, 0x8006, 0x8007, 0x8007, 0x8008, 0x8008, 0x8009, 0x8009, 0x800a, 0x800a,
      0x800b, 0x800b, 0x800c, 0x800c, 0x800d, 0x800d, 0x800e, 0x800e, 0x800f, 0x800f};
  const I codes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const I words = _mm512_shuffle_epi8(codes, _mm512_load_si512(kByte));
  return _mm512_srlv_epi16(words, _mm512_set1_epi32(4));
}
// 32 elements from 16 packed bytes.
inline I decode32_bf16(TableBf16 t, const uint8_t* p) {
  return _mm512_permutexvar_epi16(words32(p), t);
}

// Binary search over the sorted thresholds: in every step lane i compares with the middle of what
// is left, thresholds[code + 3], [code + 1], [code].
template <bool nan_high>
inline I nf4_code(F x, const float* thresholds) {
  constexpr int kExceeds = nan_high ? _CMP_NLE_UQ : _CMP_GT_OQ;
  const F table = _mm512_loadu_ps(thresholds);
  const F plus3 = _mm512_castsi512_ps(
      _mm512_alignr_epi32(_mm512_castps_si512(table), _mm512_castps_si512(table), 3));
  const F plus1 = _mm512_castsi512_ps(
      _mm512_alignr_epi32(_mm512_castps_si512(table), _mm512_castps_si512(table), 1));
  I code =
      _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(x, _mm512_set1_ps(thresholds[7]), kExceeds), 8);
  __mmask16 m = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(code, plus3), kExceeds);
  code = _mm512_mask_or_epi32(code, m, code, _mm512_set1_epi32(4));
  m = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(code, plus1), kExceeds);
  code = _mm512_mask_or_epi32(code, m, code, _mm512_set1_epi32(2));
  m = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(code, table), kExceeds);
  return _mm512_mask_or_epi32(code, m, code, _mm512_set1_epi32(1));
}

// The same for |x| <= 1 + 2^-20 and thresholds that part NF4's codes, in half the steps: of 32
// equal bins of [-1, 1] none holds two thresholds, so one comparison with the bin's own decides.
struct CodeBins {
  F threshold_low, threshold_high;
  I code_low, code_high;
};
inline CodeBins code_bins(const float* thresholds) {
  float threshold[32];
  int32_t code[32];
  int t = 0;
  for (int bin = 0; bin < 32; ++bin) {
    code[bin] = t;
    threshold[bin] = thresholds[t];
    const float end = static_cast<float>(bin + 1) / 15.99f - 1.0f;
    if (t < 15 && thresholds[t] < end) ++t;
  }
  return {load(threshold), load(threshold + 16), _mm512_loadu_si512(code),
          _mm512_loadu_si512(code + 16)};
}
inline I nf4_code_in_bins(F x, const CodeBins& bins) {
  const I bin = _mm512_cvttps_epi32(fma(x, set1(15.99f), set1(15.99f)));
  const F threshold = _mm512_permutex2var_ps(bins.threshold_low, bin, bins.threshold_high);
  const I code = _mm512_permutex2var_epi32(bins.code_low, bin, bins.code_high);
  const __mmask16 above = _mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ);
  return _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
}
inline void store_codes(uint8_t* p, I codes) {
  const __m128i bytes = _mm512_cvtepi32_epi8(codes);
  const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x0110));  // even * 16 + odd
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
}

inline void transpose(F (&r)[kWidth]) {
  F t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto join = [](F a, F b, bool high) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
  // After this r[4i + j] holds, in 128-bit lane l, column 4l + j of rows 4i .. 4i + 3.
  for (int i = 0; i < 16; i += 4) {
    r[i] = join(t[i], t[i + 2], false);
    r[i + 1] = join(t[i], t[i + 2], true);
    r[i + 2] = join(t[i + 1], t[i + 3], false);
    r[i + 3] = join(t[i + 1], t[i + 3], true);
  }
  for (int j = 0; j < 4; ++j) {
    const F even01 = _mm512_shuffle_f32x4(r[j], r[j + 4], 0x88);
    const F odd01 = _mm512_shuffle_f32x4(r[j], r[j + 4], 0xdd);
    const F even23 = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0x88);
    const F odd23 = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0xdd);
    t[j] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    t[j + 8] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    t[j + 4] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    t[j + 12] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// out[i] = table[codes[i]] for 256 floats, 32 codes at a time while they last; returns how many.
// Two look-ups of words, the low and the high halves of the floats, instead of a gather.
// Not inlined: where a caller's count is always small, GCC 12 warns of the stores never reached.
__attribute__((noinline, unused)) int64_t look_up_words(const float* table, const uint8_t* codes,
                                                        int64_t count, float* out) {
  alignas(64) static constexpr uint16_t kEven[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                     22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                     44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  const I even = _mm512_load_si512(kEven), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  I halves[2][8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const I first = _mm512_loadu_si512(table + 32 * i);
    const I second = _mm512_loadu_si512(table + 32 * i + 16);
    halves[0][i] = _mm512_permutex2var_epi16(first, even, second);
    halves[1][i] = _mm512_permutex2var_epi16(first, odd, second);
  }
  // Codes in the order in which unpacking below leaves their floats sorted.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    const I code = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(bytes, order));
    const __mmask32 bit6 = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
    const __mmask32 bit7 = _mm512_test_epi16_mask(code, _mm512_set1_epi16(128));
    I words[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const I(&t)[8] = halves[h];
      const I low = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(t[0], code, t[1]),
                                            _mm512_permutex2var_epi16(t[2], code, t[3]));
      const I high = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(t[4], code, t[5]),
                                             _mm512_permutex2var_epi16(t[6], code, t[7]));
      words[h] = _mm512_mask_blend_epi16(bit7, low, high);
    }
    _mm512_storeu_si512(out + i, _mm512_unpacklo_epi16(words[0], words[1]));
    _mm512_storeu_si512(out + i + 16, _mm512_unpackhi_epi16(words[0], words[1]));
  }
  return i;
}

// Byte k of 64 dwords.
template <int k>
inline I pack_bytes(const I (&dwords)[4]) {
#if defined(__AVX512VBMI__)
  // Bytes k, k + 4, ... of two vectors; the upper half of the indices waits for the second look-up.
  alignas(64) static constexpr auto kIndices = [] {
    struct {
      uint8_t v[64];
    } t = {};
    for (int i = 0; i < 64; ++i) t.v[i] = static_cast<uint8_t>(4 * (i % 32) + k);
    return t;
  }();
  const I indices = _mm512_load_si512(&kIndices);
  const I low = _mm512_mask2_permutex2var_epi8(dwords[0], indices, 0xffffffff, dwords[1]);
  return _mm512_mask2_permutex2var_epi8(dwords[2], low, ~0ull << 32, dwords[3]);
#else
  I words[2];
  for (int j = 0; j < 2; ++j) {
    const auto byte = [&](I x) {
      return _mm512_and_si512(_mm512_srli_epi32(x, 8 * k), _mm512_set1_epi32(255));
    };
    words[j] = _mm512_packus_epi32(byte(dwords[2 * j]), byte(dwords[2 * j + 1]));
  }
  const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words[0], words[1]));
#endif
}

#if defined(__AVX512VBMI__)
#define FEINWERK_BYTE_TABLES 1
// 256 floats as four tables of their bytes, which two look-ups each read for 64 codes.
struct ByteTables {
  I planes[4][4];
  explicit ByteTables(const float* table) {
    for (int q = 0; q < 4; ++q) {
      I floats[4];
      for (int j = 0; j < 4; ++j) floats[j] = load_dwords(table + 64 * q + 16 * j);
      planes[0][q] = pack_bytes<0>(floats);
      planes[1][q] = pack_bytes<1>(floats);
      planes[2][q] = pack_bytes<2>(floats);
      planes[3][q] = pack_bytes<3>(floats);
    }
  }
  // The floats of 64 codes.
  void look_up(const uint8_t* codes, F (&floats)[4]) const {
    // In the order in which unpacking below leaves the floats sorted.
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const I code = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
    const __mmask64 upper = _mm512_movepi8_mask(code);
    I bytes[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      bytes[k] =
          _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(planes[k][0], code, planes[k][1]),
                                 _mm512_permutex2var_epi8(planes[k][2], code, planes[k][3]));
    const I low0 = _mm512_unpacklo_epi8(bytes[0], bytes[1]);
    const I low1 = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
    const I high0 = _mm512_unpacklo_epi8(bytes[2], bytes[3]);
    const I high1 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
    floats[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low0, high0));
    floats[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low0, high0));
    floats[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low1, high1));
    floats[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low1, high1));
  }
};
#endif

// Table entries are stored plus kBias8: vpdpbusd multiplies unsigned by signed bytes. The caller
// starts its sums at -kBias8 times the sum of the activations.
#if defined(__AVX512VNNI__)
constexpr int kBias8 = 128;
#else
constexpr int kBias8 = 0;
#endif
using Table8 = __m512i;
inline Table8 table8(const int8_t* p) {
  const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_broadcast_i32x4(_mm_xor_si128(t, _mm_set1_epi8(static_cast<char>(kBias8))));
}
inline I dot_i8(I acc, I w, I x) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(acc, w, x);
#else
  const __mmask64 negative = _mm512_movepi8_mask(w);
  const I signed_x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
  const I pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x);
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
inline I dot_codes(I acc, Table8 t, I codes, const int8_t* x_high, const int8_t* x_low) {
  const I nibble = _mm512_set1_epi8(15);
  const I high = _mm512_shuffle_epi8(t, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
  const I low = _mm512_shuffle_epi8(t, _mm512_and_si512(codes, nibble));
  return dot_i8(dot_i8(acc, high, load_dwords(x_high)), low, load_dwords(x_low));
}
inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }

#if defined(__AVX512BF16__)
#define FEINWERK_BF16_DOT 1
// acc + a.even * b.even + a.odd * b.odd a lane, bf16 pairs in dwords.
inline F dot_bf16(F acc, I a, I b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// Two tables in one register: lanes 0-15 for words 0-15 of the codes, 16-31 for words 16-31.
inline I table_bf16_pair(Table16 first, Table16 second) {
  return reinterpret_cast<I>(_mm512_cvtne2ps_pbh(second, first));
}
// 32 elements from 16 packed bytes, all by the first table (which = 0) or all by the second.
template <int which>
inline I decode32_words(I tables, const uint8_t* p) {
  const I half = _mm512_set1_epi16(16 * which);
  const I index = _mm512_ternarylogic_epi32(words32(p), _mm512_set1_epi16(15), half, 0xea);
  return _mm512_permutexvar_epi16(index, tables);
}
// The nibbles of every word, each with the bit above it that chooses the table of its position:
// nibbles 0 and 2 in `even`, 1 and 3 in `odd`, at bits 0 and 8.
struct SplitWords {
  I even, odd;
};
inline SplitWords split_words(I codes) {
  const I nibbles = _mm512_set1_epi8(15);
  const I half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
  // 0xea: (a & b) | c
  return {_mm512_ternarylogic_epi32(codes, nibbles, half, 0xea),
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 4), nibbles, half, 0xea)};
}
template <int j>
inline I decode_words(I table, const SplitWords& codes) {
  const I pair = j % 2 == 0 ? codes.even : codes.odd;
  return _mm512_permutexvar_epi16(j < 2 ? pair : _mm512_srli_epi16(pair, 8), table);
}
#endif

#if defined(__AMX_BF16__)
#define FEINWERK_AMX 1
#endif

inline I set1_words(uint32_t x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); }
inline void store_words(uint32_t* p, I x) { _mm512_storeu_si512(p, x); }
inline I xor_words(I a, I b) { return _mm512_xor_si512(a, b); }
inline void multiply_words(I a, I b, I* high, I* low) {
  const I even = _mm512_mul_epu32(a, b);
  const I odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  *low = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, static_cast<_MM_PERM_ENUM>(0xa0));
  *high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, static_cast<_MM_PERM_ENUM>(0xf5));
}

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_SIMD_AVX512_H_
