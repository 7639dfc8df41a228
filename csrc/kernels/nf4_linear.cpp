// nf4_linear: y = x W^T + bias without a dense W. Few rows of x take the matrix-vector kernels, the
// others the blocked product on panels of W that are decoded once and used by every row of x.
#include "kernels/gemv.h"
#include "kernels/kernels.h"
#include "kernels/panels.h"

namespace feinwerk {
namespace {

constexpr int64_t kPanelRows = 96;                   // rows of W decoded together
constexpr int64_t kPackedBytes = int64_t{16} << 20;  // of activations a chunk, about
constexpr int64_t kMaxChunkRows = 1024;

using Args = feinwerk_nf4_linear_args;

enum class Path { kVector, kBf16Vector, kInt8, kProduct };

Path path_of(const Args& args) {
  if (args.compute == FEINWERK_COMPUTE_INT8 && gemv_fits(args.weight)) return Path::kInt8;
  // fp32 only: a scale applied after the dot product is not W rounded to a 16-bit dtype.
  if (args.dtype == FEINWERK_FLOAT32 && args.m <= kGemvRows && gemv_fits(args.weight))
    return Path::kVector;
#if defined(FEINWERK_BF16_DOT)
  if (args.dtype == FEINWERK_BFLOAT16 && args.m <= kGemvRows && gemv_fits(args.weight))
    return Path::kBf16Vector;
#endif
  return Path::kProduct;
}

template <class Engine>
ProductPlan product_plan(const Args& args) {
  const int64_t row_bytes = Depth<Engine>(args.weight.cols).units * 4;
  const int64_t fitting = kPackedBytes / max64(1, row_bytes) / 64 * 64;
  const int64_t chunk = min64(max64(64, min64(fitting, kMaxChunkRows)), round_up(args.m, kWidth));
  ProductPlan plan = {};
  plan.chunk_rows = chunk;
  plan.pack_units = (min64(chunk, args.m) + kWidth - 1) / kWidth;
  plan.units = (args.weight.rows + kPanelRows - 1) / kPanelRows;
  plan.shared_bytes = round_up(chunk * row_bytes, 64);
  plan.scratch_bytes = kPanelRows * (Engine::kDepth + chunk) * 4;
  return plan;
}

template <class Engine, class Dtype>
void product_unit(const Args& args, int64_t row, int64_t rows, int64_t unit, const uint8_t* shared,
                  uint8_t* scratch) {
  using Unit = typename Engine::Unit;
  const feinwerk_nf4_weight& w = args.weight;
  const Depth<Engine> depth(w.cols);
  const int64_t n = unit * kPanelRows, n_rows = min64(kPanelRows, w.rows - n);
  const int64_t groups = (rows + kWidth - 1) / kWidth, c_stride = groups * kWidth;
  auto* a = reinterpret_cast<Unit*>(scratch);
  auto* c = reinterpret_cast<float*>(scratch + kPanelRows * Engine::kDepth * 4);
  const auto* b = reinterpret_cast<const Unit*>(shared);
  {
    const Tiles<Engine> tiles;
    for (int64_t block = 0; block < depth.blocks(); ++block) {
      const int64_t t = depth.begin(block), size = depth.size(block);
      decode_rows<Dtype>(Engine{}, w, n, n_rows, t, size, a);
      multiply(Engine{}, a, round_up(n_rows, Engine::kRowUnit), b + t * c_stride, size * kWidth,
               groups, size, c, c_stride, block == 0);
    }
  }
  if (depth.blocks() == 0) memset(c, 0, static_cast<size_t>(n_rows * c_stride) * 4);
  float bias[kPanelRows];
  if (args.bias) read_floats(args.bias, args.bias_dtype, n, n_rows, bias);
  using Element = typename Dtype::Element;
  store_transposed<Dtype>(c, c_stride, n_rows, rows, args.bias ? bias : nullptr,
                          static_cast<Element*>(args.y) + row * w.rows + n, w.rows);
}

// The vector paths. shared: x packed; scratch: the scales of kGemvGroup rows of W.

int64_t scale_stride(const feinwerk_nf4_weight& w) { return gemv_depth(w) / kScaleBlock; }

ProductPlan vector_plan(const Args& args, int64_t packed_row_bytes) {
  ProductPlan plan = {};
  plan.chunk_rows = kGemvRows;
  plan.pack_units = 1;
  plan.units = (args.weight.rows + gemv_unit(args.weight) - 1) / gemv_unit(args.weight);
  plan.shared_bytes = round_up(kGemvRows * packed_row_bytes, 64);
  plan.scratch_bytes = round_up(kGemvGroup * scale_stride(args.weight) * 4, 64);
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
    if (rows.stride == per_row)
      read_scales(w, rows.n * per_row, rows.count * per_row, rows.scales);
    else
      for (int64_t r = 0; r < rows.count; ++r) {
        float* const scales = rows.scales + r * rows.stride;
        read_scales(w, (rows.n + r) * per_row, per_row, scales);
        for (int64_t i = per_row; i < rows.stride; ++i) scales[i] = 0;
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

// out[m][i]: y[row + m][rows.n + i] before the bias.
template <class Dtype>
void finish_vector(const Args& args, int64_t row, int64_t m_rows, const VectorRows& rows,
                   const float* out) {
  using Element = typename Dtype::Element;
  float bias[kGemvGroup] = {};
  if (args.bias) read_floats(args.bias, args.bias_dtype, rows.n, rows.count, bias);
  for (int64_t m = 0; m < m_rows; ++m)
    for (int64_t i = 0; i < rows.count; i += kWidth) {
      F y = load(out + m * kGemvGroup + i);
      if (args.bias) y = add(y, load(bias + i));
      write_part<Dtype>(static_cast<Element*>(args.y) + (row + m) * args.weight.rows + rows.n + i,
                        rows.count - i, y);
    }
}

template <class Dtype>
void vector_unit(const Args& args, int64_t row, int64_t m_rows, int64_t unit, const uint8_t* shared,
                 uint8_t* scratch) {
  const int64_t cols = args.weight.cols;
  const auto* x = reinterpret_cast<const typename Dtype::Element*>(shared);
  for_each_group(args.weight, unit, scratch, [&](const VectorRows& rows) {
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
    finish_vector<Dtype>(args, row, m_rows, rows, out);
  });
}

void int8_unit(const Args& args, int64_t row, int64_t m_rows, int64_t unit, const uint8_t* shared,
               uint8_t* scratch) {
  const int64_t cols = args.weight.cols;
  for_each_group(args.weight, unit, scratch, [&](const VectorRows& rows) {
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
    with_dtype(args.dtype,
               [&](auto dtype) { finish_vector<decltype(dtype)>(args, row, m_rows, rows, out); });
  });
}

}  // namespace

namespace FEINWERK_ISA_NAME {

ProductPlan nf4_linear_plan(const Args& args) {
  switch (path_of(args)) {
    case Path::kVector:
      return vector_plan(args, gemv_depth(args.weight) * 4);
    case Path::kBf16Vector:
      return vector_plan(args, gemv_depth(args.weight) * 2);
    case Path::kInt8:
      return vector_plan(args, int8_row_bytes(args.weight.cols));
    case Path::kProduct:
      break;
  }
  return with_engine(args.dtype,
                     [&](auto engine, auto) { return product_plan<decltype(engine)>(args); });
}

void nf4_linear_pack(const Args& args, int64_t row, int64_t rows, int64_t unit, uint8_t* shared) {
  const int64_t cols = args.weight.cols;
  const Path path = path_of(args);
  if (path == Path::kVector)
    return gemv_pack<Float32>(static_cast<const float*>(args.x) + row * cols, rows, cols,
                              reinterpret_cast<float*>(shared));
#if defined(FEINWERK_BF16_DOT)
  if (path == Path::kBf16Vector)
    return bf16_pack(static_cast<const uint16_t*>(args.x) + row * cols, rows, cols,
                     reinterpret_cast<uint16_t*>(shared));
#endif
  if (path == Path::kInt8)
    return with_dtype(args.dtype, [&](auto dtype) {
      using Element = typename decltype(dtype)::Element;
      for (int64_t m = 0; m < rows; ++m)
        int8_pack<decltype(dtype)>(static_cast<const Element*>(args.x) + (row + m) * cols, cols,
                                   shared + m * int8_row_bytes(cols));
    });
  with_engine(args.dtype, [&](auto engine, auto dtype) {
    using Engine = decltype(engine);
    using Dtype = decltype(dtype);
    const Depth<Engine> depth(cols);
    const int64_t m = unit * kWidth, c_stride = round_up(rows, kWidth);
    if (m >= rows) return;  // the last chunk has fewer rows than the plan's
    const auto* x = static_cast<const typename Dtype::Element*>(args.x) + (row + m) * cols;
    for (int64_t block = 0; block < depth.blocks(); ++block) {
      const int64_t t = depth.begin(block), size = depth.size(block), k = t * Engine::kPair;
      pack_lanes<Dtype>(
          engine, x + k, cols, min64(kWidth, rows - m), cols - k, size,
          reinterpret_cast<typename Engine::Unit*>(shared) + t * c_stride + unit * size * kWidth);
    }
  });
}

void nf4_linear_unit(const Args& args, int64_t row, int64_t rows, int64_t unit,
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
