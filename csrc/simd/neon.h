// The vocabulary for 64-bit Arm: NEON with fp16 conversions and the dot product (Armv8.2).
#ifndef FEINWERK_SIMD_NEON_H_
#define FEINWERK_SIMD_NEON_H_

#include <arm_neon.h>

#include "simd/convert.h"

namespace feinwerk {
namespace {

constexpr int kWidth = 4;
// 16 chains keep four pipes of latency four busy, with 2 vectors of B and 8 elements of A beside
// them: 26 of the 32 registers. GCC loads all of these first, so 6 x 4 (24 + 4 + 6) would spill.
constexpr int kMicroRows = 8;
constexpr int kMicroVectors = 2;
using F = float32x4_t;
using I = int32x4_t;

inline F zero() { return vdupq_n_f32(0.0f); }
inline F set1(float x) { return vdupq_n_f32(x); }
inline F load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F x) { vst1q_f32(p, x); }
inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F div(F a, F b) { return vdivq_f32(a, b); }
inline F square_root(F x) { return vsqrtq_f32(x); }
inline F max_number(F x, F most) { return vmaxnmq_f32(x, most); }
inline F absolute(F x) { return vabsq_f32(x); }
inline float reduce_max(F x) { return vmaxvq_f32(x); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline float reduce_add(F x) {
  const float32x2_t s = vadd_f32(vget_low_f32(x), vget_high_f32(x));
  return vpadds_f32(s);
}

inline F load_bf16(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
inline F load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

inline uint16x4_t bf16_bits(F x) {
  const uint32x4_t u = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
}
inline void store_bf16(uint16_t* p, F x) { vst1_u16(p, bf16_bits(x)); }
// FPCR as Linux starts a thread: to nearest even, IEEE half precision, subnormals kept.
inline void store_f16(uint16_t* p, F x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }

inline I abs_bits(F x) { return vandq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(0x7fffffff)); }
inline I max_bits(I a, I b) { return vmaxq_s32(a, b); }
inline uint32_t reduce_max_bits(I x) { return static_cast<uint32_t>(vmaxvq_s32(x)); }

// The 64 bytes of the 16 floats: tbl looks up single bytes.
using Table16 = uint8x16x4_t;
template <class Word>
inline Table16 each_quarter(const Table16& t, const Word& word) {
  Table16 r;
  for (int i = 0; i < 4; ++i) r.val[i] = vreinterpretq_u8_f32(word(vreinterpretq_f32_u8(t.val[i])));
  return r;
}
inline Table16 table16(const float* p) {
  Table16 t;
  for (int i = 0; i < 4; ++i) t.val[i] = vreinterpretq_u8_f32(load(p + 4 * i));
  return t;
}
inline Table16 scale(const Table16& t, float s) {
  return each_quarter(t, [s](F x) { return vmulq_n_f32(x, s); });
}
inline Table16 round_bf16(const Table16& t) {
  return each_quarter(t, [](F x) { return vreinterpretq_f32_u32(vshll_n_u16(bf16_bits(x), 16)); });
}
inline Table16 round_f16(const Table16& t) {
  return each_quarter(t, [](F x) { return vcvt_f32_f16(vcvt_f16_f32(x)); });
}

// Code c of a lane becomes the byte indices 4 c, 4 c + 1, 4 c + 2, 4 c + 3.
inline F lookup(const Table16& t, uint32x4_t codes) {
  const uint32x4_t low4 = vandq_u32(codes, vdupq_n_u32(15));
  const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100), low4, vdupq_n_u32(0x04040404));
  return vreinterpretq_f32_u8(vqtbl4q_u8(t, vreinterpretq_u8_u32(bytes)));
}
inline F decode(const Table16& t, const uint8_t* p) {
  static constexpr int32_t kShift[4] = {-4, 0, -12, -8};
  uint16_t codes;
  memcpy(&codes, p, 2);
  return lookup(t, vshlq_u32(vdupq_n_u32(codes), vld1q_s32(kShift)));
}
inline I load_dwords(const void* p) {
  return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
}
inline I load_half_dwords(const void* p) {
  return vreinterpretq_s32_u8(vcombine_u8(vld1_u8(static_cast<const uint8_t*>(p)), vdup_n_u8(0)));
}
template <int j>
inline F decode_nibble(const Table16& t, I v) {
  const uint32x4_t codes = vreinterpretq_u32_s32(v);
  if constexpr (j == 0)
    return lookup(t, codes);
  else
    return lookup(t, vshrq_n_u32(codes, 4 * j));
}
inline F spread8(const float* p, int64_t c) { return vld1q_dup_f32(p + c / 2); }

