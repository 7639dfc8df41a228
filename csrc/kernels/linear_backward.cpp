// dX = dY W on slabs of columns of W that are decoded once and used by every row of dY, and what
// the adapters add to it. A slab belongs to one thread from the first row of W to the last: nothing
// is reduced across threads, and the weights are the rounded ones that the forward product saw.
//
//   LoRA    dX = dY W + mask(dS A)               DoRA    dX = (g dY) W + dS A
//   DoRA under dropout    dX = dY W + mask(((g - 1) dY) W + dS A), two sums
#include "kernels/kernels.h"
#include "kernels/low_rank.h"

namespace feinwerk {
namespace {

constexpr int64_t kPackedBytes = int64_t{16} << 20;   // of dY a chunk, about
constexpr int64_t kResultBytes = int64_t{512} << 10;  // of dX a unit holds, about
constexpr int64_t kMaxChunkRows = 1024;
constexpr int64_t kExpandRows = 64;  // rows of dS at once

using Args = LinearBackwardArgs;

// How columns of W are cut. A unit is one or more slabs, each decoded kDepth rows at a time.
struct Cut {
  int64_t chunk_rows;  // rows of dY at once
  int64_t slab;        // columns decoded together
  int64_t unit;        // columns of a unit
};

// Sums that a row of dY has: under dropout, one of dY and one of what is masked.
int64_t copies_of(const Args& args) { return has_dropped_product(args) ? 2 : 1; }

// Wide slabs read longer pieces of every row of W, and a unit of several visits a page of W once
// for all of them; narrow matrices need enough units for all threads.
template <class Engine>
Cut cut_of(const Args& args) {
  const int64_t copies = copies_of(args), cols = args.weight.nf4.cols;
  const int64_t row_bytes =
      Depth<Engine>(args.weight.nf4.rows).blocks() * Engine::kDepth * 4 * copies;
  const int64_t fitting = kPackedBytes / max64(1, row_bytes) / 64 * 64;
  Cut cut;
  cut.chunk_rows =
      min64(max64(64, min64(fitting, kMaxChunkRows / copies)), round_up(max64(1, args.m), 16));
  cut.slab = cols >= 2048 ? 256 : 64;
  const int64_t slabs = kResultBytes / (cut.chunk_rows * copies * cut.slab * 4);
  cut.unit = cut.slab * (cols >= 2048 ? max64(1, min64(4, slabs)) : 1);
  return cut;
}

// Scratch: a slab of W, or before it the adapters' panels; then C.
template <class Engine>
int64_t slab_bytes(const Args& args, const Cut& cut) {
  const int64_t slab = cut.slab / kWidth * lane_stride(Engine::kDepth) * 4;
  const int64_t adapters = kExpandRows * (Fp32Engine::kDepth + cut.unit) * 4;
  return round_up(args.adapter_count > 0 ? max64(slab, adapters) : slab, 64);
}

template <class Engine>
ProductPlan plan_for(const Args& args) {
  const Cut cut = cut_of<Engine>(args);
  const Depth<Engine> depth(args.weight.nf4.rows);
  const int64_t rows = round_up(cut.chunk_rows * copies_of(args), Engine::kRowUnit);
  ProductPlan plan = {};
  plan.chunk_rows = cut.chunk_rows;
  plan.pack_units = depth.blocks();
  plan.units = (args.weight.nf4.cols + cut.unit - 1) / cut.unit;
  plan.shared_bytes = rows * depth.blocks() * Engine::kDepth * 4;
  plan.scratch_bytes = slab_bytes<Engine>(args, cut) + cut.unit * rows * 4;
  return plan;
}

// Rows of C that may be written: the tiles of AMX write whole ones.
template <class Engine>
int64_t padded(int64_t rows) {
  return round_up(rows, Engine::kRowUnit);
}

// kWidth units from p, every element times its factor, rounded to the engine's dtype once more.
template <class Dtype>
inline void scale_units(Fp32Engine, const typename Dtype::Element* p, int64_t count,
                        const float* factor, float* a) {
  store(a, count > 0 ? mul(read_part<Dtype>(p, count), load(factor)) : zero());
}
#if defined(FEINWERK_BF16_DOT)
template <class Dtype>
inline void scale_units(PairEngine, const uint16_t* p, int64_t count, const float* factor,
                        uint32_t* a) {
  auto* const to = reinterpret_cast<uint16_t*>(a);
  for (int64_t i = 0; i < 2 * kWidth; i += kWidth)
    store_bf16(to + i,
               count > i ? mul(read_part<Bfloat16>(p + i, count - i), load(factor + i)) : zero());
}
#endif

// One depth block of A: rows of dY times g, or under dropout dY and then (g - 1) dY.
template <class Dtype, class Engine>
void pack_block(Engine engine, const Args& args, int64_t row, int64_t rows, int64_t n,
                int64_t depth, typename Engine::Unit* a) {
  const int64_t n_cols = args.weight.nf4.rows, copies = copies_of(args);
  const auto* dy = static_cast<const typename Dtype::Element*>(args.grad_y) + row * n_cols + n;
  const auto scaled = [&](int64_t first, int64_t count, int64_t to, const float* factor) {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t t = 0; t < depth; t += kWidth) {
        const int64_t k = t * Engine::kPair;
        scale_units<Dtype>(engine, dy + (first + r) * n_cols + k, n_cols - n - k, factor + k,
                           a + Engine::a_offset(to + r, t));
      }
  };
  pack_rows<Dtype>(engine, dy, n_cols, rows, n_cols - n, depth, a);
  for_each_span(args, row, rows,
                [&](int64_t first, int64_t count, const feinwerk_adapter* adapter) {
                  const bool dora = adapter && is_dora(*adapter);
                  if (!dora && copies == 1) return;
                  float factor[Engine::kDepth * Engine::kPair] = {};
                  const int64_t size = min64(depth * Engine::kPair, n_cols - n);
                  for (int64_t i = 0; dora && i < size; ++i)
                    factor[i] = gain_of(*adapter, n + i) - (copies == 2 ? 1.0f : 0.0f);
                  scaled(first, count, copies == 2 ? rows + first : first, factor);
                });
  if (copies == 2)  // up to whole tiles
    for (int64_t r = 2 * rows; r < padded<Engine>(2 * rows); ++r)
      for (int64_t t = 0; t < depth; t += kWidth)
        store(reinterpret_cast<float*>(a + Engine::a_offset(r, t)), zero());
}

// C += dS A on columns [k, k + cols); rows of C after those of dY under dropout with DoRA.
void add_adapters(const Args& args, int64_t row, int64_t rows, int64_t k, int64_t cols,
                  uint8_t* scratch, float* c, int64_t c_stride) {
  auto* const panel = reinterpret_cast<float*>(scratch);
  float* const lanes = panel + kExpandRows * Fp32Engine::kDepth;
  const int64_t groups = (cols + kWidth - 1) / kWidth, in = args.weight.nf4.cols;
  const int64_t offset = copies_of(args) == 2 ? rows : 0;
  for_each_piece(args, row, rows, [&](const Piece& piece) {
    const feinwerk_adapter& adapter = *piece.adapter;
    for (int64_t j = 0; j < adapter.r; j += kExpandRows) {
      const int64_t size = min64(kExpandRows, adapter.r - j);
      for (int64_t l = 0; l < size; ++l)
        for (int64_t g = 0; g < groups; ++g)
          store(lanes + (g * size + l) * kWidth,
                read_part<Float32>(adapter.lora_A + (j + l) * in + k + g * kWidth,
                                   cols - g * kWidth));
      for (int64_t m = piece.begin; m < piece.end; m += kExpandRows)
        expand(args.ds + (row + m) * args.s_cols + j, args.s_cols,
               min64(kExpandRows, piece.end - m), size, 1.0f, lanes, size * kWidth, groups, panel,
               c + (offset + m) * c_stride, c_stride);
    }
  });
}

}  // namespace

