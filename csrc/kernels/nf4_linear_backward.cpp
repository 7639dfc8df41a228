// nf4_linear_backward: dX = dY W on slabs of columns of W that are decoded once and used by every
// row of dY. A slab belongs to one thread from the first row of W to the last: nothing is reduced
// across threads, and the weights are the rounded ones that the forward product saw.
#include "kernels/kernels.h"
#include "kernels/panels.h"

namespace feinwerk {
namespace {

constexpr int64_t kPackedBytes = int64_t{16} << 20;   // of dY a chunk, about
constexpr int64_t kResultBytes = int64_t{512} << 10;  // of dX a unit holds, about
constexpr int64_t kMaxChunkRows = 1024;

using Args = feinwerk_nf4_linear_backward_args;

// How columns of W are cut. A unit is one or more slabs, each decoded kDepth rows at a time.
struct Cut {
  int64_t chunk_rows;  // rows of dY at once
  int64_t slab;        // columns decoded together
  int64_t unit;        // columns of a unit
};

// Wide slabs read longer pieces of every row of W, and a unit of several visits a page of W once
// for all of them; narrow matrices need enough units for all threads.
template <class Engine>
Cut cut_of(const Args& args) {
  const int64_t row_bytes = Depth<Engine>(args.weight.rows).blocks() * Engine::kDepth * 4;
  const int64_t fitting = kPackedBytes / max64(1, row_bytes) / 64 * 64;
  Cut cut;
  cut.chunk_rows = min64(max64(64, min64(fitting, kMaxChunkRows)), round_up(max64(1, args.m), 16));
  cut.slab = args.weight.cols >= 2048 ? 256 : 64;
  const int64_t slabs = kResultBytes / (cut.chunk_rows * cut.slab * 4);
  cut.unit = cut.slab * (args.weight.cols >= 2048 ? max64(1, min64(4, slabs)) : 1);
  return cut;
}

template <class Engine>
ProductPlan plan_for(const Args& args) {
  const Cut cut = cut_of<Engine>(args);
  const Depth<Engine> depth(args.weight.rows);
  ProductPlan plan = {};
  plan.chunk_rows = cut.chunk_rows;
  plan.pack_units = depth.blocks();
  plan.units = (args.weight.cols + cut.unit - 1) / cut.unit;
  plan.shared_bytes = cut.chunk_rows * depth.blocks() * Engine::kDepth * 4;
  plan.scratch_bytes =
      (cut.slab / kWidth * lane_stride(Engine::kDepth) + cut.unit * cut.chunk_rows) * 4;
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
    const Cut cut = cut_of<Engine>(args);
    const int64_t k = unit * cut.unit, cols = min64(cut.unit, w.cols - k);
    auto* b = reinterpret_cast<Unit*>(scratch);
    auto* c =
        reinterpret_cast<float*>(scratch + cut.slab / kWidth * lane_stride(Engine::kDepth) * 4);
    const auto* a = reinterpret_cast<const Unit*>(shared);
    {
      const Tiles<Engine> tiles;
      for (int64_t block = 0; block < depth.blocks(); ++block)
        for (int64_t i = 0; i < cols; i += cut.slab) {
          const int64_t t = depth.begin(block), size = depth.size(block);
          const int64_t lanes = round_up(min64(cut.slab, cols - i), kRun);
          const int64_t n = t * Engine::kPair;
          const NextLanes next = i + cut.slab < cols ? NextLanes{n, k + i + cut.slab}
                                                     : NextLanes{n + size * Engine::kPair, k};
          decode_lanes<Dtype>(engine, w, n, size, k + i, lanes, next, b);
          multiply(engine, a + t * padded<Engine>(rows), padded<Engine>(rows), b, lane_stride(size),
                   lanes / kWidth, size, c + i, cut.unit, block == 0);
        }
    }
    if (depth.blocks() == 0) memset(c, 0, static_cast<size_t>(rows * cut.unit) * 4);
    for (int64_t m = 0; m < rows; ++m) {
      auto* dx = static_cast<typename Dtype::Element*>(args.grad_x) + (row + m) * w.cols + k;
      for (int64_t i = 0; i < cols; i += kWidth)
        write_part<Dtype>(dx + i, cols - i, load(c + m * cut.unit + i));
    }
  });
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
