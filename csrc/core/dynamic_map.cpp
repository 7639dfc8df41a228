// Builds the dynamic maps bit for bit as python/feinwerk/codebook.py does (docs/format.md).
#include "core/dynamic_map.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace feinwerk {

namespace {

constexpr int kDecades = 7;

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// The centres of the equal cells of [0.1, 1], times 10^exponent.
void cell_centres(int cells, int exponent, float* centres) {
  const double low = 0.1f, high = 1.0;
  const double step = (1.0f - 0.1f) / static_cast<float>(cells);
  // Edges are counted from the nearer end, each with one rounding.
  const auto edge = [&](int i) {
    return static_cast<float>(2 * i < cells + 1 ? low + step * i : high - step * (cells - i));
  };
  const float power = static_cast<float>(std::pow(10.0, exponent));
  for (int i = 0; i < cells; ++i) centres[i] = (edge(i) + edge(i + 1)) / 2.0f * power;
}

DynamicMap make_map(bool is_signed) {
  DynamicMap map = {};
  // Magnitudes: zero, the decades, one.
  float magnitude[257];
  int count = 0, first_of[kDecades + 2], cells_of[kDecades + 2];
  magnitude[count++] = 0.0f;
  first_of[0] = 0;
  for (int d = 0; d < kDecades; ++d) {
    const int cells = (is_signed ? 1 : 2) << d;
    first_of[d + 1] = count;
    cells_of[d + 1] = cells;
    cell_centres(cells, d - (kDecades - 1), magnitude + count);
    count += cells;
  }
  first_of[kDecades + 1] = count;
  magnitude[count++] = 1.0f;

  const int zero = is_signed ? 127 : 0;
  for (int code = 0; code < 256; ++code)
    map.values[code] = code < zero ? -magnitude[zero - code] : magnitude[code - zero];
  for (int code = 0; code < 255; ++code)
    map.midpoints[code] = (map.values[code] + map.values[code + 1]) * 0.5f;
  map.midpoints[255] = std::numeric_limits<float>::infinity();

  const auto code_of = [&](float x) {
    return static_cast<uint8_t>(std::lower_bound(map.midpoints, map.midpoints + 255, x) -
                                map.midpoints);
  };
  for (int bucket = 0; bucket < DynamicMap::kBuckets; ++bucket) {
    const uint32_t bits = static_cast<uint32_t>(DynamicMap::kLowest + bucket) << 16;
    map.first[0][bucket] = bucket == 0 ? code_of(0.0f) : code_of(float_of(bits));
    map.first[1][bucket] = code_of(-float_of(bits | 0xffff));
  }

  // The largest magnitude of a group. The last two cells make a group of their own, so that every
  // threshold is where a cell of the group below it ends.
  const int last_cell = count - 2;
  const auto boundary = [&](int group) {
    return map.midpoints[zero + (group == kDecades ? last_cell : first_of[group + 1]) - 1];
  };
  for (int octave = 0; octave < 32; ++octave) {
    const float low = float_of(static_cast<uint32_t>(96 + octave) << 23);
    int group = 0;
    while (group < kDecades + 1 && low > boundary(group)) ++group;
    map.group[octave] = group;
    map.threshold[octave] =
        group <= kDecades ? boundary(group) : std::numeric_limits<float>::infinity();
  }
  // The float whose bits 16 to 23 are a number: its cells are twice as wide from 2^24 on.
  const int shown = is_signed ? 0 : 1;
  constexpr double kCell = 65536;
  const auto set_line = [&](int group, double x0, double x1, double first, double cells) {
    const double at = first + shown;
    const double wide = at < 128 ? 1 : 2;
    const double start = at < 128 ? 0x1p23 + kCell * at : 0x1p24 + 2 * kCell * (at - 128);
    const double multiply = kCell * wide * cells / (x1 - x0);
    map.multiply[group] = static_cast<float>(multiply);
    map.offset[group] = static_cast<float>(start - static_cast<double>(map.multiply[group]) * x0 +
                                           wide * DynamicMap::kNear);
  };
  const double zero_ends = boundary(0);
  set_line(0, 0, zero_ends, 0, 1);
  map.top[0] = static_cast<uint8_t>(shown);
  for (int d = 1; d <= kDecades; ++d) {
    const double power = std::pow(10.0, d - kDecades);
    set_line(d, 0.1 * power, power, first_of[d], cells_of[d]);
    map.top[d] = static_cast<uint8_t>(first_of[d] + cells_of[d] - 1 + shown);
  }
  set_line(kDecades + 1, boundary(kDecades), map.midpoints[zero + last_cell], last_cell, 1);
  map.top[kDecades + 1] = 255;
  return map;
}

}  // namespace

const DynamicMap (&dynamic_maps())[2] {
  static const DynamicMap maps[2] = {make_map(true), make_map(false)};
  return maps;
}

}  // namespace feinwerk
