// The low-rank products of the adapters, always in fp32, whatever the engine of the base product:
// they are one or two percent of its work, and fp32 adapters keep their precision.
//
//   shrink   S^T = A x^T     a group of kWidth rows of x, packed as lanes, against all rows of A
//   expand   C += B T        added to the accumulators of the base product
#ifndef FEINWERK_KERNELS_LOW_RANK_H_
#define FEINWERK_KERNELS_LOW_RANK_H_

#include "kernels/dropout.h"
#include "kernels/panels.h"

namespace feinwerk {
namespace {

constexpr int64_t kRankRows = 64;  // rows of A at once
constexpr int64_t kFewRows = 4;    // rows of x that need no packing
constexpr int64_t kShrinkDepth = Fp32Engine::kDepth;

// A panel of A: a[j * kDepth + t], rows [j, j + rows) and columns [k, k + size) of [r, length].
using Panel = float*;

// Scratch of shrink.
constexpr int64_t kShrinkBytes =
    (kShrinkDepth * kWidth + kRankRows * kShrinkDepth + kShrinkDepth * kWidth) * 4;

// out[j * kWidth + lane] = sum over k of A[j][k] x[lane][k], lanes past `rows` zero; with dropout,
// x is masked and not scaled. read(j, rows, k, size, a) fills a panel of A.
template <class Dtype, class ReadPanel>
void shrink(const typename Dtype::Element* x, int64_t rows, int64_t length, int64_t r,
            const feinwerk_dropout* dropout, int64_t row, const ReadPanel& read, uint8_t* scratch,
            float* out) {
  using Element = typename Dtype::Element;
  auto* b = reinterpret_cast<float*>(scratch);
  float* const a = b + kShrinkDepth * kWidth;
  auto* masked = reinterpret_cast<Element*>(a + kRankRows * kShrinkDepth);
  if (length == 0) memset(out, 0, static_cast<size_t>(r * kWidth) * 4);
  for (int64_t j = 0; j < r; j += kRankRows)
    for (int64_t k = 0; k < length; k += kShrinkDepth) {
      const int64_t size = min64(kShrinkDepth, length - k), count = min64(kRankRows, r - j);
      const Element* from = x + k;
      int64_t stride = length;
      if (dropout) {
        for (int64_t i = 0; i < rows; ++i)
          drop_row(*dropout, row + i, k, size, from + i * stride, masked + i * kShrinkDepth);
        from = masked;
        stride = kShrinkDepth;
      }
      pack_lanes<Dtype>(Fp32Engine{}, from, stride, rows, size, round_up(size, kWidth), b);
      read(j, count, k, size, a);
      multiply(Fp32Engine{}, a, count, b, 0, 1, size, out + j * kWidth, kWidth, k == 0);
    }
}

// The same sums for a few rows of x, straight from A [r, length]: one row of A after the other, as
// it comes from memory once and in one stream.
template <class Dtype, int rows>
void dot_rows(const typename Dtype::Element* x, int64_t length, const float* A, int64_t r,
              float* out) {
  constexpr int kSums = 4;  // of every row of x, so that additions overlap
  for (int64_t j = 0; j < r; ++j, A += length) {
    F sums[kSums][rows];
    for (auto& part : sums)
      for (F& sum : part) sum = zero();
    int64_t k = 0;
    for (; k + kSums * kWidth <= length; k += kSums * kWidth)
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        const int64_t at = k + i * kWidth;
        const F a = load(A + at);
#pragma GCC unroll 4
        for (int m = 0; m < rows; ++m)
          sums[i][m] = fma(a, Dtype::read(x + m * length + at), sums[i][m]);
      }
    for (; k < length; k += kWidth)
      for (int m = 0; m < rows; ++m)
        sums[0][m] = fma(read_part<Float32>(A + k, length - k),
                         read_part<Dtype>(x + m * length + k, length - k), sums[0][m]);
    for (int m = 0; m < rows; ++m)
      out[j * kWidth + m] =
          reduce_add(add(add(sums[0][m], sums[1][m]), add(sums[2][m], sums[3][m])));
  }
}
template <class Dtype>
void dot_few_rows(const typename Dtype::Element* x, int64_t rows, int64_t length, const float* A,
                  int64_t r, float* out) {
  if (rows == 1)
    dot_rows<Dtype, 1>(x, length, A, r, out);
  else if (rows == 2)
    dot_rows<Dtype, 2>(x, length, A, r, out);
  else if (rows == 3)
    dot_rows<Dtype, 3>(x, length, A, r, out);
  else
    dot_rows<Dtype, 4>(x, length, A, r, out);
}

// Panels of a row-major matrix [.., length].
inline auto row_panels(const float* A, int64_t length) {
  return [=](int64_t j, int64_t rows, int64_t k, int64_t size, Panel a) {
    for (int64_t i = 0; i < rows; ++i)
      memcpy(a + i * kShrinkDepth, A + (j + i) * length + k, static_cast<size_t>(size) * 4);
  };
}

// Panels of the transpose of B [length, r], row k of B times scale * gain[k] (gain may be null).
template <class Gain>
auto column_panels(const float* B, int64_t r, float scale, const Gain& gain) {
  return [=](int64_t j, int64_t rows, int64_t k, int64_t size, Panel a) {
    for (int64_t t = 0; t < size; t += kWidth)
      for (int64_t i = 0; i < rows; i += kWidth) {
        F block[kWidth];
        for (int64_t l = 0; l < kWidth; ++l)
          block[l] = t + l < size ? mul(read_part<Float32>(B + (k + t + l) * r + j + i, rows - i),
                                        set1(scale * gain(k + t + l)))
                                  : zero();
        transpose(block);
        for (int64_t l = 0; l < min64(kWidth, rows - i); ++l)
          store(a + (i + l) * kShrinkDepth + t, block[l]);
      }
  };
}

// c[i, :] += sum over j of B[i][j] t[j, :] for n_rows rows of B and `groups` groups of lanes:
// t[group][r][kWidth]. scratch: n_rows x kDepth floats.
inline void expand(const float* B, int64_t b_stride, int64_t n_rows, int64_t r, float scale,
                   const float* t, int64_t t_stride, int64_t groups, float* scratch, float* c,
                   int64_t c_stride) {
  for (int64_t j = 0; j < r; j += Fp32Engine::kDepth) {
    const int64_t size = min64(Fp32Engine::kDepth, r - j);
    for (int64_t i = 0; i < n_rows; ++i)
      for (int64_t l = 0; l < size; ++l)
        scratch[i * Fp32Engine::kDepth + l] = scale * B[i * b_stride + j + l];
    multiply(Fp32Engine{}, scratch, n_rows, t + j * kWidth, t_stride, groups, size, c, c_stride,
             false);
  }
}

// The gain of DoRA: magnitude / weight_norm, and nothing for a row without a direction.
inline float gain_of(const feinwerk_adapter& adapter, int64_t n) {
  if (!is_dora(adapter)) return 1.0f;
  const float norm = adapter.weight_norm[n];
  return norm == 0 ? 0.0f : adapter.magnitude[n] / norm;
}

// Rows [row, row + rows) in spans of one adapter each: body(first, count, adapter or null), in
// ascending order; first counts from `row`.
template <class Args, class Body>
void for_each_span(const Args& args, int64_t row, int64_t rows, const Body& body) {
  int64_t at = 0;
  const auto until = [&](int64_t end, const feinwerk_adapter* adapter) {
    if (end > at) body(at, end - at, adapter);
    at = max64(at, end);
  };
  for (int64_t e = 0; e < args.adapter_count && at < rows; ++e) {
    const feinwerk_adapter& adapter = args.adapters[e];
    if (adapter.row_end <= row || adapter.row_begin >= adapter.row_end) continue;
    until(min64(rows, adapter.row_begin - row), nullptr);
    until(min64(rows, adapter.row_end - row), &adapter);
  }
  until(rows, nullptr);
}

// The rows of one adapter inside a chunk, and where its scaling * S^T lies in the chunk's T:
// t[group][r][kWidth] for the lane groups that it touches, zero in lanes of other adapters.
struct Piece {
  const feinwerk_adapter* adapter;
  int64_t begin, end;     // rows, counted from the chunk's first
  int64_t group, groups;  // lane groups
  int64_t t;              // offset in floats
};

template <class Args, class Body>
void for_each_piece(const Args& args, int64_t row, int64_t rows, const Body& body) {
  Piece piece = {};
  for (int64_t e = 0; e < args.adapter_count; ++e) {
    piece.adapter = args.adapters + e;
    piece.begin = max64(0, piece.adapter->row_begin - row);
    piece.end = min64(rows, piece.adapter->row_end - row);
    if (piece.begin >= piece.end) continue;
    piece.group = piece.begin / kWidth;
    piece.groups = (piece.end + kWidth - 1) / kWidth - piece.group;
    body(piece);
    piece.t += piece.groups * piece.adapter->r * kWidth;
  }
}

// Floats that T takes at most for any chunk of `rows` rows.
template <class Args>
int64_t t_floats(const Args& args, int64_t rows) {
  int64_t count = 0;
  for (int64_t e = 0; e < args.adapter_count; ++e) {
    const feinwerk_adapter& adapter = args.adapters[e];
    const int64_t span = min64(rows, adapter.row_end - adapter.row_begin);
    if (span > 0) count += ((span + kWidth - 1) / kWidth + 1) * adapter.r * kWidth;
  }
  return count;
}

// S and T of one lane group of the chunk. With grad_y, S is what the forward left. A few rows may
// be cut into parts: each takes its share of the ranks.
template <class Dtype>
void pack_adapters(const LinearArgs& args, int64_t row, int64_t rows, int64_t group, float* t,
                   uint8_t* scratch, int64_t part, int64_t parts) {
  const int64_t cols = args.weight.nf4.cols, m = group * kWidth, count = min64(kWidth, rows - m);
  const auto* x = static_cast<const typename Dtype::Element*>(args.x) + (row + m) * cols;
  const bool dropping = drops(args.dropout), few = count <= kFewRows && !dropping;
  const float keep_scale = dropping ? args.dropout.keep_scale : 1.0f;
  for_each_piece(args, row, rows, [&](const Piece& piece) {
    if (group < piece.group || group >= piece.group + piece.groups) return;
    const feinwerk_adapter& adapter = *piece.adapter;
    const int64_t begin = few ? adapter.r * part / parts : 0;
    const int64_t end = few ? adapter.r * (part + 1) / parts : part == 0 ? adapter.r : 0;
    float* const to = t + piece.t + (group - piece.group) * adapter.r * kWidth;
    if (!args.grad_y && few)
      dot_few_rows<Dtype>(x, count, cols, adapter.lora_A + begin * cols, end - begin,
                          to + begin * kWidth);
    else if (!args.grad_y && end > 0)
      shrink<Dtype>(x, count, cols, adapter.r, dropping ? &args.dropout : nullptr, row + m,
                    row_panels(adapter.lora_A, cols), scratch, to);
    for (int64_t j = begin; j < end; ++j)
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        float& value = to[j * kWidth + lane];
        if (m + lane < piece.begin || m + lane >= piece.end) {
          value = 0;
          continue;
        }
        float& s = args.s[(row + m + lane) * args.s_cols + j];
        if (!args.grad_y) s = value * keep_scale;
        value = adapter.scaling * s;
      }
  });
}

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_LOW_RANK_H_
