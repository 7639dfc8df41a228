// nf4_linear_backward: dX = dY W on slabs of columns of W that are decoded once and used by every
// row of dY. A slab belongs to one thread from the first row of W to the last: nothing is reduced
// across threads, and the weights are the rounded ones that the forward product saw.
#include "kernels/kernels.h"
#include "kernels/panels.h"

namespace feinwerk {
namespace {

constexpr int64_t kMaxSlab = 256;                    // columns of W a unit, at most
constexpr int64_t kPackedBytes = int64_t{16} << 20;  // of dY a chunk, about
constexpr int64_t kMaxChunkRows = 1024;

using Args = feinwerk_nf4_linear_backward_args;

// Wide slabs read longer pieces of every row of W; narrow matrices need enough units for all
// threads.
int64_t slab_of(const feinwerk_nf4_weight& w) { return w.cols >= 2048 ? kMaxSlab : 64; }

template <class Engine>
ProductPlan plan_for(const Args& args) {
  const int64_t row_bytes = Depth<Engine>(args.weight.rows).blocks() * Engine::kDepth * 4;
  const int64_t fitting = kPackedBytes / max64(1, row_bytes) / 64 * 64;
  const int64_t chunk = min64(max64(64, min64(fitting, kMaxChunkRows)), round_up(args.m, 16));
  ProductPlan plan = {};
  plan.chunk_rows = chunk;
  plan.pack_units = Depth<Engine>(args.weight.rows).blocks();
  const int64_t slab = slab_of(args.weight);
  plan.units = (args.weight.cols + slab - 1) / slab;
  plan.shared_bytes = chunk * row_bytes;
  plan.scratch_bytes = slab * (Engine::kDepth + chunk) * 4;
  return plan;
}

// Rows of C that may be written: the tiles of AMX write whole ones.
template <class Engine>
int64_t padded(int64_t rows) {
  return round_up(rows, Engine::kRowUnit);
}

}  // namespace

namespace FEINWERK_ISA_NAME {

ProductPlan nf4_linear_backward_plan(const Args& args) {
  return with_engine(args.dtype,
                     [&](auto engine, auto) { return plan_for<decltype(engine)>(args); });
}

void nf4_linear_backward_pack(const Args& args, int64_t row, int64_t rows, int64_t unit,
                              uint8_t* shared) {
  with_engine(args.dtype, [&](auto engine, auto dtype) {
    using Engine = decltype(engine);
    using Dtype = decltype(dtype);
    const int64_t n_cols = args.weight.rows;
    const Depth<Engine> depth(n_cols);
    const int64_t t = depth.begin(unit), n = t * Engine::kPair;
    const auto* dy = static_cast<const typename Dtype::Element*>(args.grad_y) + row * n_cols + n;
    pack_rows<Dtype>(engine, dy, n_cols, rows, n_cols - n, depth.size(unit),
                     reinterpret_cast<typename Engine::Unit*>(shared) + t * padded<Engine>(rows));
  });
}

void nf4_linear_backward_unit(const Args& args, int64_t row, int64_t rows, int64_t unit,
                              const uint8_t* shared, uint8_t* scratch) {
  with_engine(args.dtype, [&](auto engine, auto dtype) {
    using Engine = decltype(engine);
    using Dtype = decltype(dtype);
    using Unit = typename Engine::Unit;
    const feinwerk_nf4_weight& w = args.weight;
    const Depth<Engine> depth(w.rows);
    const int64_t slab = slab_of(w), k = unit * slab, cols = min64(slab, w.cols - k);
    const int64_t lanes = round_up(cols, kRun), groups = lanes / kWidth;
    auto* b = reinterpret_cast<Unit*>(scratch);
    auto* c = reinterpret_cast<float*>(scratch + slab * Engine::kDepth * 4);
    const auto* a = reinterpret_cast<const Unit*>(shared);
    {
      const Tiles<Engine> tiles;
      for (int64_t block = 0; block < depth.blocks(); ++block) {
        const int64_t t = depth.begin(block), size = depth.size(block);
        decode_lanes<Dtype>(engine, w, t * Engine::kPair, size, k, lanes, b);
        multiply(engine, a + t * padded<Engine>(rows), padded<Engine>(rows), b, groups, size, c,
                 slab, block == 0);
      }
    }
    if (depth.blocks() == 0) memset(c, 0, static_cast<size_t>(rows * slab) * 4);
    for (int64_t m = 0; m < rows; ++m) {
      auto* dx = static_cast<typename Dtype::Element*>(args.grad_x) + (row + m) * w.cols + k;
      for (int64_t i = 0; i < cols; i += kWidth)
        write_part<Dtype>(dx + i, cols - i, load(c + m * slab + i));
    }
  });
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
