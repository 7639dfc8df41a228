// The gradients of the adapters, in fp32 throughout:
//
//   over rows      dS = s (dY (g B))
//   over columns   dA = dS^T dropout(x),  dB = s g (dY^T S),  dm = sum dY (y - b) / m,  db = sum dY
//
// A unit of columns owns its part of a result from the first row to the last.
#include "kernels/kernels.h"
#include "kernels/low_rank.h"

namespace feinwerk {
namespace {

using Args = LinearBackwardArgs;

constexpr int64_t kColumns = 256;  // of x or dY a unit
constexpr int64_t kOuterBytes = (kColumns / kWidth * lane_stride(Fp32Engine::kDepth) +
                                 kRankRows * (Fp32Engine::kDepth + kColumns)) *
                                    4 +
                                kColumns * 4;

int64_t column_units(int64_t columns) { return (columns + kColumns - 1) / kColumns; }
bool needs_sums(const Args& args) {
  if (args.grad_bias) return true;
  for (int64_t e = 0; e < args.adapter_count; ++e)
    if (args.y && args.adapters[e].grad_magnitude) return true;
  return false;
}

// c[j][i] = sum over an adapter's rows of left[row][j] x[row][column + i], handed to
// write(first j, rows of c, c) in pieces.
template <class Dtype, class Write>
void outer(const feinwerk_adapter& adapter, const float* left, int64_t left_stride,
           const typename Dtype::Element* x, int64_t length, int64_t column, int64_t count,
           const feinwerk_dropout* dropout, uint8_t* scratch, const Write& write) {
  using Element = typename Dtype::Element;
  auto* const b = reinterpret_cast<float*>(scratch);
  float* const a = b + kColumns / kWidth * lane_stride(Fp32Engine::kDepth);
  float* const c = a + kRankRows * Fp32Engine::kDepth;
  auto* const masked = reinterpret_cast<Element*>(c + kRankRows * kColumns);
  const int64_t groups = (count + kWidth - 1) / kWidth;
  for (int64_t j = 0; j < adapter.r; j += kRankRows) {
    const int64_t rank = min64(kRankRows, adapter.r - j);
    memset(c, 0, static_cast<size_t>(rank * kColumns) * 4);
    for (int64_t m = adapter.row_begin; m < adapter.row_end; m += Fp32Engine::kDepth) {
      const int64_t size = min64(Fp32Engine::kDepth, adapter.row_end - m);
      for (int64_t t = 0; t < size; ++t) {
        const Element* from = x + (m + t) * length + column;
        if (dropout) {
          drop_row(*dropout, m + t, column, count, from, masked);
          from = masked;
        }
        for (int64_t g = 0; g < groups; ++g)
          store(b + g * lane_stride(size) + t * kWidth,
                read_part<Dtype>(from + g * kWidth, count - g * kWidth));
        for (int64_t i = 0; i < rank; ++i)
          a[i * Fp32Engine::kDepth + t] = left[(m + t) * left_stride + j + i];
      }
      multiply(Fp32Engine{}, a, rank, b, lane_stride(size), groups, size, c, kColumns, false);
    }
    write(j, rank, c);
  }
}

template <class Dtype>
void grad_A_unit(const Args& args, const feinwerk_adapter& adapter, int64_t k, uint8_t* scratch) {
  const int64_t cols = args.weight.nf4.cols, count = min64(kColumns, cols - k);
  const bool dropping = drops(args.dropout);
  const F scale = set1(dropping ? args.dropout.keep_scale : 1.0f);
  outer<Dtype>(adapter, args.ds, args.s_cols, static_cast<const typename Dtype::Element*>(args.x),
               cols, k, count, dropping ? &args.dropout : nullptr, scratch,
               [&](int64_t j, int64_t rank, const float* c) {
                 for (int64_t r = 0; r < rank; ++r)
                   for (int64_t i = 0; i < count; i += kWidth)
                     write_part<Float32>(adapter.grad_A + (j + r) * cols + k + i, count - i,
                                         mul(load(c + r * kColumns + i), scale));
               });
}

template <class Dtype>
void grad_B_unit(const Args& args, const feinwerk_adapter& adapter, int64_t n, uint8_t* scratch) {
  const int64_t all = args.weight.nf4.rows, count = min64(kColumns, all - n);
  outer<Dtype>(adapter, args.s, args.s_cols,
               static_cast<const typename Dtype::Element*>(args.grad_y), all, n, count, nullptr,
               scratch, [&](int64_t j, int64_t rank, float* c) {
                 for_each_row(c, kColumns, rank, 0, count, 0, [&](int64_t i, int64_t r, F v, F) {
                   const float scale = adapter.scaling * gain_of(adapter, n + i);
                   write_part<Float32>(adapter.grad_B + (n + i) * adapter.r + j + r, rank - r,
                                       mul(v, set1(scale)));
                 });
               });
}

// Below these, y - b no longer says what was multiplied by the gain: recompute it.
constexpr float kLeastGain = 1.0f / 1024;
float most_bias(feinwerk_dtype dtype) { return dtype == FEINWERK_FLOAT32 ? 1024.0f : 4.0f; }

// Sums over rows of columns [n, n + kColumns) of dY, and of dY (y - b) for every DoRA adapter.
template <class Dtype>
int sums_unit(const Args& args, int64_t n) {
  using Element = typename Dtype::Element;
  const int64_t all = args.weight.nf4.rows, count = min64(kColumns, all - n);
  float bias[kColumns] = {}, total[kColumns] = {};
  if (args.bias) read_floats(args.bias, args.bias_dtype, n, count, bias);
  int good = 1;
  for_each_span(args, 0, args.m, [&](int64_t first, int64_t rows, const feinwerk_adapter* adapter) {
    const bool dora = adapter && args.y && adapter->grad_magnitude && is_dora(*adapter);
    float products[kColumns] = {}, squares[kColumns] = {};
    for (int64_t m = first; m < first + rows; ++m)
      for (int64_t i = 0; i < count; i += kWidth) {
        const int64_t at = m * all + n + i;
        const F dy = read_part<Dtype>(static_cast<const Element*>(args.grad_y) + at, count - i);
        store(total + i, add(load(total + i), dy));
        if (!dora) continue;
        const F y = read_part<Dtype>(static_cast<const Element*>(args.y) + at, count - i);
        const F inner = fma(load(bias + i), set1(-1.0f), y);
        store(products + i, fma(dy, inner, load(products + i)));
        store(squares + i, fma(inner, inner, load(squares + i)));
      }
    if (!dora) return;
    const float most = most_bias(args.dtype);
    for (int64_t i = 0; i < count; ++i) {
      const float m = adapter->magnitude[n + i], gain = gain_of(*adapter, n + i);
      const bool lost = bias[i] * bias[i] * static_cast<float>(rows) > most * most * squares[i];
      if (!(gain >= kLeastGain || gain <= -kLeastGain) || lost) good = 0;
      adapter->grad_magnitude[n + i] = products[i] / m;
    }
  });
  for (int64_t i = 0; args.grad_bias && i < count; ++i) args.grad_bias[n + i] = total[i];
  return good;
}

}  // namespace

namespace FEINWERK_ISA_NAME {

AdapterPlan adapter_plan(const Args& args) {
  AdapterPlan plan = {};
  plan.row_units = (args.m + kWidth - 1) / kWidth;
  // Sums need none.
  plan.scratch_bytes = args.adapter_count > 0 ? round_up(kOuterBytes, 64) : 0;
  for (int64_t e = 0; e < args.adapter_count; ++e) {
    const feinwerk_adapter& adapter = args.adapters[e];
    if (adapter.grad_A) plan.column_units += column_units(args.weight.nf4.cols);
    if (adapter.grad_B) plan.column_units += column_units(args.weight.nf4.rows);
    plan.scratch_bytes =
        max64(plan.scratch_bytes, kShrinkBytes + round_up(adapter.r * kWidth * 4, 64));
  }
  if (needs_sums(args)) plan.column_units += column_units(args.weight.nf4.rows);
  return plan;
}

void adapter_rows(const Args& args, int64_t unit, uint8_t* scratch) {
  with_dtype(args.dtype, [&](auto dtype) {
    using Dtype = decltype(dtype);
    const int64_t n = args.weight.nf4.rows, m = unit * kWidth, rows = min64(kWidth, args.m - m);
    const auto* dy = static_cast<const typename Dtype::Element*>(args.grad_y) + m * n;
    auto* const lanes = reinterpret_cast<float*>(scratch + kShrinkBytes);
    for_each_piece(args, m, rows, [&](const Piece& piece) {
      const feinwerk_adapter& adapter = *piece.adapter;
      const auto gain = [&](int64_t i) { return gain_of(adapter, i); };
      shrink<Dtype>(dy, rows, n, adapter.r, nullptr, m,
                    column_panels(adapter.lora_B, adapter.r, adapter.scaling, gain), scratch,
                    lanes);
      for (int64_t lane = piece.begin; lane < piece.end; ++lane)
        for (int64_t j = 0; j < adapter.r; ++j)
          args.ds[(m + lane) * args.s_cols + j] = lanes[j * kWidth + lane];
    });
  });
}

int adapter_columns(const Args& args, int64_t unit, uint8_t* scratch) {
  return with_dtype(args.dtype, [&](auto dtype) {
    using Dtype = decltype(dtype);
    const int64_t over_k = column_units(args.weight.nf4.cols);
    const int64_t over_n = column_units(args.weight.nf4.rows);
    int64_t at = unit;
    for (int64_t e = 0; e < args.adapter_count; ++e) {
      const feinwerk_adapter& adapter = args.adapters[e];
      if (adapter.grad_A) {
        if (at < over_k) return grad_A_unit<Dtype>(args, adapter, at * kColumns, scratch), 1;
        at -= over_k;
      }
      if (adapter.grad_B) {
        if (at < over_n) return grad_B_unit<Dtype>(args, adapter, at * kColumns, scratch), 1;
        at -= over_n;
      }
    }
    return sums_unit<Dtype>(args, at * kColumns);
  });
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
