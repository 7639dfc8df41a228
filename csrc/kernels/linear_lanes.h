// The lanes of the blocked product: rows of x, rows of dropout(x), and the rows of every A whose
// products with W give the norms of DoRA; how they are packed, and what the norms are made of.
#ifndef FEINWERK_KERNELS_LINEAR_LANES_H_
#define FEINWERK_KERNELS_LINEAR_LANES_H_

#include "kernels/low_rank.h"

namespace feinwerk {
namespace {

inline int64_t lane_groups(int64_t rows) { return (rows + kWidth - 1) / kWidth; }

// Where a chunk's lanes, T and Gram matrices lie in `shared`.
template <class Engine>
struct Layout {
  int64_t x_groups;  // lane groups of x
  int64_t dropped;   // first group of dropout(x), 0 when there is none
  int64_t norms;     // first group of the adapters' A
  int64_t groups;    // all of them
  int64_t t, gram;   // offsets in bytes

  Layout(const LinearArgs& args, int64_t row, int64_t rows) {
    x_groups = lane_groups(rows);
    dropped = has_dropped_product(args) && !args.grad_y ? x_groups : 0;
    norms = groups = x_groups + dropped;
    if (row == 0)
      for (int64_t e = 0; e < args.adapter_count; ++e)
        if (finds_norm(args.adapters[e])) groups += norm_groups(args.adapters[e]);
    t = round_up(groups * Depth<Engine>(args.weight.nf4.cols).units * kWidth * 4, 64);
    gram = t + round_up(t_floats(args, rows) * 4, 64);
  }
  // bf16 holds 8 bits of a value of A, so it goes through twice: the value and what is left.
  static int64_t norm_groups(const feinwerk_adapter& adapter) {
    return lane_groups(adapter.r) * Engine::kPair;
  }
  // Calls body(adapter, first lane group, offset of G = A A^T in floats, its stride) for every norm
  // to be found.
  template <class Body>
  void for_each_norm(const LinearArgs& args, const Body& body) const {
    int64_t group = norms, offset = gram / 4;
    for (int64_t e = 0; groups > norms && e < args.adapter_count; ++e) {
      const feinwerk_adapter& adapter = args.adapters[e];
      if (!finds_norm(adapter)) continue;
      const int64_t stride = round_up(adapter.r, kWidth);
      body(adapter, group, offset, stride);
      group += norm_groups(adapter);
      offset += stride * stride;
    }
  }
};

inline int64_t gram_floats(const LinearArgs& args) {
  int64_t count = 0;
  for (int64_t e = 0; e < args.adapter_count; ++e) {
    const int64_t stride = round_up(args.adapters[e].r, kWidth);
    if (finds_norm(args.adapters[e])) count += stride * stride;
  }
  return count;
}

// The lanes of rows of x (or of A), all depth blocks, into group `group` of `groups`.
template <class Dtype, class Engine>
void pack_group(Engine engine, const typename Dtype::Element* x, int64_t cols, int64_t rows,
                const feinwerk_dropout* dropout, int64_t row, int64_t group, int64_t groups,
                uint8_t* shared, uint8_t* scratch) {
  using Element = typename Dtype::Element;
  const Depth<Engine> depth(cols);
  auto* const masked = reinterpret_cast<Element*>(scratch);
  constexpr int64_t kSpan = Engine::kDepth * Engine::kPair;
  for (int64_t block = 0; block < depth.blocks(); ++block) {
    const int64_t t = depth.begin(block), size = depth.size(block), k = t * Engine::kPair;
    auto* const b = reinterpret_cast<typename Engine::Unit*>(shared) + t * groups * kWidth +
                    group * size * kWidth;
    if (!dropout) {
      pack_lanes<Dtype>(engine, x + k, cols, rows, cols - k, size, b);
      continue;
    }
    const int64_t count = min64(kSpan, cols - k);
    for (int64_t i = 0; i < rows; ++i)
      drop_row(*dropout, row + i, k, count, x + i * cols + k, masked + i * kSpan);
    pack_lanes<Dtype>(engine, masked, kSpan, rows, count, size, b);
  }
}

// One group of rows of A as lanes, and its rows of G = A A^T.
template <class Engine>
void pack_norm(Engine engine, const feinwerk_adapter& adapter, int64_t cols, int64_t part,
               int64_t group, int64_t groups, float* gram, int64_t stride, uint8_t* shared,
               uint8_t* scratch) {
  const int64_t own = lane_groups(adapter.r), first = part % own * kWidth;
  const int64_t rows = min64(kWidth, adapter.r - first);
  const float* const A = adapter.lora_A + first * cols;
  if constexpr (Engine::kPair == 1) {
    pack_group<Float32>(engine, A, cols, rows, nullptr, 0, group + part, groups, shared, scratch);
  } else {
    // bf16 high halves in the first groups, what they leave in the others.
    const Depth<Engine> depth(cols);
    constexpr int64_t kSpan = Engine::kDepth * Engine::kPair;
    auto* const halves = reinterpret_cast<uint16_t*>(scratch);
    for (int64_t block = 0; block < depth.blocks(); ++block) {
      const int64_t t = depth.begin(block), size = depth.size(block), k = t * Engine::kPair;
      const int64_t count = min64(kSpan, cols - k);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t l = 0; l < count; l += kWidth) {
          const F value = read_part<Float32>(A + i * cols + k + l, count - l);
          uint16_t high[kWidth];
          store_bf16(high, value);
          const F left = add(value, mul(load_bf16(high), set1(-1.0f)));
          write_part<Bfloat16>(halves + i * kSpan + l, count - l, part < own ? value : left);
        }
      pack_lanes<Bfloat16>(engine, halves, kSpan, rows, count, size,
                           reinterpret_cast<typename Engine::Unit*>(shared) + t * groups * kWidth +
                               (group + part) * size * kWidth);
    }
  }
  if (part >= own) return;
  float* const to = gram + first * stride;
  memset(to, 0, static_cast<size_t>(kWidth * stride) * 4);
  // Lanes of the result are these rows of A, its rows all of them: G is symmetric.
  auto* const lanes = reinterpret_cast<float*>(scratch + kShrinkBytes);
  shrink<Float32>(A, rows, cols, adapter.r, nullptr, 0, row_panels(adapter.lora_A, cols), scratch,
                  lanes);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < adapter.r; ++j) to[i * stride + j] = lanes[j * kWidth + i];
}

