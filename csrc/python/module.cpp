// The Python module _C: addresses in, a status turned into an exception out, the GIL released.
//
// Tensors stay in python/feinwerk/_native.py, which allocates outputs and passes data pointers as
// integers, so that no torch header is needed and one build serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "executor.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT: the only way from Python's integer
}

void check(feinwerk_status status) {
  if (status == FEINWERK_OK) return;
  const char* message = feinwerk_last_error();
  switch (status) {
    case FEINWERK_INVALID_ARGUMENT:
    case FEINWERK_NON_FINITE:
      throw py::value_error(message);
    case FEINWERK_OUT_OF_RANGE:
      throw py::index_error(message);
    case FEINWERK_UNSUPPORTED:
      PyErr_SetString(PyExc_NotImplementedError, message);
      throw py::error_already_set();
    case FEINWERK_OK:
    case FEINWERK_INTERNAL:
      break;
  }
  throw std::runtime_error(message);
}

// Runs one operation without the GIL on `threads` threads.
template <class Args>
void run(feinwerk_status (*op)(const Args*, const feinwerk_executor*), const Args& args,
         int64_t threads) {
  feinwerk_status status;
  {
    const py::gil_scoped_release release;
    const feinwerk_executor executor = feinwerk::make_executor(threads);
    status = op(&args, &executor);
  }
  check(status);
}

// (N, K, blocksize, packed, packed_bytes, absmax, codes, absmax_count, nested_absmax,
//  nested_absmax_count, nested_codebook, nested_offset); absmax or codes is 0.
feinwerk_nf4_weight weight_of(const py::tuple& t) {
  const auto size = [&](std::size_t i) { return t[i].cast<int64_t>(); };
  const auto address = [&](std::size_t i) { return t[i].cast<Address>(); };
  feinwerk_nf4_weight weight = {};
  weight.rows = size(0);
  weight.cols = size(1);
  weight.blocksize = size(2);
  weight.packed = at<const uint8_t>(address(3));
  weight.packed_bytes = size(4);
  weight.absmax = at<const float>(address(5));
  weight.absmax_codes = at<const uint8_t>(address(6));
  weight.absmax_count = size(7);
  weight.nested_absmax = at<const float>(address(8));
  weight.nested_absmax_count = size(9);
  weight.nested_codebook = at<const float>(address(10));
  weight.nested_offset = at<const float>(address(11));
  return weight;
}

feinwerk_dtype dtype_of(int dtype);

// (NF4 fields as above, address of a dense weight or 0, its dtype)
feinwerk_weight base_of(const py::tuple& t) {
  feinwerk_weight weight = {};
  weight.nf4 = weight_of(t[0]);
  weight.dense = at<const void>(t[1].cast<Address>());
  weight.dense_dtype = dtype_of(t[2].cast<int>());
  return weight;
}

// (r, lora_A, lora_B, scaling, row_begin, row_end, magnitude, base_norm, weight_norm,
//  weight_norm_known, grad_A, grad_B, grad_magnitude)
std::vector<feinwerk_adapter> adapters_of(const py::list& list) {
  std::vector<feinwerk_adapter> adapters;
  for (const py::handle& item : list) {
    const auto t = item.cast<py::tuple>();
    const auto floats = [&](std::size_t i) { return at<float>(t[i].cast<Address>()); };
    feinwerk_adapter adapter = {};
    adapter.r = t[0].cast<int64_t>();
    adapter.lora_A = floats(1);
    adapter.lora_B = floats(2);
    adapter.scaling = t[3].cast<float>();
    adapter.row_begin = t[4].cast<int64_t>();
    adapter.row_end = t[5].cast<int64_t>();
    adapter.magnitude = floats(6);
    adapter.base_norm = floats(7);
    adapter.weight_norm = floats(8);
    adapter.weight_norm_known = t[9].cast<bool>();
    adapter.grad_A = floats(10);
    adapter.grad_B = floats(11);
    adapter.grad_magnitude = floats(12);
    adapters.push_back(adapter);
  }
  return adapters;
}