template <bool nan_high>
inline I nf4_code(F x, const float* thresholds) {
  int32x4_t code = vdupq_n_s32(nan_high ? 15 : 0);  // masks are -1: take off, or count up
  for (int t = 0; t < 15; ++t) {
    const F threshold = set1(thresholds[t]);
    code = nan_high ? vaddq_s32(code, vreinterpretq_s32_u32(vcleq_f32(x, threshold)))
                    : vsubq_s32(code, vreinterpretq_s32_u32(vcgtq_f32(x, threshold)));
  }
  return code;
}
using CodeBins = const float*;
inline CodeBins code_bins(const float* thresholds) { return thresholds; }
inline I nf4_code_in_bins(F x, CodeBins thresholds) { return nf4_code<false>(x, thresholds); }
inline void store_codes(uint8_t* p, I codes) {
  // Every qword holds an even and an odd element: even * 16 + odd in its low byte.
  const uint64x2_t pairs = vreinterpretq_u64_s32(codes);
  const uint8x16_t bytes =
      vreinterpretq_u8_u64(vorrq_u64(vshlq_n_u64(pairs, 4), vshrq_n_u64(pairs, 32)));
  vst1q_lane_u8(p, bytes, 0);
  vst1q_lane_u8(p + 1, bytes, 8);
}

inline void transpose(F (&r)[kWidth]) {
  const auto wide = [](F x) { return vreinterpretq_f64_f32(x); };
  const auto narrow = [](float64x2_t x) { return vreinterpretq_f32_f64(x); };
  const float64x2_t even01 = wide(vtrn1q_f32(r[0], r[1])), odd01 = wide(vtrn2q_f32(r[0], r[1]));
  const float64x2_t even23 = wide(vtrn1q_f32(r[2], r[3])), odd23 = wide(vtrn2q_f32(r[2], r[3]));
  r[0] = narrow(vtrn1q_f64(even01, even23));
  r[1] = narrow(vtrn1q_f64(odd01, odd23));
  r[2] = narrow(vtrn2q_f64(even01, even23));
  r[3] = narrow(vtrn2q_f64(odd01, odd23));
}

constexpr int kBias8 = 0;
using Table8 = int8x16_t;
inline Table8 table8(const int8_t* p) { return vld1q_s8(p); }
inline I dot_codes(I acc, Table8 t, I codes, const int8_t* x_high, const int8_t* x_low) {
  const uint8x16_t bytes = vreinterpretq_u8_s32(codes);
  const int8x16_t high = vqtbl1q_s8(t, vshrq_n_u8(bytes, 4));
  const int8x16_t low = vqtbl1q_s8(t, vandq_u8(bytes, vdupq_n_u8(15)));
  return vdotq_s32(vdotq_s32(acc, high, vld1q_s8(x_high)), low, vld1q_s8(x_low));
}
inline F to_float(I x) { return vcvtq_f32_s32(x); }

inline I set1_words(uint32_t x) { return vreinterpretq_s32_u32(vdupq_n_u32(x)); }
inline void store_words(uint32_t* p, I x) { vst1q_u32(p, vreinterpretq_u32_s32(x)); }
inline I xor_words(I a, I b) { return veorq_s32(a, b); }
inline void multiply_words(I a, I b, I* high, I* low) {
  const uint32x4_t x = vreinterpretq_u32_s32(a), y = vreinterpretq_u32_s32(b);
  const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x), vget_low_u32(y)));
  const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_u32(x, y));
  *low = vreinterpretq_s32_u32(vuzp1q_u32(first, second));
  *high = vreinterpretq_s32_u32(vuzp2q_u32(first, second));
}

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_SIMD_NEON_H_
