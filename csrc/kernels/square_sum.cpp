// square_sum: the rows' sums of squares in fp64, each in one order, added up exactly in integers.
#include "kernels/decode.h"
#include "kernels/kernels.h"

namespace feinwerk {
namespace {

constexpr int64_t kLanes = 16, kBlock = 1024;

// The sum of up to kBlock squares: lanes in turn, then folded. Plain loops: lanes do not depend on
// each other, so that compilers make vectors of them without reordering a sum.
inline double block_sum(const float* x, int64_t count) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      const double value = static_cast<double>(x[i + j]);
      lane[j] += value * value;
    }
  for (int64_t j = 0; i + j < count; ++j) {
    const double value = static_cast<double>(x[i + j]);
    lane[j] += value * value;
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

template <class Dtype>
inline double row_sum(const typename Dtype::Element* x, int64_t count) {
  float piece[kBlock];
  double sum = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t some = min64(kBlock, count - first);
    for (int64_t i = 0; i < some; i += kWidth)
      write_part<Float32>(piece + i, some - i, read_part<Dtype>(x + first + i, some - i));
    sum += block_sum(piece, some);
  }
  return sum;
}
template <>
inline double row_sum<Float32>(const float* x, int64_t count) {
  double sum = 0;
  for (int64_t first = 0; first < count; first += kBlock)
    sum += block_sum(x + first, min64(kBlock, count - first));
  return sum;
}

// Adds a sum of squares of fp32 numbers, a multiple of 2^-298 below 2^300, to limbs that start at
// 2^-300.
inline void add_exactly(double sum, int64_t* limbs) {
  constexpr int kBias = 1075 - 300;  // of the exponent of a 53-bit integer
  uint64_t bits;
  memcpy(&bits, &sum, 8);
  const int exponent = static_cast<int>(bits >> 52);
  if (exponent == 0x7ff) {
    ++limbs[kSquareSumLimbs + (bits << 12 ? 1 : 0)];
    return;
  }
  if (bits == 0) return;
  uint64_t integer = (bits & 0xfffffffffffff) | uint64_t{1} << 52;
  int shift = exponent - kBias;
  if (shift < 0) {
    integer >>= -shift;  // zeros
    shift = 0;
  }
  constexpr int64_t kMask = (1 << kSquareSumBits) - 1;
  const int limb = shift / kSquareSumBits, inside = shift % kSquareSumBits;
  const uint64_t low = (integer << inside) & kMask;
  const uint64_t rest = integer >> (kSquareSumBits - inside);
  limbs[limb] += static_cast<int64_t>(low);
  // A sum below 2^300 has nothing beyond the last limb.
  if (rest) limbs[limb + 1] += static_cast<int64_t>(rest) & kMask;
  if (rest >> kSquareSumBits) limbs[limb + 2] += static_cast<int64_t>(rest >> kSquareSumBits);
}

}  // namespace

namespace FEINWERK_ISA_NAME {

void square_sum(const feinwerk_rows& rows, int64_t begin, int64_t end, int64_t* limbs) {
  with_dtype(rows.dtype, [&](auto dtype) {
    using Dtype = decltype(dtype);
    const auto* x = static_cast<const typename Dtype::Element*>(rows.data);
    for (int64_t row = begin; row < end; ++row)
      add_exactly(row_sum<Dtype>(x + row * rows.cols, rows.cols), limbs);
  });
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