// (param, remainder, grad, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, absmax_count,
//  rows, cols, step, parameter, first_element)
std::vector<feinwerk_adamw_tensor> adamw_tensors_of(const py::list& list) {
  std::vector<feinwerk_adamw_tensor> tensors;
  for (const py::handle& item : list) {
    const auto t = item.cast<py::tuple>();
    const auto address = [&](std::size_t i) { return t[i].cast<Address>(); };
    const auto number = [&](std::size_t i) { return t[i].cast<int64_t>(); };
    tensors.push_back({at<void>(address(0)), at<int16_t>(address(1)), at<const void>(address(2)),
                       at<void>(address(3)), at<void>(address(4)), at<float>(address(5)),
                       at<float>(address(6)), number(7), number(8), number(9), number(10),
                       number(11), number(12)});
  }
  return tensors;
}

feinwerk_dropout dropout_of(uint64_t seed, uint32_t drop_below, float keep_scale) {
  feinwerk_dropout dropout = {};
  dropout.seed = seed;
  dropout.drop_below = drop_below;
  dropout.keep_scale = keep_scale;
  return dropout;
}

// Runs an operation if its workspace is large enough; else returns the bytes that it needs.
template <class Args>
int64_t run_or_size(feinwerk_status (*op)(const Args*, const feinwerk_executor*),
                    feinwerk_status (*size)(const Args*, int64_t, int64_t*), const Args& args,
                    int64_t threads) {
  int64_t bytes = 0;
  check(size(&args, threads, &bytes));
  if (bytes > args.workspace_bytes) return bytes;
  run(op, args, threads);
  return 0;
}

feinwerk_dtype dtype_of(int dtype) { return static_cast<feinwerk_dtype>(dtype); }

py::list isas() {
  py::list names;
  for (int64_t i = 0; i < feinwerk_isa_count(); ++i)
    if (feinwerk_isa_available(i)) names.append(feinwerk_isa_name(i));
  return names;
}

// Asks for 2 MB pages under a large output: touching fresh 4 KB pages can cost more than the kernel
// that fills them, and walking through them later costs again. A hint; the system may say no.
void advise_huge_pages(Address address, int64_t bytes) {
#if defined(__linux__)
  constexpr Address kPage = 4096;
  const Address begin = (address + kPage - 1) / kPage * kPage;
  const Address end = (address + static_cast<Address>(bytes)) / kPage * kPage;
  if (end > begin) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
#endif
}

