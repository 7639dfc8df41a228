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

  // magnitude of the last number of a group -> boundary to the next group
  const auto boundary = [&](int group) { return map.midpoints[zero + first_of[group + 1] - 1]; };
  for (int octave = 0; octave < 32; ++octave) {
    const float low = float_of(static_cast<uint32_t>(96 + octave) << 23);
    int group = 0;
    while (group < kDecades + 1 && low > boundary(group)) ++group;
    map.group[octave] = group;
    map.threshold[octave] =
        group <= kDecades ? boundary(group) : std::numeric_limits<float>::infinity();
  }
  constexpr double kCell = DynamicMap::kCell, kNear = DynamicMap::kNear;
  for (int d = 1; d <= kDecades; ++d) {
    const double cells = cells_of[d], first = first_of[d];
    map.multiply[d] = static_cast<float>(kCell * cells / 0.9 * std::pow(10.0, kDecades - d));
    map.offset[d] = static_cast<float>(kCell * (first - cells / 9.0) + kNear);
    map.top[d] = first_of[d] + cells_of[d] - 1;
  }
  // The middle of a cell, wherever in the group x is.
  for (const int group : {0, kDecades + 1}) {
    map.offset[group] = static_cast<float>(kCell * (first_of[group] + 0.5));
    map.top[group] = first_of[group];
  }
  return map;
}

}  // namespace

const DynamicMap (&dynamic_maps())[2] {
  static const DynamicMap maps[2] = {make_map(true), make_map(false)};
  return maps;
}

}  // namespace feinwerk
