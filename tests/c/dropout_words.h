// The words that lanes of counters are made of, and the masks of dropout that they draw: part of
// test_simd_words.cpp.
#ifndef FEINWERK_TESTS_C_DROPOUT_WORDS_H_
#define FEINWERK_TESTS_C_DROPOUT_WORDS_H_

#include "words.h"
// After it, which reads the vocabularies in their order.
#include "kernels/dropout.h"

extern "C" {
#include "plain.h"
}

namespace {

void test_unsigned_words() {
  constexpr uint32_t kEnds[] = {0, 1, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff};
  for (int n = 0; n < 1 << 14; ++n) {
    uint32_t a[kWidth], b[kWidth];
    int32_t both[kWidth], high[kWidth], low[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      a[i] = random_bits() % 4 ? random_bits() : kEnds[random_bits() % 6];
      b[i] = random_bits() % 4 ? random_bits() : kEnds[random_bits() % 6];
    }
    for (int i = 0; i < kWidth; i += kGroup) {
      ref::I up, down;
      const ref::I x = ref::load_dwords(a + i), y = ref::load_dwords(b + i);
      ref::multiply_words(x, y, &up, &down);
      memcpy(both + i, ref::xor_words(x, y).v, sizeof(x.v));
      memcpy(high + i, up.v, sizeof(up.v));
      memcpy(low + i, down.v, sizeof(down.v));
    }
    const fw::I x = fw::load_dwords(a), y = fw::load_dwords(b);
    fw::I up, down;
    fw::multiply_words(x, y, &up, &down);
    same_bits("xor_words", fw::xor_words(x, y), both, a[0]);
    same_bits("multiply_words (high)", up, high, a[0]);
    same_bits("multiply_words (low)", down, low, a[0]);
    uint32_t stored[kWidth], all[kWidth];
    fw::store_words(stored, x);
    same("store_words", stored, a, sizeof(a), a[0]);
    fw::store_words(stored, fw::set1_words(b[0]));
    for (uint32_t& word : all) word = b[0];
    same("set1_words", stored, all, sizeof(all), b[0]);
  }
}

// Masks against plain C, rows and columns past 32 bits included.
void test_dropout_masks() {
  constexpr int64_t kRows[] = {0, 1, 77, (int64_t{1} << 32) - 1, int64_t{5} << 32 | 9};
  constexpr int64_t kBlocks[] = {0, 1, 1000, (int64_t{1} << 28) - 1, int64_t{3} << 30 | 7};
  for (int64_t row : kRows)
    for (int64_t block : kBlocks) {
      feinwerk_dropout dropout = {};
      dropout.seed = uint64_t{random_bits()} << 32 | random_bits();
      dropout.drop_below = random_bits();
      dropout.keep_scale = 1;
      uint32_t got[2 * fw::kDropBlock], want[2 * fw::kDropBlock];
      fw::keep_blocks<2>(dropout, row, block, got);
      for (int64_t c = 0; c < 2 * fw::kDropBlock; ++c)
        want[c] = plain_dropout(&dropout, row, fw::kDropBlock * block + c) > 0 ? ~uint32_t{0} : 0;
      same("keep_blocks", got, want, sizeof(got), static_cast<uint32_t>(row));
    }
}

}  // namespace

#endif  // FEINWERK_TESTS_C_DROPOUT_WORDS_H_