std::string isa() {
  const char* name = nullptr;
  check(feinwerk_active_isa(&name));
  return name;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of Feinwerk; use feinwerk.ops.";
  m.def("version", [] { return std::string(feinwerk_version()); });
  m.def("isas", isas, "Instruction sets this build and CPU share, in ascending preference.");
  m.def("isa", isa, "The instruction set in use.");
  m.def("force_isa", [](const py::object& name) {
    check(name.is_none() ? feinwerk_force_isa(nullptr)
                         : feinwerk_force_isa(name.cast<std::string>().c_str()));
  });
  m.def("openmp", feinwerk::describe_executor);
  m.def("advise_huge_pages", advise_huge_pages);

  m.def("nf4_quantize", [](Address weight, int dtype, int64_t count, int64_t blocksize, int rule,
                           bool allow_non_finite, Address packed, int64_t packed_bytes,
                           Address absmax, int64_t absmax_count, int64_t threads) {
    feinwerk_nf4_quantize_args args = {};
    args.weight = at<const void>(weight);
    args.dtype = dtype_of(dtype);
    args.count = count;
    args.blocksize = blocksize;
    args.rule = static_cast<feinwerk_rule>(rule);
    args.allow_non_finite = allow_non_finite;
    args.packed = at<uint8_t>(packed);
    args.packed_bytes = packed_bytes;
    args.absmax = at<float>(absmax);
    args.absmax_count = absmax_count;
    run(feinwerk_nf4_quantize, args, threads);
  });
  m.def("nf4_dequantize",
        [](const py::tuple& weight, Address out, int dtype, int64_t out_count, int64_t threads) {
          feinwerk_nf4_dequantize_args args = {};
          args.weight = weight_of(weight);
          args.out = at<void>(out);
          args.dtype = dtype_of(dtype);
          args.out_count = out_count;
          run(feinwerk_nf4_dequantize, args, threads);
        });
  m.def("nf4_linear", [](const py::tuple& weight, Address x, Address y, int dtype, int64_t rows,
                         Address bias, int bias_dtype, int compute, Address workspace,
                         int64_t workspace_bytes, int64_t threads) {
    feinwerk_nf4_linear_args args = {};
    args.weight = weight_of(weight);
    args.x = at<const void>(x);
    args.y = at<void>(y);
    args.dtype = dtype_of(dtype);
    args.m = rows;
    args.bias = at<const void>(bias);
    args.bias_dtype = dtype_of(bias_dtype);
    args.compute = static_cast<feinwerk_compute>(compute);
    args.workspace = at<void>(workspace);
    args.workspace_bytes = workspace_bytes;
    run(feinwerk_nf4_linear, args, threads);
  });
  m.def("nf4_linear_backward",
        [](const py::tuple& weight, Address grad_y, Address grad_x, int dtype, int64_t rows,
           Address workspace, int64_t workspace_bytes, int64_t threads) {
          feinwerk_nf4_linear_backward_args args = {};
          args.weight = weight_of(weight);
          args.grad_y = at<const void>(grad_y);
          args.grad_x = at<void>(grad_x);
          args.dtype = dtype_of(dtype);
          args.m = rows;
          args.workspace = at<void>(workspace);
          args.workspace_bytes = workspace_bytes;
          run(feinwerk_nf4_linear_backward, args, threads);
        });
  m.def("nf4_embedding", [](const py::tuple& weight, Address indices, int64_t indices_count,
                            Address out, int dtype, int64_t out_count, int64_t threads) {
    feinwerk_nf4_embedding_args args = {};
    args.weight = weight_of(weight);
    args.indices = at<const int64_t>(indices);
    args.indices_count = indices_count;
    args.out = at<void>(out);
    args.dtype = dtype_of(dtype);
    args.out_count = out_count;
    run(feinwerk_nf4_embedding, args, threads);
  });
  m.def("lora_linear",
        [](const py::tuple& weight, Address x, Address y, int dtype, int64_t rows, Address bias,
           int bias_dtype, int compute, const py::list& adapters, Address s, int64_t s_cols,
           uint64_t seed, uint32_t drop_below, float keep_scale, Address workspace,
           int64_t workspace_bytes, int64_t threads) {
          const auto list = adapters_of(adapters);
          feinwerk_lora_linear_args args = {};
          args.weight = base_of(weight);
          args.x = at<const void>(x);
          args.y = at<void>(y);
          args.dtype = dtype_of(dtype);
          args.m = rows;
          args.bias = at<const void>(bias);
          args.bias_dtype = dtype_of(bias_dtype);
          args.compute = static_cast<feinwerk_compute>(compute);
          args.adapters = list.data();
          args.adapter_count = static_cast<int64_t>(list.size());
          args.s = at<float>(s);
          args.s_cols = s_cols;
          args.dropout = dropout_of(seed, drop_below, keep_scale);
          args.workspace = at<void>(workspace);
          args.workspace_bytes = workspace_bytes;
          return run_or_size(feinwerk_lora_linear, feinwerk_lora_linear_workspace, args, threads);
        });
  m.def("lora_linear_backward",
        [](const py::tuple& weight, Address grad_y, Address x, Address y, int dtype, int64_t rows,
           Address bias, int bias_dtype, const py::list& adapters, Address s, int64_t s_cols,
           uint64_t seed, uint32_t drop_below, float keep_scale, Address grad_x, Address grad_bias,
           Address workspace, int64_t workspace_bytes, int64_t threads) {
          const auto list = adapters_of(adapters);
          feinwerk_lora_linear_backward_args args = {};
          args.weight = base_of(weight);
          args.grad_y = at<const void>(grad_y);
          args.x = at<const void>(x);
          args.y = at<const void>(y);
          args.dtype = dtype_of(dtype);
          args.m = rows;
          args.bias = at<const void>(bias);
          args.bias_dtype = dtype_of(bias_dtype);
          args.adapters = list.data();
          args.adapter_count = static_cast<int64_t>(list.size());
          args.s = at<const float>(s);
          args.s_cols = s_cols;
          args.dropout = dropout_of(seed, drop_below, keep_scale);
          args.grad_x = at<void>(grad_x);
          args.grad_bias = at<float>(grad_bias);
          args.workspace = at<void>(workspace);
          args.workspace_bytes = workspace_bytes;
          return run_or_size(feinwerk_lora_linear_backward, feinwerk_lora_linear_backward_workspace,
                             args, threads);
        });
  m.def("blockwise_quantize",
        [](Address x, int64_t count, int64_t blocksize, int64_t row_length, Address codebook,
           int rule, bool center, Address codes, Address absmax, int64_t absmax_count,
           Address offset, int64_t threads) {
          feinwerk_blockwise_quantize_args args = {};
          args.x = at<const float>(x);
          args.count = count;
          args.blocksize = blocksize;
          args.row_length = row_length;
          args.codebook = at<const float>(codebook);
          args.rule = static_cast<feinwerk_rule>(rule);
          args.center = center;
          args.codes = at<uint8_t>(codes);
          args.absmax = at<float>(absmax);
          args.absmax_count = absmax_count;
          args.offset = at<float>(offset);
          run(feinwerk_blockwise_quantize, args, threads);
        });
  m.def("blockwise_dequantize",
        [](Address codes, int64_t count, int64_t blocksize, int64_t row_length, Address codebook,
           Address absmax, int64_t absmax_count, Address offset, Address out, int64_t threads) {
          feinwerk_blockwise_dequantize_args args = {};
          args.codes = at<const uint8_t>(codes);
          args.count = count;
          args.blocksize = blocksize;
          args.row_length = row_length;
          args.codebook = at<const float>(codebook);
          args.absmax = at<const float>(absmax);
          args.absmax_count = absmax_count;
          args.offset = at<const float>(offset);
          args.out = at<float>(out);
          run(feinwerk_blockwise_dequantize, args, threads);
        });
  m.def("adamw_step", [](const py::list& tensors, int master, int grad_dtype, int state,
                         int64_t blocksize, double lr, double beta1, double beta2, double eps,
                         double weight_decay, float grad_factor, uint64_t seed, int64_t threads) {
    const auto list = adamw_tensors_of(tensors);
    feinwerk_adamw_step_args args = {};
    args.tensors = list.data();
    args.tensor_count = static_cast<int64_t>(list.size());
    args.master = static_cast<feinwerk_master>(master);
    args.grad_dtype = dtype_of(grad_dtype);
    args.state = static_cast<feinwerk_state>(state);
    args.blocksize = blocksize;
    args.lr = lr;
    args.beta1 = beta1;
    args.beta2 = beta2;
    args.eps = eps;
    args.weight_decay = weight_decay;
    args.grad_factor = grad_factor;
    args.seed = seed;
    run(feinwerk_adamw_step, args, threads);
  });
  m.def("square_sum",
        [](const py::list& tensors, Address limbs, int64_t limb_count, int64_t threads) {
          std::vector<feinwerk_rows> rows;
          for (const py::handle& item : tensors) {
            const auto t = item.cast<py::tuple>();
            rows.push_back({at<const void>(t[0].cast<Address>()), dtype_of(t[1].cast<int>()),
                            t[2].cast<int64_t>(), t[3].cast<int64_t>()});
          }
          run(feinwerk_square_sum,
              feinwerk_square_sum_args{rows.data(), static_cast<int64_t>(rows.size()),
                                       at<int64_t>(limbs), limb_count},
              threads);
        });
  m.def("nf4_linear_workspace", [](int64_t rows, int64_t n, int64_t k, int64_t blocksize, int dtype,
                                   int compute, int64_t threads) {
    int64_t bytes = 0;
    check(feinwerk_nf4_linear_workspace(rows, n, k, blocksize, dtype_of(dtype),
                                        static_cast<feinwerk_compute>(compute), threads, &bytes));
    return bytes;
  });
  m.def("nf4_linear_backward_workspace",
        [](int64_t rows, int64_t n, int64_t k, int64_t blocksize, int dtype, int64_t threads) {
          int64_t bytes = 0;
          check(feinwerk_nf4_linear_backward_workspace(rows, n, k, blocksize, dtype_of(dtype),
                                                       threads, &bytes));
          return bytes;
        });
}
