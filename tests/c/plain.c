// Plain C definitions of the operations (docs/format.md says the same in words).
#include "plain.h"

#include <float.h>
#include <math.h>
#include <string.h>

const float plain_codebook[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

size_t plain_size(feinwerk_dtype dtype) { return dtype == FEINWERK_FLOAT32 ? 4 : 2; }

static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (isnan(value)) return (uint16_t)((bits >> 16) | 0x40u);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static float from_float16(uint16_t half) {
  const int sign = half >> 15, exponent = (half >> 10) & 31, mantissa = half & 1023;
  float value;
  if (exponent == 31)
    value = mantissa ? NAN : INFINITY;
  else if (exponent == 0)
    value = ldexpf((float)mantissa, -24);
  else
    value = ldexpf((float)(1024 + mantissa), exponent - 25);
  return sign ? -value : value;
}

static uint16_t to_float16(float value) {
  const uint16_t sign = (uint16_t)(bits_of(value) >> 31 << 15);
  const float magnitude = fabsf(value);
  if (isnan(value)) return sign | 0x7e00u;
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  if (magnitude < 0x1p-14f) return sign | (uint16_t)rint((double)magnitude * 0x1p24);
  int exponent;
  const double scaled = frexp((double)magnitude, &exponent) * 2048;  // in [1024, 2048)
  // A mantissa that rounds up to 2048 carries into the exponent, as it should.
  return sign | (uint16_t)(((exponent + 13) << 10) + (int)rint(scaled));
}

float plain_load(const void* buffer, feinwerk_dtype dtype, int64_t index) {
  if (dtype == FEINWERK_FLOAT32) return ((const float*)buffer)[index];
  const uint16_t half = ((const uint16_t*)buffer)[index];
  return dtype == FEINWERK_BFLOAT16 ? float_of((uint32_t)half << 16) : from_float16(half);
}

void plain_store(void* buffer, feinwerk_dtype dtype, int64_t index, float value) {
  if (dtype == FEINWERK_FLOAT32)
    ((float*)buffer)[index] = value;
  else
    ((uint16_t*)buffer)[index] =
        dtype == FEINWERK_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
}

float plain_round(float value, feinwerk_dtype dtype) {
  uint32_t slot;
  plain_store(&slot, dtype, 0, value);
  return plain_load(&slot, dtype, 0);
}

double plain_ulp(double value, feinwerk_dtype dtype) {
  static const int precision[] = {24, 8, 11}, lowest[] = {-149, -133, -24};
  int exponent = -1000;
  if (value != 0) frexp(value, &exponent);
  exponent -= precision[dtype];
  return ldexp(1, exponent > lowest[dtype] ? exponent : lowest[dtype]);
}

static float nf4_threshold(feinwerk_rule rule, int t) {
  const float middle = (plain_codebook[t] + plain_codebook[t + 1]) * 0.5f;
  if (rule == FEINWERK_RULE_CPU) return middle;
  // CUDA's literals differ from the midpoints by one ulp in four places.
  if (t == 0 || t == 8) return nextafterf(middle, t == 0 ? -1.0f : 1.0f);
  if (t == 12 || t == 14) return nextafterf(middle, 0.0f);
  return middle;
}

static int nf4_code(float scaled, feinwerk_rule rule) {
  if (isnan(scaled)) return rule == FEINWERK_RULE_CPU ? 15 : 0;
  int code = 0;
  while (code < 15 && scaled > nf4_threshold(rule, code)) ++code;
  return code;
}

void plain_nf4_quantize(const void* weight, feinwerk_dtype dtype, int64_t count, int64_t blocksize,
                        feinwerk_rule rule, uint8_t* packed, float* absmax) {
  memset(packed, 0, (size_t)(count / 2 + count % 2));
  for (int64_t block = 0; block * blocksize < count; ++block) {
    const int64_t begin = block * blocksize;
    const int partial = count - begin < blocksize;
    const int64_t end = partial ? count : begin + blocksize;
    const int cpu = rule == FEINWERK_RULE_CPU;
    float most = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float magnitude = fabsf(plain_load(weight, dtype, i));
      if (isnan(magnitude) ? cpu : magnitude > most) most = magnitude;
      if (isnan(most)) break;
    }
    const float least = 1e-38f;
    const float divisor = cpu && most < least ? least : most;
    absmax[block] = partial ? divisor : most;
    const float inverse = 1.0f / divisor;
    for (int64_t i = begin; i <= end; ++i) {
      // The low nibble after an odd last element is 7 (CPU) or the code of a zero (CUDA).
      const int padding = i == count;
      if (i == end && !(padding && count % 2)) break;
      const float value = padding ? 0.0f : plain_load(weight, dtype, i);
      float scaled = cpu && partial ? value / divisor : value * inverse;
      if (cpu && scaled > 1) scaled = 1;
      if (cpu && scaled < -1) scaled = -1;
      const int code = cpu && padding ? 7 : nf4_code(scaled, rule);
      packed[i / 2] = (uint8_t)(packed[i / 2] | (i % 2 ? code : code << 4));
    }
  }
}

float plain_nf4_absmax(const feinwerk_nf4_weight* weight, int64_t block) {
  if (!weight->absmax_codes) return weight->absmax[block];
  const float product =
      weight->nested_codebook[weight->absmax_codes[block]] * weight->nested_absmax[block / 256];
  return product + weight->nested_offset[0];
}

float plain_nf4_element(const feinwerk_nf4_weight* weight, int64_t element, feinwerk_dtype dtype) {
  const int byte = weight->packed[element / 2];
  const float absmax = plain_nf4_absmax(weight, element / weight->blocksize);
  return plain_round(plain_codebook[element % 2 ? byte & 15 : byte >> 4] * absmax, dtype);
}

void plain_blockwise_quantize(const float* x, float offset, int center, int64_t count,
                              int64_t row_length, int64_t blocksize, const float* codebook,
                              feinwerk_rule rule, uint8_t* codes, float* absmax) {
  int64_t end = 0;
  for (int64_t block = 0; end < count; ++block) {
    const int64_t begin = end, left = row_length - begin % row_length;
    end = begin + (left < blocksize ? left : blocksize);
    float most = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float magnitude = fabsf(center ? x[i] - offset : x[i]);
      if (magnitude > most) most = magnitude;
    }
    absmax[block] = most;
    const float inverse = 1.0f / most;
    for (int64_t i = begin; i < end; ++i) {
      float scaled = (center ? x[i] - offset : x[i]) * inverse;
      if (rule == FEINWERK_RULE_CPU) {
        // The value goes to the nearest of 65,536 points first, and that point to its code.
        if (scaled > 1) scaled = 1;
        if (scaled < -1) scaled = -1;
        const float half = (scaled + 1.0f) * 0.5f;
        const float position = (float)((double)half * 65535.0 + 0.5);
        const int bin = isnan(position) ? 0 : (int)position;
        scaled = (float)(bin + bin) / 65535.0f - 1.0f;
      }
      int code = 0;
      if (most > 0)
        while (code < 255 && scaled > (codebook[code] + codebook[code + 1]) * 0.5f) ++code;
      codes[i] = (uint8_t)code;
    }
  }
}
