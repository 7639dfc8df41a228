// The ordered mean and the bin table of 8-bit block quantization.
#include "core/blockwise.h"

#include <algorithm>

namespace feinwerk {

namespace {

constexpr int kLevels = 4;  // of the cascade
constexpr int kRows = 4;    // vectors a cascade step reads

int ceil_log2(int64_t value) {
  int bits = 0;
  while ((int64_t{1} << bits) < value) ++bits;
  return bits;
}

// Sums x as `kRows` interleaved vectors of `lanes` floats. Level 0 takes 2^power rows, then spills
// into level 1, which spills into level 2 after as many spills, and so on: partial sums of like
// size meet, so the error grows with log(count) instead of count.
template <int lanes>
float cascade_sum(const float* x, int64_t count) {
  constexpr int kWide = kRows * lanes;
  const int64_t vectors = count / lanes, rows = vectors / kRows;
  const int power = std::max(4, ceil_log2(rows) / kLevels);
  const int64_t step = int64_t{1} << power, mask = step - 1;
  float level[kLevels][kWide] = {};
  const auto add_row = [&](int64_t row) {
    for (int i = 0; i < kWide; ++i) level[0][i] += x[row * kWide + i];
  };
  int64_t row = 0;
  while (row + step <= rows) {
    for (int64_t j = 0; j < step; ++j) add_row(row++);
    for (int j = 1; j < kLevels; ++j) {
      for (int i = 0; i < kWide; ++i) {
        level[j][i] += level[j - 1][i];
        level[j - 1][i] = 0;
      }
      if ((row & (mask << (j * power))) != 0) break;
    }
  }
  while (row < rows) add_row(row++);
  for (int j = 1; j < kLevels; ++j)
    for (int i = 0; i < kWide; ++i) level[0][i] += level[j][i];
  for (int64_t vector = rows * kRows; vector < vectors; ++vector)
    for (int i = 0; i < lanes; ++i) level[0][i] += x[vector * lanes + i];
  for (int j = 1; j < kRows; ++j)
    for (int i = 0; i < lanes; ++i) level[0][i] += level[0][j * lanes + i];
  float sum = 0;
  for (int64_t k = vectors * lanes; k < count; ++k) sum += x[k];
  for (int i = 0; i < lanes; ++i) sum += level[0][i];
  return sum;
}

}  // namespace

float ordered_mean(const float* x, int64_t count) {
  constexpr int kLanes = 8;
  const float sum = count >= kLanes ? cascade_sum<kLanes>(x, count) : cascade_sum<1>(x, count);
  return sum / static_cast<float>(count);
}

void fill_bins(const float* codebook, uint8_t* bins) {
  const auto value = [](int64_t bin) { return static_cast<float>(bin + bin) / 65535.0f - 1.0f; };
  int64_t first = 0;
  for (int code = 0; code < 256; ++code) {
    // The bins of this code end before the first value above its upper midpoint. Values grow with
    // the bin, so a division finds it but for its rounding.
    int64_t end = kBinCount;
    if (code < 255) {
      const float middle = (codebook[code] + codebook[code + 1]) * 0.5f;
      const double guess = (static_cast<double>(middle) + 1.0) * 32767.5;
      end = guess < 0 ? 0 : guess > kBinCount ? kBinCount : static_cast<int64_t>(guess);
      while (end > 0 && value(end - 1) > middle) --end;
      while (end < kBinCount && !(value(end) > middle)) ++end;
    }
    for (; first < end; ++first) bins[first] = static_cast<uint8_t>(code);
  }
}

}  // namespace feinwerk
