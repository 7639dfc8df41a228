// A few rows of x: the matrix-vector kernels of gemv.h over units of rows of W, and their adapters.
// shared: x packed, then T of the adapters; scratch: the scales of kGemvGroup rows of W, as the
// kernels read them and as they lie in memory.
#ifndef FEINWERK_KERNELS_LINEAR_VECTOR_H_
#define FEINWERK_KERNELS_LINEAR_VECTOR_H_

#include "kernels/gemv.h"
#include "kernels/low_rank.h"

namespace feinwerk {
namespace {

// Of the scales of a row: one for every 64 elements, and one for the missing half of a chunk.
int64_t scale_stride(const feinwerk_nf4_weight& w) { return gemv_depth(w) / kScaleBlock; }
// Room for a group's scales, and for what a vector reads or writes beyond them.
int64_t scales_bytes(const feinwerk_nf4_weight& w) {
  return round_up((kGemvGroup * scale_stride(w) + kWidth) * 4, 64);
}

constexpr int64_t kPackParts = 4;  // of the ranks, each for a thread

// shared: x packed, then T.
int64_t vector_t(int64_t packed_row_bytes) { return round_up(kGemvRows * packed_row_bytes, 64); }

ProductPlan vector_plan(const LinearArgs& args, int64_t packed_row_bytes) {
  ProductPlan plan = {};
  plan.chunk_rows = kGemvRows;
  plan.pack_units = args.adapter_count > 0 ? kPackParts : 1;
  plan.units = (args.weight.nf4.rows + gemv_unit(args.weight.nf4) - 1) / gemv_unit(args.weight.nf4);
  plan.shared_bytes = vector_t(packed_row_bytes) + round_up(t_floats(args, kGemvRows) * 4, 64);
  plan.scratch_bytes =
      max64(2 * scales_bytes(args.weight.nf4), args.adapter_count > 0 ? kShrinkBytes : 0);
  return plan;
}

struct VectorRows {
  int64_t n, count, row_bytes, stride;
  const uint8_t* packed;
  float* scales;
};

// Calls body(rows) for every group of a unit, its scales read.
template <class Body>
void for_each_group(const feinwerk_nf4_weight& w, int64_t unit, uint8_t* scratch,
                    const Body& body) {
  const int64_t size = gemv_unit(w), end = min64(w.rows, (unit + 1) * size);
  const int64_t per_row = w.cols / kScaleBlock;
  VectorRows rows;
  rows.row_bytes = w.cols / 2;
  rows.stride = scale_stride(w);
  rows.scales = reinterpret_cast<float*>(scratch);
  for (rows.n = unit * size; rows.n < end; rows.n += kGemvGroup) {
    rows.count = min64(kGemvGroup, end - rows.n);
    rows.packed = w.packed + rows.n * rows.row_bytes;
    prefetch_scales(w, (rows.n + kGemvGroup) * per_row, kGemvGroup * per_row);
    if (rows.stride == per_row) {
      read_scales(w, rows.n * per_row, rows.count * per_row, rows.scales);
    } else {
      // Spread by one a row; what a vector writes beyond its row, the next one overwrites.
      auto* const flat = reinterpret_cast<float*>(scratch + scales_bytes(w));
      read_scales(w, rows.n * per_row, rows.count * per_row, flat);
      for (int64_t r = 0; r < rows.count; ++r) {
        float* const scales = rows.scales + r * rows.stride;
        for (int64_t i = 0; i < per_row; i += kWidth)
          store(scales + i, load(flat + r * per_row + i));
        scales[per_row] = 0;
      }
    }
    body(rows);
  }
}

// Rows of W from r on, n_rows at a time while they last, then one by one; out[m][i] as
// finish_vector takes it.
template <int n_rows, int m_rows, class Packed>
void vector_tiles(int64_t cols, const VectorRows& rows, int64_t r, const Packed* x, float* out) {
  for (; r + n_rows <= rows.count; r += n_rows) {
    float sums[n_rows][m_rows];
    gemv_tile(rows.packed + r * rows.row_bytes, rows.row_bytes, cols, rows.scales + r * rows.stride,
              rows.stride, x, sums);
    for (int i = 0; i < n_rows; ++i)
      for (int m = 0; m < m_rows; ++m) out[m * kGemvGroup + r + i] = sums[i][m];
  }
  if constexpr (n_rows > 1) vector_tiles<1, m_rows>(cols, rows, r, x, out);
}

// Adds the adapters, scales by DoRA's gain, adds the bias and writes; out[m][i]: y[row + m][rows.n
// + i] before all that, t: the lanes of for_each_piece.
template <class Dtype>
void finish_vector(const LinearArgs& args, int64_t row, int64_t m_rows, const VectorRows& rows,
                   float* out, const float* t) {
  using Element = typename Dtype::Element;
  for_each_piece(args, row, m_rows, [&](const Piece& piece) {
    const feinwerk_adapter& adapter = *piece.adapter;
    // The next group's rows of B, while its codes are read.
    const int64_t next = (rows.n + kGemvGroup) * adapter.r, size = kGemvGroup * adapter.r;
    for (int64_t l = 0; l < min64(size, args.weight.nf4.rows * adapter.r - next); l += 16)
      __builtin_prefetch(adapter.lora_B + next + l);
    for (int64_t i = 0; i < rows.count; i += kWidth) {
      F gain = zero();
      if (is_dora(adapter)) {
        float gains[kWidth] = {};
        for (int64_t l = 0; l < min64(kWidth, rows.count - i); ++l)
          gains[l] = gain_of(adapter, rows.n + i + l);
        gain = load(gains);
      }
      for (int64_t j = 0; j < adapter.r; j += kWidth) {
        const int64_t ranks = min64(kWidth, adapter.r - j);
        F b[kWidth];
        for (int64_t l = 0; l < kWidth; ++l)
          b[l] = i + l < rows.count
                     ? read_part<Float32>(adapter.lora_B + (rows.n + i + l) * adapter.r + j, ranks)
                     : zero();
        transpose(b);
        for (int64_t m = piece.begin; m < piece.end; ++m) {
          float* const y = out + m * kGemvGroup + i;
          F sum = load(y);
          for (int64_t l = 0; l < ranks; ++l)
            sum = fma(b[l], set1(t[piece.t + (j + l) * kWidth + m]), sum);
          store(y, sum);
        }
      }
      if (is_dora(adapter))
        for (int64_t m = piece.begin; m < piece.end; ++m) {
          float* const y = out + m * kGemvGroup + i;
          store(y, mul(load(y), gain));
        }
    }
  });
  float bias[kGemvGroup] = {};
  if (args.bias) read_floats(args.bias, args.bias_dtype, rows.n, rows.count, bias);
  for (int64_t m = 0; m < m_rows; ++m)
    for (int64_t i = 0; i < rows.count; i += kWidth) {
      F y = load(out + m * kGemvGroup + i);
      if (args.bias) y = add(y, load(bias + i));
      write_part<Dtype>(
          static_cast<Element*>(args.y) + (row + m) * args.weight.nf4.rows + rows.n + i,
          rows.count - i, y);
    }
}

template <class Dtype>
void vector_unit(const LinearArgs& args, int64_t row, int64_t m_rows, int64_t unit,
                 const uint8_t* shared, uint8_t* scratch) {
  const int64_t cols = args.weight.nf4.cols;
  const auto* x = reinterpret_cast<const typename Dtype::Element*>(shared);
  const auto* t = reinterpret_cast<const float*>(
      shared + vector_t(gemv_depth(args.weight.nf4) * int64_t{sizeof(x[0])}));
  for_each_group(args.weight.nf4, unit, scratch, [&](const VectorRows& rows) {
    float out[kGemvRows * kGemvGroup] = {};
    // As many rows of W at once as the sums leave registers for.
    if (m_rows == 1)
      vector_tiles<4, 1>(cols, rows, 0, x, out);
    else if (m_rows == 2)
      vector_tiles<2, 2>(cols, rows, 0, x, out);
    else if (m_rows == 3)
      vector_tiles<2, 3>(cols, rows, 0, x, out);
    else
      vector_tiles<2, 4>(cols, rows, 0, x, out);
    finish_vector<Dtype>(args, row, m_rows, rows, out, t);
  });
}

void int8_unit(const LinearArgs& args, int64_t row, int64_t m_rows, int64_t unit,
               const uint8_t* shared, uint8_t* scratch) {
  const int64_t cols = args.weight.nf4.cols;
  const auto* t = reinterpret_cast<const float*>(shared + vector_t(int8_row_bytes(cols)));
  for_each_group(args.weight.nf4, unit, scratch, [&](const VectorRows& rows) {
    float out[kGemvRows * kGemvGroup] = {};
    for (int64_t m = 0; m < m_rows; ++m) {
      const Int8Row x = int8_row(shared + m * int8_row_bytes(cols), cols);
      float* sums = out + m * kGemvGroup;
      int64_t r = 0;
      const auto tile = [&](auto& part) {
        int8_tile(rows.packed + r * rows.row_bytes, rows.row_bytes, cols,
                  rows.scales + r * rows.stride, rows.stride, x, part);
        for (float sum : part) sums[r++] = sum;
      };
      while (r + kGemvWeightRows <= rows.count) {
        float part[kGemvWeightRows];
        tile(part);
      }
      while (r < rows.count) {
        float part[1];
        tile(part);
      }
    }
    with_dtype(args.dtype, [&](auto dtype) {
      finish_vector<decltype(dtype)>(args, row, m_rows, rows, out, t);
    });
  });
}

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_LINEAR_VECTOR_H_
