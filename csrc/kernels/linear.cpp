// y = x W^T + bias with any adapters and without a dense W. Few rows of x take the matrix-vector
// kernels, the others the blocked product on panels of W that are decoded once and used by every
// row of x, by every row dropped for DoRA, and by the rows of A whose products give its norms:
//
//   lanes of C^T     [ x | dropout(x) | A of every adapter whose norm is to be found ]
//   rows of C^T      96 rows of W
//
// Only the first chunk of rows carries the lanes of A: norms are then known to the others.
#include "kernels/kernels.h"
#include "kernels/linear_lanes.h"
#include "kernels/linear_vector.h"

namespace feinwerk {
namespace {

constexpr int64_t kPanelRows = 96;                   // rows of W decoded together
constexpr int64_t kPackedBytes = int64_t{16} << 20;  // of activations a chunk, about
constexpr int64_t kMaxChunkRows = 1024;

enum class Path { kVector, kBf16Vector, kInt8, kProduct };

Path path_of(const LinearArgs& args) {
  const bool few = args.m > 0 && args.m <= kGemvRows;
  if (args.weight.dense || args.m == 0 || args.grad_y || has_dropped_product(args) ||
      !gemv_fits(args.weight.nf4))
    return Path::kProduct;
  if (args.compute == FEINWERK_COMPUTE_INT8) return Path::kInt8;
  // fp32 only: a scale applied after the dot product is not W rounded to a 16-bit dtype.
  if (args.dtype == FEINWERK_FLOAT32 && few) return Path::kVector;
#if defined(FEINWERK_BF16_DOT)
  if (args.dtype == FEINWERK_BFLOAT16 && few) return Path::kBf16Vector;
#endif
  return Path::kProduct;
}

template <class Engine>
ProductPlan product_plan(const LinearArgs& args) {
  const int64_t row_bytes = Depth<Engine>(args.weight.nf4.cols).units * 4;
  const int64_t copies = has_dropped_product(args) ? 2 : 1;
  const int64_t fitting = kPackedBytes / max64(1, row_bytes * copies) / 64 * 64;
  const int64_t chunk =
      min64(max64(64, min64(fitting, kMaxChunkRows / copies)), round_up(args.m, kWidth));
  const Layout<Engine> layout(args, 0, chunk);
  ProductPlan plan = {};
  plan.chunk_rows = max64(kWidth, chunk);
  plan.pack_units = layout.x_groups + layout.groups - layout.norms;
  plan.units = (args.weight.nf4.rows + kPanelRows - 1) / kPanelRows;
  plan.shared_bytes = layout.gram + round_up(gram_floats(args) * 4, 64);
  // A vector more: rows of C are read from any lane on.
  plan.scratch_bytes =
      round_up((kPanelRows * (Engine::kDepth + layout.groups * kWidth) + kWidth) * 4, 64);
  for (int64_t e = 0; e < args.adapter_count; ++e)
    plan.scratch_bytes =
        max64(plan.scratch_bytes, kShrinkBytes + round_up(args.adapters[e].r * kWidth * 4, 64));
  plan.finds_norms = true;
  return plan;
}

// What becomes of a panel of C^T: y, or with grad_y the sums of grad_magnitude.
template <class Dtype>
void finish_panel(const LinearArgs& args, int64_t row, int64_t rows, int64_t n, int64_t n_rows,
                  const float* c, int64_t c_stride, int64_t dropped_lane) {
  using Element = typename Dtype::Element;
  const int64_t n_all = args.weight.nf4.rows;
  float bias[kPanelRows + kWidth] = {}, gain[kPanelRows + kWidth] = {};
  if (args.bias) read_floats(args.bias, args.bias_dtype, n, n_rows, bias);
  for_each_span(
      args, row, rows, [&](int64_t first, int64_t count, const feinwerk_adapter* adapter) {
        const bool dora = adapter && is_dora(*adapter);
        if (args.grad_y && !(dora && adapter->grad_magnitude)) return;
        for (int64_t i = 0; dora && i < n_rows; ++i) {
          gain[i] = gain_of(*adapter, n + i);
          if (dropped_lane) gain[i] = (gain[i] - 1) * args.dropout.keep_scale;
        }
        const auto at = [&](const void* p, int64_t m, int64_t i) {
          return (row + m) * n_all + n + i + static_cast<const Element*>(p);
        };
        if (args.grad_y) {
          // Sums over rows of grad_y times what the gain multiplies.
          float sums[kPanelRows + kWidth] = {};
          for_each_row(c, c_stride, n_rows, first, count, 0, [&](int64_t m, int64_t i, F v, F) {
            const F dy = read_part<Dtype>(at(args.grad_y, m, i), n_rows - i);
            store(sums + i, fma(dy, v, load(sums + i)));
          });
          const float scale = has_dropped_product(args) ? args.dropout.keep_scale : 1.0f;
          for (int64_t i = 0; i < n_rows; ++i) {
            const float norm = adapter->weight_norm[n + i];
            if (norm != 0) adapter->grad_magnitude[n + i] += sums[i] * scale / norm;
          }
          return;
        }
        const int64_t other = dora ? dropped_lane : 0;
        for_each_row(c, c_stride, n_rows, first, count, other, [&](int64_t m, int64_t i, F v, F w) {
          if (other) v = fma(w, load(gain + i), v);
          if (dora && !other) v = mul(v, load(gain + i));
          if (args.bias) v = add(v, load(bias + i));
          write_part<Dtype>(const_cast<Element*>(at(args.y, m, i)), n_rows - i, v);
        });
      });
}

template <class Engine, class Dtype>
void product_unit(const LinearArgs& args, int64_t row, int64_t rows, int64_t unit,
                  const uint8_t* shared, uint8_t* scratch) {
  using Unit = typename Engine::Unit;
  const feinwerk_weight& w = args.weight;
  const Depth<Engine> depth(w.nf4.cols);
  const Layout<Engine> layout(args, row, rows);
  const int64_t n = unit * kPanelRows, n_rows = min64(kPanelRows, w.nf4.rows - n);
  const int64_t c_stride = layout.groups * kWidth;
  auto* a = reinterpret_cast<Unit*>(scratch);
  auto* c = reinterpret_cast<float*>(scratch + kPanelRows * Engine::kDepth * 4);
  const auto* b = reinterpret_cast<const Unit*>(shared);
  {
    const Tiles<Engine> tiles;
    for (int64_t block = 0; block < depth.blocks(); ++block) {
      const int64_t t = depth.begin(block), size = depth.size(block);
      decode_rows<Dtype>(Engine{}, w, n, n_rows, t, size, a);
      multiply(Engine{}, a, round_up(n_rows, Engine::kRowUnit), b + t * c_stride, size * kWidth,
               layout.groups, size, c, c_stride, block == 0);
    }
  }
  if (depth.blocks() == 0) memset(c, 0, static_cast<size_t>(n_rows * c_stride) * 4);
  auto* const panel = reinterpret_cast<float*>(scratch);
  const auto* t = reinterpret_cast<const float*>(shared + layout.t);
  for_each_piece(args, row, rows, [&](const Piece& piece) {
    const feinwerk_adapter& adapter = *piece.adapter;
    const auto add_to = [&](int64_t first_group, float scale) {
      expand(adapter.lora_B + n * adapter.r, adapter.r, n_rows, adapter.r, scale, t + piece.t,
             adapter.r * kWidth, piece.groups, panel, c + (first_group + piece.group) * kWidth,
             c_stride);
    };
    // Lanes of dropout(x) are masked only, and scaled as a whole when they are written.
    const float part = has_dropped_product(args) ? 1.0f / args.dropout.keep_scale : 1.0f;
    add_to(0, args.grad_y ? part : 1.0f);
    if (layout.dropped) add_to(layout.dropped, part);
  });
  layout.for_each_norm(
      args, [&](const feinwerk_adapter& adapter, int64_t group, int64_t offset, int64_t stride) {
        const auto* gram = reinterpret_cast<const float*>(shared) + offset;
        const int64_t low = lane_groups(adapter.r) * kWidth;
        for (int64_t i = 0; i < n_rows; ++i) {
          const float* const u = c + i * c_stride + group * kWidth;
          adapter.weight_norm[n + i] =
              norm_of(adapter, n + i, u, Engine::kPair == 1 ? nullptr : u + low, gram, stride);
        }
      });
  if (rows > 0)
    finish_panel<Dtype>(args, row, rows, n, n_rows, c, c_stride, layout.dropped * kWidth);
}

}  // namespace

namespace FEINWERK_ISA_NAME {

ProductPlan linear_plan(const LinearArgs& args) {
  switch (path_of(args)) {
    case Path::kVector:
      return vector_plan(args, gemv_depth(args.weight.nf4) * 4);
    case Path::kBf16Vector:
      return vector_plan(args, gemv_depth(args.weight.nf4) * 2);
    case Path::kInt8:
      return vector_plan(args, int8_row_bytes(args.weight.nf4.cols));
    case Path::kProduct:
      break;
  }
  return with_engine(args.dtype,
                     [&](auto engine, auto) { return product_plan<decltype(engine)>(args); });
}

void linear_pack(const LinearArgs& args, int64_t row, int64_t rows, int64_t unit, uint8_t* shared,
                 uint8_t* scratch) {
  const int64_t cols = args.weight.nf4.cols;
  const Path path = path_of(args);
  const auto adapters = [&](int64_t group, int64_t t, int64_t part, int64_t parts) {
    if (args.adapter_count > 0)
      with_dtype(args.dtype, [&](auto dtype) {
        pack_adapters<decltype(dtype)>(args, row, rows, group, reinterpret_cast<float*>(shared + t),
                                       scratch, part, parts);
      });
  };
  // The matrix-vector kernels: every unit takes a part of the adapters, the first one packs x too.
  const auto vector_adapters = [&](int64_t packed_row_bytes) {
    adapters(0, vector_t(packed_row_bytes), unit, kPackParts);
    return unit == 0;
  };
  if (path == Path::kVector) {
    if (!vector_adapters(gemv_depth(args.weight.nf4) * 4)) return;
    return gemv_pack<Float32>(static_cast<const float*>(args.x) + row * cols, rows, cols,
                              reinterpret_cast<float*>(shared));
  }
#if defined(FEINWERK_BF16_DOT)
  if (path == Path::kBf16Vector) {
    if (!vector_adapters(gemv_depth(args.weight.nf4) * 2)) return;
    return bf16_pack(static_cast<const uint16_t*>(args.x) + row * cols, rows, cols,
                     reinterpret_cast<uint16_t*>(shared));
  }
#endif
  if (path == Path::kInt8) {
    if (!vector_adapters(int8_row_bytes(cols))) return;
    return with_dtype(args.dtype, [&](auto dtype) {
      using Element = typename decltype(dtype)::Element;
      for (int64_t m = 0; m < rows; ++m)
        int8_pack<decltype(dtype)>(static_cast<const Element*>(args.x) + (row + m) * cols, cols,
                                   shared + m * int8_row_bytes(cols));
    });
  }
  with_engine(args.dtype, [&](auto engine, auto dtype) {
    using Engine = decltype(engine);
    using Dtype = decltype(dtype);
    const Layout<Engine> layout(args, row, rows);
    const int64_t m = unit * kWidth;
    if (unit < layout.x_groups) {
      const auto* x = static_cast<const typename Dtype::Element*>(args.x) + (row + m) * cols;
      const int64_t count = min64(kWidth, rows - m);
      const bool only_dropped = args.grad_y && has_dropped_product(args);
      pack_group<Dtype>(engine, x, cols, count, only_dropped ? &args.dropout : nullptr, row + m,
                        unit, layout.groups, shared, scratch);
      if (layout.dropped)
        pack_group<Dtype>(engine, x, cols, count, &args.dropout, row + m, layout.dropped + unit,
                          layout.groups, shared, scratch);
      return adapters(unit, layout.t, 0, 1);
    }
    // The last chunk has fewer rows than the plan's, and only the first one has norms.
    const int64_t part = unit - layout.x_groups;
    layout.for_each_norm(
        args, [&](const feinwerk_adapter& adapter, int64_t group, int64_t offset, int64_t stride) {
          const int64_t own = part - (group - layout.norms);
          if (own >= 0 && own < Layout<Engine>::norm_groups(adapter))
            pack_norm(engine, adapter, cols, own, group, layout.groups,
                      reinterpret_cast<float*>(shared) + offset, stride, shared, scratch);
        });
  });
}

void linear_unit(const LinearArgs& args, int64_t row, int64_t rows, int64_t unit,
                 const uint8_t* shared, uint8_t* scratch) {
  switch (path_of(args)) {
    case Path::kVector:
      return vector_unit<Float32>(args, row, rows, unit, shared, scratch);
    case Path::kBf16Vector:
#if defined(FEINWERK_BF16_DOT)
      return vector_unit<Bfloat16>(args, row, rows, unit, shared, scratch);
#endif
    case Path::kInt8:
      return int8_unit(args, row, rows, unit, shared, scratch);
    case Path::kProduct:
      break;
  }
  with_engine(args.dtype, [&](auto engine, auto dtype) {
    product_unit<decltype(engine), decltype(dtype)>(args, row, rows, unit, shared, scratch);
  });
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