namespace FEINWERK_ISA_NAME {

ProductPlan linear_backward_plan(const Args& args) {
  return with_engine(args.dtype,
                     [&](auto engine, auto) { return plan_for<decltype(engine)>(args); });
}

void linear_backward_pack(const Args& args, int64_t row, int64_t rows, int64_t unit,
                          uint8_t* shared, uint8_t*) {
  with_engine(args.dtype, [&](auto engine, auto dtype) {
    using Engine = decltype(engine);
    const Depth<Engine> depth(args.weight.nf4.rows);
    const int64_t t = depth.begin(unit);
    pack_block<decltype(dtype)>(engine, args, row, rows, t * Engine::kPair, depth.size(unit),
                                reinterpret_cast<typename Engine::Unit*>(shared) +
                                    t * padded<Engine>(rows * copies_of(args)));
  });
}

void linear_backward_unit(const Args& args, int64_t row, int64_t rows, int64_t unit,
                          const uint8_t* shared, uint8_t* scratch) {
  with_engine(args.dtype, [&](auto engine, auto dtype) {
    using Engine = decltype(engine);
    using Dtype = decltype(dtype);
    using Unit = typename Engine::Unit;
    const feinwerk_weight& w = args.weight;
    const Depth<Engine> depth(w.nf4.rows);
    const Cut cut = cut_of<Engine>(args);
    const int64_t k = unit * cut.unit, cols = min64(cut.unit, w.nf4.cols - k);
    const bool two = copies_of(args) == 2;
    const int64_t c_rows = padded<Engine>(rows * copies_of(args));
    auto* b = reinterpret_cast<Unit*>(scratch);
    auto* c = reinterpret_cast<float*>(scratch + slab_bytes<Engine>(args, cut));
    const auto* a = reinterpret_cast<const Unit*>(shared);
    const bool adapters = args.adapter_count > 0;
    if (adapters || depth.blocks() == 0) memset(c, 0, static_cast<size_t>(c_rows * cut.unit) * 4);
    if (adapters) add_adapters(args, row, rows, k, cols, scratch, c, cut.unit);
    if (adapters && drops(args.dropout) && !two)
      for (int64_t m = 0; m < rows; ++m)
        drop_values(args.dropout, row + m, k, cols, c + m * cut.unit);
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
          multiply(engine, a + t * c_rows, c_rows, b, lane_stride(size), lanes / kWidth, size,
                   c + i, cut.unit, block == 0 && !adapters);
        }
    }
    for (int64_t m = 0; m < rows; ++m) {
      float* const sum = c + m * cut.unit;
      if (two) drop_values(args.dropout, row + m, k, cols, sum + rows * cut.unit);
      auto* dx = static_cast<typename Dtype::Element*>(args.grad_x) + (row + m) * w.nf4.cols + k;
      for (int64_t i = 0; i < cols; i += kWidth) {
        F x = load(sum + i);
        if (two) x = add(x, load(sum + rows * cut.unit + i));
        write_part<Dtype>(dx + i, cols - i, x);
      }
    }
  });
}

}  // namespace FEINWERK_ISA_NAME
}  // namespace feinwerk
