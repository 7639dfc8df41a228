// The vocabulary in plain C++: the meaning of every word, and the path of CPUs without the others.
#ifndef FEINWERK_SIMD_SCALAR_H_
#define FEINWERK_SIMD_SCALAR_H_

#include "simd/convert.h"

namespace feinwerk {
namespace {

constexpr int kWidth = 4;
constexpr int kMicroRows = 4;
constexpr int kMicroVectors = 1;

struct F {
  float v[kWidth];
};
struct I {
  int32_t v[kWidth];
};

template <class Lane>
inline F lanes(Lane&& lane) {
  F r;
  for (int i = 0; i < kWidth; ++i) r.v[i] = lane(i);
  return r;
}

template <class Lane>
inline I int_lanes(Lane&& lane) {
  I r;
  for (int i = 0; i < kWidth; ++i) r.v[i] = lane(i);
  return r;
}

inline F zero() { return F{}; }
inline F set1(float x) {
  return lanes([&](int) { return x; });
}
inline F load(const float* p) {
  return lanes([&](int i) { return p[i]; });
}
inline void store(float* p, F x) { memcpy(p, x.v, sizeof(x.v)); }
inline F add(F a, F b) {
  return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline F sub(F a, F b) {
  return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline F div(F a, F b) {
  return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
inline F square_root(F x) {
  return lanes([&](int i) { return __builtin_sqrtf(x.v[i]); });
}
inline F max_number(F x, F most) {
  return lanes([&](int i) { return x.v[i] > most.v[i] ? x.v[i] : most.v[i]; });
}
inline F absolute(F x) {
  return lanes([&](int i) { return __builtin_fabsf(x.v[i]); });
}
inline float reduce_max(F x) {
  float most = x.v[0];
  for (int i = 1; i < kWidth; ++i) most = x.v[i] > most ? x.v[i] : most;
  return most;
}
inline F mul(F a, F b) {
  return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline F fma(F a, F b, F c) {
  return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline float reduce_add(F x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }

inline F load_bf16(const uint16_t* p) {
  return lanes([&](int i) { return float_of_bf16(p[i]); });
}
inline F load_f16(const uint16_t* p) {
  return lanes([&](int i) { return float_of_f16(p[i]); });
}
inline void store_bf16(uint16_t* p, F x) {
  for (int i = 0; i < kWidth; ++i) p[i] = bf16_of_float(x.v[i]);
}
inline void store_f16(uint16_t* p, F x) {
  for (int i = 0; i < kWidth; ++i) p[i] = f16_of_float(x.v[i]);
}

inline I abs_bits(F x) {
  return int_lanes([&](int i) { return static_cast<int32_t>(bits_of(x.v[i]) & 0x7fffffffu); });
}
inline I max_bits(I a, I b) {
  return int_lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline uint32_t reduce_max_bits(I x) {
  int32_t most = x.v[0];
  for (int i = 1; i < kWidth; ++i) most = x.v[i] > most ? x.v[i] : most;
  return static_cast<uint32_t>(most);
}

struct Table16 {
  float v[16];
};

inline Table16 table16(const float* p) {
  Table16 t;
  memcpy(t.v, p, sizeof(t.v));
  return t;
}
inline Table16 scale(Table16 t, float s) {
  for (float& v : t.v) v *= s;
  return t;
}
inline Table16 round_bf16(Table16 t) {
  for (float& v : t.v) v = float_of_bf16(bf16_of_float(v));
  return t;
}
inline Table16 round_f16(Table16 t) {
  for (float& v : t.v) v = float_of_f16(f16_of_float(v));
  return t;
}

inline F decode(const Table16& t, const uint8_t* p) {
  return lanes([&](int i) { return t.v[i % 2 == 0 ? p[i / 2] >> 4 : p[i / 2] & 15]; });
}
inline I load_dwords(const void* p) {
  I r;
  memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline I load_half_dwords(const void* p) {
  I r = {};
  memcpy(r.v, p, sizeof(r.v) / 2);
  return r;
}
template <int j>
inline F decode_nibble(const Table16& t, I v) {
  return lanes([&](int i) { return t.v[(static_cast<uint32_t>(v.v[i]) >> (4 * j)) & 15]; });
}
inline F spread8(const float* p, int64_t c) { return set1(p[c / 2]); }

template <bool nan_high>
inline I nf4_code(F x, const float* thresholds) {
  return int_lanes([&](int i) {
    int32_t code = 0;
    for (int t = 0; t < 15; ++t)
      code += nan_high ? !(x.v[i] <= thresholds[t]) : x.v[i] > thresholds[t];
    return code;
  });
}
using CodeBins = const float*;
inline CodeBins code_bins(const float* thresholds) { return thresholds; }
inline I nf4_code_in_bins(F x, CodeBins thresholds) { return nf4_code<false>(x, thresholds); }
inline void store_codes(uint8_t* p, I codes) {
  for (int i = 0; i < kWidth; i += 2)
    p[i / 2] = static_cast<uint8_t>(codes.v[i] << 4 | codes.v[i + 1]);
}

inline void transpose(F (&rows)[kWidth]) {
  for (int i = 0; i < kWidth; ++i)
    for (int j = i + 1; j < kWidth; ++j) {
      const float t = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = t;
    }
}
constexpr int kBias8 = 0;
struct Table8 {
  int8_t v[16];
};
inline Table8 table8(const int8_t* p) {
  Table8 t;
  memcpy(t.v, p, sizeof(t.v));
  return t;
}
// Sums over the 8 codes of every dword: high nibbles against x_high, low ones against x_low.
inline I dot_codes(I acc, const Table8& t, I codes, const int8_t* x_high, const int8_t* x_low) {
  return int_lanes([&](int i) {
    int32_t sum = acc.v[i];
    for (int b = 0; b < 4; ++b) {
      const uint32_t byte = static_cast<uint32_t>(codes.v[i]) >> (8 * b);
      sum += t.v[(byte >> 4) & 15] * x_high[4 * i + b] + t.v[byte & 15] * x_low[4 * i + b];
    }
    return sum;
  });
}
inline F to_float(I x) {
  return lanes([&](int i) { return static_cast<float>(x.v[i]); });
}

inline I set1_words(uint32_t x) {
  return int_lanes([&](int) { return static_cast<int32_t>(x); });
}
inline void store_words(uint32_t* p, I x) { memcpy(p, x.v, sizeof(x.v)); }
inline I xor_words(I a, I b) {
  return int_lanes([&](int i) { return a.v[i] ^ b.v[i]; });
}
inline void multiply_words(I a, I b, I* high, I* low) {
  for (int i = 0; i < kWidth; ++i) {
    const uint64_t product =
        uint64_t{static_cast<uint32_t>(a.v[i])} * static_cast<uint32_t>(b.v[i]);
    high->v[i] = static_cast<int32_t>(product >> 32);
    low->v[i] = static_cast<int32_t>(product & 0xffffffff);
  }
}

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_SIMD_SCALAR_H_
