// Checks every word of the vocabulary of one instruction set, bit by bit, against
// csrc/simd/scalar.h.
//
//   test_simd_words_<isa>          codes and bytes exhaustively, roundings at everything near a tie
//   test_simd_words_<isa> --full   roundings and codes of all floats
//
// Exits with 77 where the CPU lacks the instruction set.
#include "dropout_words.h"

namespace {

// One rounding of each kind, of kWidth floats at a time.
void check_roundings(const uint32_t* bits) {
  float x[kWidth];
  memcpy(x, bits, sizeof(x));
  uint16_t got[kWidth], want[kWidth];
  fw::store_bf16(got, fw::load(x));
  for (int i = 0; i < kWidth; i += kGroup) ref::store_bf16(want + i, ref::load(x + i));
  same("store_bf16", got, want, sizeof(got), bits[0]);
  fw::store_f16(got, fw::load(x));
  for (int i = 0; i < kWidth; i += kGroup) ref::store_f16(want + i, ref::load(x + i));
  same("store_f16", got, want, sizeof(got), bits[0]);
}

uint32_t waiting[kWidth];
int waiting_count = 0;
void rounding(uint32_t bits) {
  waiting[waiting_count++] = bits;
  if (waiting_count < kWidth) return;
  check_roundings(waiting);
  waiting_count = 0;
}

void test_roundings(bool full) {
  if (full) {
    for (uint64_t u = 0; u < uint64_t{1} << 32; ++u) rounding(static_cast<uint32_t>(u));
    return;
  }
  // A rounding sees the bits it keeps, the first it drops, and whether any other is set.
  for (uint32_t kept = 0; kept < 1u << 16; ++kept)
    for (uint32_t dropped : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      rounding(kept << 16 | dropped);
  for (uint32_t kept = 0; kept < 1u << 19; ++kept)
    for (uint32_t dropped : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x1fffu})
      rounding(kept << 13 | dropped);
  // Every number of fp16's subnormal range and every tie between two of them, and beside both.
  for (uint32_t half = 0; half <= 2 * 1024; ++half) {
    const uint32_t exact = ref::bits_of(static_cast<float>(half) * 0x1p-25f);
    for (uint32_t bits : {exact, exact + 1, half ? exact - 1 : exact}) {
      rounding(bits);
      rounding(bits | 0x80000000u);
    }
  }
  for (int i = 0; i < 1 << 20; ++i) rounding(random_bits());
}

void test_16_bit_loads() {
  for (uint32_t first = 0; first < 1u << 16; first += kWidth) {
    uint16_t half[kWidth];
    float want[kWidth], got[kWidth];
    for (int i = 0; i < kWidth; ++i)
      half[i] = static_cast<uint16_t>(first + static_cast<uint32_t>(i));
    for (int i = 0; i < kWidth; i += kGroup) ref::store(want + i, ref::load_bf16(half + i));
    same_bits("load_bf16", fw::load_bf16(half), want, first);
    for (int i = 0; i < kWidth; i += kGroup) ref::store(want + i, ref::load_f16(half + i));
    fw::store(got, fw::load_f16(half));
    // Hardware makes a signalling NaN quiet, which changes nothing that is computed from it.
    for (int i = 0; i < kWidth; ++i)
      for (float* x : {got + i, want + i})
        if (isnan(*x)) *x = ref::float_of_bits(ref::bits_of(*x) | 0x400000u);
    same("load_f16", got, want, sizeof(got), first);
  }
}

void test_arithmetic() {
  const bool fma_rounds_twice = strcmp(kIsa, "scalar") == 0;
  const auto check = [=](const float* a, const float* b, const float* c) {
    float sum[kWidth], product[kWidth], fused[kWidth], spread[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      sum[i] = a[i] + b[i];
      product[i] = a[i] * b[i];
      fused[i] = fma_rounds_twice ? product[i] + c[i] : fmaf(a[i], b[i], c[i]);
      spread[i] = a[0];
    }
    const uint32_t input = ref::bits_of(a[0]);
    const fw::F va = fw::load(a), vb = fw::load(b);
    same_bits("load", va, a, input);
    same_numbers("set1", fw::set1(a[0]), spread, input);
    same_numbers("add", fw::add(va, vb), sum, input);
    same_numbers("mul", fw::mul(va, vb), product, input);
    same_numbers("fma", fw::fma(va, vb, fw::load(c)), fused, input);
  };
  float a[kWidth], b[kWidth], c[kWidth];
  for (int i = 0; i < kSpecials; ++i)
    for (int j = 0; j < kSpecials; ++j)
      for (int k = 0; k < kSpecials; ++k) {
        for (int l = 0; l < kWidth; ++l) {
          a[l] = special(i + l);
          b[l] = special(j + 3 * l);
          c[l] = special(k + 7 * l);
        }
        check(a, b, c);
      }
  for (int n = 0; n < 1 << 16; ++n) {
    for (int l = 0; l < kWidth; ++l) {
      a[l] = random_float();
      b[l] = n % 2 ? random_float() : ref::float_of_bits(random_bits());
      c[l] = n % 3 ? -a[l] * b[l] : random_float();  // cancels: one rounding shows
    }
    check(a, b, c);
    int32_t whole[kWidth], lower[kWidth] = {};
    float want[kWidth];
    for (int l = 0; l < kWidth; ++l) {
      whole[l] = static_cast<int32_t>(random_bits()) >> (n % 32);
      if (l < kWidth / 2) lower[l] = whole[l];
      want[l] = static_cast<float>(whole[l]);
    }
    same_bits("load_dwords", fw::load_dwords(whole), whole, 0);
    same_bits("load_half_dwords", fw::load_half_dwords(whole), lower, 0);
    same_bits("to_float", fw::to_float(fw::load_dwords(whole)), want, 0);
    float tree[kWidth];
    memcpy(tree, a, sizeof(tree));
    for (int half = kWidth / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) tree[l] += tree[l + half];
    const float sum = fw::reduce_add(fw::load(a));
    same("reduce_add", &sum, tree, 4, ref::bits_of(a[0]));
  }
  const float zeros[kWidth] = {};
  same_bits("zero", fw::zero(), zeros, 0);
}

void test_magnitudes() {
  for (int n = 0; n < 1 << 14; ++n) {
    float x[kWidth], y[kWidth];
    int32_t bits[kWidth], most[kWidth], top = 0;
    for (int i = 0; i < kWidth; ++i) {
      x[i] = n % 2 ? special(static_cast<int>(random_bits() % kSpecials)) : random_float();
      y[i] = n % 3 ? special(n + i) : ref::float_of_bits(random_bits());
      bits[i] = static_cast<int32_t>(ref::bits_of(x[i]) & 0x7fffffffu);
      const auto other = static_cast<int32_t>(ref::bits_of(y[i]) & 0x7fffffffu);
      most[i] = bits[i] > other ? bits[i] : other;
      top = most[i] > top ? most[i] : top;
    }
    same_bits("abs_bits", fw::abs_bits(fw::load(x)), bits, 0);
    const fw::I both = fw::max_bits(fw::abs_bits(fw::load(x)), fw::abs_bits(fw::load(y)));
    same_bits("max_bits", both, most, 0);
    const uint32_t reduced = fw::reduce_max_bits(both);
    same("reduce_max_bits", &reduced, &top, 4, 0);
  }
}

// Every byte at every place, and with random neighbours.
void check_table(const char* word, fw::Table16 table, const float* values) {
  for (uint32_t byte = 0; byte < 256; ++byte)
    for (int at = 0; at < kWidth / 2; ++at) {
      uint8_t packed[kWidth / 2];
      for (uint8_t& p : packed) p = static_cast<uint8_t>(random_bits() >> 24);
      packed[at] = static_cast<uint8_t>(byte);
      ref::Table16 meant;
      memcpy(meant.v, values, sizeof(meant.v));
      float want[kWidth];
      for (int i = 0; i < kWidth; i += kGroup)
        ref::store(want + i, ref::decode(meant, packed + i / 2));
      same_bits(word, fw::decode(table, packed), want, byte);
    }
  for (uint32_t byte = 0; byte < 256; ++byte)
    for (int at = 0; at < kWidth; ++at) {
      uint32_t dwords[kWidth];
      for (uint32_t& d : dwords) d = random_bits();
      dwords[at] = byte * 0x01010101u;
      check_nibble<0>(table, values, dwords);
      check_nibble<1>(table, values, dwords);
      check_nibble<2>(table, values, dwords);
      check_nibble<3>(table, values, dwords);
      check_nibble<4>(table, values, dwords);
      check_nibble<5>(table, values, dwords);
      check_nibble<6>(table, values, dwords);
      check_nibble<7>(table, values, dwords);
    }
#if defined(__AVX512BW__)
  uint8_t packed[16];
  uint16_t got[32], want[32];
  for (uint32_t byte = 0; byte < 256; ++byte)
    for (int at = 0; at < 16; ++at) {
      for (uint8_t& p : packed) p = static_cast<uint8_t>(random_bits() >> 24);
      packed[at] = static_cast<uint8_t>(byte);
      for (int i = 0; i < 32; ++i)
        want[i] = ref::bf16_of_float(values[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4]);
      const fw::I words = fw::decode32_bf16(fw::table_bf16(table), packed);
      memcpy(got, &words, sizeof(got));
      same("decode32_bf16", got, want, sizeof(got), byte);
    }
#endif
}

void test_tables() {
  for (int round = 0; round < 8; ++round) {
    float values[16];
    for (int i = 0; i < 16; ++i)
      values[i] = round == 0  ? fw::kNf4Codebook[i]
                  : round < 5 ? special(8 * round + i)
                              : random_float();
    const fw::Table16 table = fw::table16(values);
    const ref::Table16 meant = ref::table16(values);
    check_table("decode", table, values);
    check_table("round_bf16", fw::round_bf16(table), ref::round_bf16(meant).v);
    check_table("round_f16", fw::round_f16(table), ref::round_f16(meant).v);
    // No NaN in or out here: an arithmetic word may give another one.
    for (float factor : {1.0f, 0.3f, -0x1p-126f, 0x1p-140f, 65504.0f, 0x1p120f}) {
      for (float& v : values) v = isfinite(v) ? v : 0.7f;
      const fw::Table16 scaled = fw::scale(fw::table16(values), factor);
      check_table("scale", scaled, ref::scale(ref::table16(values), factor).v);
    }
  }
}

template <bool nan_high>
void check_codes(const float* thresholds, const float* x) {
  int32_t want[kWidth];
  for (int i = 0; i < kWidth; i += kGroup) {
    const ref::I codes = ref::nf4_code<nan_high>(ref::load(x + i), thresholds);
    memcpy(want + i, codes.v, sizeof(codes.v));
  }
  const uint32_t input = ref::bits_of(x[0]);
  for (int i = 0; i < kWidth; ++i)
    if (isnan(x[i]) && want[i] != (nan_high ? 15 : 0)) same("NaN", "no", "ok", 2, input);
  const fw::I codes = fw::nf4_code<nan_high>(fw::load(x), thresholds);
  same_bits("nf4_code", codes, want, input);
  uint8_t got[kWidth / 2], packed[kWidth / 2];
  fw::store_codes(got, codes);
  for (int i = 0; i < kWidth; i += 2)
    packed[i / 2] = static_cast<uint8_t>(want[i] * 16 + want[i + 1]);
  same("store_codes", got, packed, sizeof(got), input);
}

void test_nf4_codes() {
  for (const float* thresholds : {fw::kNf4ThresholdsCpu, fw::kNf4ThresholdsCuda}) {
    float x[kWidth];
    const auto check = [&] {
      check_codes<true>(thresholds, x);
      check_codes<false>(thresholds, x);
    };
    for (int n = 0; n < 1 << 14; ++n) {
      for (int i = 0; i < kWidth; ++i) {
        const float threshold = thresholds[random_bits() % 15];
        const float beside[] = {nextafterf(threshold, -2), threshold, nextafterf(threshold, 2)};
        x[i] = n % 4 == 0   ? random_float()
               : n % 4 == 1 ? special(n + i)
                            : beside[random_bits() % 3];
      }
      check();
    }
    for (int t = 0; t < 15; ++t)
      for (float to : {-2.0f, thresholds[t], 2.0f}) {
        for (int i = 0; i < kWidth; ++i) x[i] = nextafterf(thresholds[t], to);
        check();
      }
  }
  for (int32_t byte = 0; byte < 256; ++byte)
    for (int at = 0; at < kWidth; at += 2) {
      int32_t codes[kWidth];
      uint8_t got[kWidth / 2], want[kWidth / 2];
      for (int i = 0; i < kWidth; ++i) codes[i] = static_cast<int32_t>(random_bits() >> 28);
      codes[at] = byte >> 4;
      codes[at + 1] = byte & 15;
      for (int i = 0; i < kWidth; i += 2)
        want[i / 2] = static_cast<uint8_t>(codes[i] * 16 + codes[i + 1]);
      fw::store_codes(got, fw::load_dwords(codes));
      same("store_codes", got, want, sizeof(got), static_cast<uint32_t>(byte));
    }
}

// Every byte at every position of a whole piece, and a rest that is left alone.
void test_look_up_words() {
#if defined(__AVX512BW__)
  float table[256];
  for (float& v : table) v = ref::float_of_bits(random_bits());
  for (uint32_t n = 0; n < 32 * 256; ++n) {
    uint8_t codes[63];
    float want[64] = {}, got[64] = {};  // the last one: how many were looked up
    for (uint8_t& c : codes) c = static_cast<uint8_t>(random_bits() >> 24);
    codes[n / 256] = static_cast<uint8_t>(n);
    for (int i = 0; i < 32; ++i) memcpy(want + i, table + codes[i], 4);
    want[63] = 32;
    got[63] = static_cast<float>(fw::look_up_words(table, codes, 63, got));
    same("look_up_words", got, want, sizeof(got), n);
  }
#endif
}

void test_moves() {
  float scales[64];
  for (float& v : scales) v = random_float();
  for (int64_t c = 0; (c + 1) * kWidth <= 8 * 64; ++c) {
    float want[kWidth];
    for (int i = 0; i < kWidth; ++i) want[i] = scales[(c * kWidth + i) / 8];
    same_bits("spread8", fw::spread8(scales, c), want, static_cast<uint32_t>(c));
  }
  fw::F rows[kWidth];
  uint32_t before[kWidth][kWidth];
  for (int r = 0; r < kWidth; ++r) {
    float row[kWidth];
    for (int i = 0; i < kWidth; ++i) before[r][i] = random_bits();
    memcpy(row, before[r], sizeof(row));
    rows[r] = fw::load(row);
  }
  fw::transpose(rows);
  for (int r = 0; r < kWidth; ++r) {
    float want[kWidth];
    for (int i = 0; i < kWidth; ++i) memcpy(want + i, &before[i][r], 4);
    same_bits("transpose", rows[r], want, static_cast<uint32_t>(r));
  }
}

void test_dot_codes() {
  for (int n = 0; n < 1 << 14; ++n) {
    int8_t table[16], high[4 * kWidth], low[4 * kWidth];
    uint32_t codes[kWidth];
    int32_t acc[kWidth], start[kWidth], want[kWidth];
    for (int8_t& t : table) t = random_quant();
    for (int8_t& x : high) x = random_quant();
    for (int8_t& x : low) x = random_quant();
    for (uint32_t& c : codes) c = random_bits();
    codes[n % kWidth] = static_cast<uint32_t>(n / kWidth % 256) * 0x01010101u;
    for (int i = 0; i < kWidth; ++i) {
      int32_t sum = 0;
      for (int b = 4 * i; b < 4 * i + 4; ++b) sum += high[b] + low[b];
      acc[i] = static_cast<int32_t>(random_bits()) >> 8;
      start[i] = acc[i] - fw::kBias8 * sum;
    }
    for (int i = 0; i < kWidth; i += kGroup) {
      const ref::I dot = ref::dot_codes(ref::load_dwords(acc + i), ref::table8(table),
                                        ref::load_dwords(codes + i), high + 4 * i, low + 4 * i);
      memcpy(want + i, dot.v, sizeof(dot.v));
    }
    const fw::I got =
        fw::dot_codes(fw::load_dwords(start), fw::table8(table), fw::load_dwords(codes), high, low);
    same_bits("dot_codes", got, want, codes[0]);
  }
}

// nf4_code_in_bins has to be nf4_code for every x that x / absmax can be: up to 1 + 2^-20.
void test_codes_in_bins(bool full) {
  const uint32_t last = ref::bits_of(1 + 0x1p-20f);
  for (const float* thresholds : {fw::kNf4ThresholdsCpu, fw::kNf4ThresholdsCuda}) {
    const fw::CodeBins bins = fw::code_bins(thresholds);
    const auto check = [&](uint32_t first) {  // kWidth neighbours, of both signs
      float x[kWidth], minus[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const uint32_t bits = first + static_cast<uint32_t>(i);
        x[i] = ref::float_of_bits(bits < last ? bits : last);
        minus[i] = -x[i];
      }
      for (const float* p : {x, minus}) {
        int32_t want[kWidth];
        for (int i = 0; i < kWidth; i += kGroup) {
          const ref::I codes = ref::nf4_code<false>(ref::load(p + i), thresholds);
          memcpy(want + i, codes.v, sizeof(codes.v));
        }
        same_bits("nf4_code_in_bins", fw::nf4_code_in_bins(fw::load(p), bins), want, first);
      }
    };
    for (int t = 0; t < 15; ++t)
      for (uint32_t i = 0; i < 64; ++i) check(ref::bits_of(fabsf(thresholds[t])) + i - 32);
    for (int edge = 0; edge <= 1024; ++edge)  // edges of up to 1024 equal bins, and of 15.99's
      for (float scale : {1.0f / 1024, 1 / 15.99f}) {
        const float x = fabsf(static_cast<float>(edge) * scale - 1);
        for (uint32_t i = 0; i < 64; i += kWidth)
          if (x > 0 && x <= 1) check(ref::bits_of(x) + i - 32);
      }
    const uint32_t step = full ? kWidth : 12007;
    for (uint32_t first = 0; first <= last; first += step) check(first);
    check(last);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (!cpu_has_it()) {
    printf("test_simd_words: this CPU lacks %s\n", kIsa);
    return 77;
  }
  test_arithmetic();
  test_magnitudes();
  test_16_bit_loads();
  test_tables();
  test_nf4_codes();
  test_look_up_words();
  test_moves();
  test_dot_codes();
  test_unsigned_words();
  test_dropout_masks();
  const bool full = argc > 1 && strcmp(argv[1], "--full") == 0;
  test_codes_in_bins(full);
  test_roundings(full);
  if (failures == 0)
    printf("test_simd_words: %s: %lld checks passed\n", kIsa, static_cast<long long>(checks));
  return failures != 0;
}