// ||W_i + s B_i A|| of a row from u = (W A^T)_i, the Gram matrix and ||W_i||.
inline float norm_of(const feinwerk_adapter& adapter, int64_t n, const float* u, const float* u_low,
                     const float* gram, int64_t stride) {
  const float* const b = adapter.lora_B + n * adapter.r;
  float cross = 0, square = 0;
  for (int64_t j = 0; j < adapter.r; ++j) cross += b[j] * (u_low ? u[j] + u_low[j] : u[j]);
  for (int64_t k = 0; k < adapter.r; k += kWidth) {
    F sum = zero();
    for (int64_t j = 0; j < adapter.r; ++j) sum = fma(set1(b[j]), load(gram + j * stride + k), sum);
    square += reduce_add(mul(sum, read_part<Float32>(b + k, adapter.r - k)));
  }
  const float change = 2 * adapter.scaling * cross + adapter.scaling * adapter.scaling * square;
  const float base = adapter.base_norm[n];
  const float ratio = base > 0 ? 1 + change / base / base : change;
  const float root = __builtin_sqrtf(ratio < 0 ? 0 : ratio);
  return base > 0 ? base * root : root;
}

}  // namespace
}  // namespace feinwerk

#endif  // FEINWERK_KERNELS_LINEAR_LANES_H_
