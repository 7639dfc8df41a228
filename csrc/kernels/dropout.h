// Dropout masks from Philox4x32-10: a word belongs to (seed, row, column) and to nothing else, so
// that every tiling of the forward and the backward draws the same mask and none is stored.
//
// Columns go in blocks of 64. Counter i of a block, i in [0, 16), serves its columns i, 16 + i,
// 32 + i and 48 + i with its four words: lanes of a vector are counters, and no word is moved.
// python/feinwerk/philox.py says the same in torch; docs/philox.md has the test vectors.
#ifndef FEINWERK_KERNELS_DROPOUT_H_
#define FEINWERK_KERNELS_DROPOUT_H_

#include "feinwerk/feinwerk.h"
#include "simd/simd.h"

namespace feinwerk {
namespace {

constexpr int64_t kDropBlock = 64;

// words[c]: the word of column 64 block + c of a row, for n blocks: a round waits for the one
// before, so several vectors go side by side.
template <int n>
inline void random_blocks(uint64_t seed, int64_t row, int64_t block, uint32_t* words) {
  constexpr int kCounters = 16;
  constexpr int kVectors = kCounters / kWidth;
  static constexpr uint32_t kCount[kCounters] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                 8, 9, 10, 11, 12, 13, 14, 15};
  const uint64_t r = static_cast<uint64_t>(row);
  I c[4][n * kVectors];
  for (int v = 0; v < n * kVectors; ++v) {
    const uint64_t first = static_cast<uint64_t>(block + v / kVectors) * kCounters;
    // `first` ends in four zero bits.
    c[0][v] = xor_words(set1_words(static_cast<uint32_t>(first)),
                        load_dwords(kCount + v % kVectors * kWidth));
    c[1][v] = set1_words(static_cast<uint32_t>(first >> 32));
    c[2][v] = set1_words(static_cast<uint32_t>(r));
    c[3][v] = set1_words(static_cast<uint32_t>(r >> 32));
  }
  const I m0 = set1_words(0xD2511F53), m1 = set1_words(0xCD9E8D57);
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
    const I key0 = set1_words(k0), key1 = set1_words(k1);
    for (int v = 0; v < n * kVectors; ++v) {
      I high0, low0, high1, low1;
      multiply_words(c[0][v], m0, &high0, &low0);
      multiply_words(c[2][v], m1, &high1, &low1);
      c[0][v] = xor_words(xor_words(high1, c[1][v]), key0);
      c[1][v] = low1;
      c[2][v] = xor_words(xor_words(high0, c[3][v]), key1);
      c[3][v] = low0;
    }
  }
  for (int v = 0; v < n * kVectors; ++v)
    for (int word = 0; word < 4; ++word)
      store_words(words + v / kVectors * kDropBlock + word * kCounters + v % kVectors * kWidth,
                  c[word][v]);
}

// keep[c]: all bits set where the element stays, else none.
template <int n>
inline void keep_blocks(const feinwerk_dropout& dropout, int64_t row, int64_t block,
                        uint32_t* keep) {
  random_blocks<n>(dropout.seed, row, block, keep);
  for (int i = 0; i < n * kDropBlock; ++i)
    keep[i] = keep[i] >= dropout.drop_below ? ~uint32_t{0} : 0;
}

inline float kept(float x, uint32_t keep) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits &= keep;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint16_t kept(uint16_t x, uint32_t keep) { return static_cast<uint16_t>(x & keep); }

// out[i] = x[i] where element (row, column + i) stays, else 0; column is a multiple of 64.
template <class Element>
inline void drop_row(const feinwerk_dropout& dropout, int64_t row, int64_t column, int64_t count,
                     const Element* x, Element* out) {
  constexpr int64_t kPair = 2 * kDropBlock;
  uint32_t keep[kPair];
  int64_t i = 0;
  for (; i + kPair <= count; i += kPair) {
    keep_blocks<2>(dropout, row, (column + i) / kDropBlock, keep);
    for (int64_t j = 0; j < kPair; ++j) out[i + j] = kept(x[i + j], keep[j]);
  }
  if (i == count) return;
  keep_blocks<2>(dropout, row, (column + i) / kDropBlock, keep);
  for (int64_t j = 0; j < count - i; ++j) out[i + j] = kept(x[i + j], keep[j]);
}

// values[i] *= keep_scale where element (row, column + i) stays, else 0.
inline void drop_values(const feinwerk_dropout& dropout, int64_t row, int64_t column, int64_t count,
                        float* values) {
  drop_row(dropout, row, column, count, values, values);
  for (int64_t i = 0; i < count; ++i) values[i] *= dropout.keep_scale;
}

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_DROPOUT_H_
