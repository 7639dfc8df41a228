// Dropout masks from Philox4x32-10: a word belongs to (seed, row, column) and to nothing else, so
// that every tiling of the forward and the backward draws the same mask and none is stored.
//
// Columns go in blocks of 64. Counter i of a block, i in [0, 16), serves its columns i, 16 + i,
// 32 + i and 48 + i with its four words: lanes of a vector are counters, and no word is moved.
// python/feinwerk/philox.py says the same in torch; docs/philox.md has the test vectors.
#ifndef FEINWERK_KERNELS_DROPOUT_H_
#define FEINWERK_KERNELS_DROPOUT_H_

#include "kernels/decode.h"

namespace feinwerk {
namespace {

constexpr int64_t kDropBlock = 64;

// keep[c]: all bits set where column 64 block + c of a row stays, else none.
// Plain loops over 16 counters, which the compiler turns into vectors.
inline void keep_block(const feinwerk_dropout& dropout, int64_t row, int64_t block,
                       uint32_t (&keep)[kDropBlock]) {
  constexpr int kLanes = 16;
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  const uint64_t first = static_cast<uint64_t>(block) * kLanes, r = static_cast<uint64_t>(row);
  for (int i = 0; i < kLanes; ++i) {
    c0[i] = static_cast<uint32_t>(first) + static_cast<uint32_t>(i);
    c1[i] = static_cast<uint32_t>(first >> 32);
    c2[i] = static_cast<uint32_t>(r);
    c3[i] = static_cast<uint32_t>(r >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(dropout.seed);
  uint32_t k1 = static_cast<uint32_t>(dropout.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53} * c0[i], p1 = uint64_t{0xCD9E8D57} * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  const uint32_t below = dropout.drop_below;
  for (int i = 0; i < kLanes; ++i) {
    keep[i] = c0[i] >= below ? ~uint32_t{0} : 0;
    keep[16 + i] = c1[i] >= below ? ~uint32_t{0} : 0;
    keep[32 + i] = c2[i] >= below ? ~uint32_t{0} : 0;
    keep[48 + i] = c3[i] >= below ? ~uint32_t{0} : 0;
  }
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
  for (int64_t i = 0; i < count; i += kDropBlock) {
    uint32_t keep[kDropBlock];
    keep_block(dropout, row, (column + i) / kDropBlock, keep);
    if (count - i >= kDropBlock)
      for (int64_t j = 0; j < kDropBlock; ++j) out[i + j] = kept(x[i + j], keep[j]);
    else
      for (int64_t j = 0; j < count - i; ++j) out[i + j] = kept(x[i + j], keep[j]);
  }
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
