/* The C ABI of the Feinwerk core: the only header that its hosts (Python, ONNX Runtime, C) include.
 *
 * Conventions
 *   - Valid C11 and C++17. Every function returns a status; none throws, prints or aborts.
 *     feinwerk_last_error() holds the message of the last failure on the calling thread.
 *   - Sizes and counts are int64_t and counted in elements unless the name ends in _bytes.
 *     They are validated against each other before any pointer is touched.
 *   - The caller owns every buffer and every thread. No function keeps a pointer after it returns.
 *   - Matrices are row-major. y[M,N] = x[M,K] @ W[N,K]^T.
 */
#ifndef FEINWERK_FEINWERK_H_
#define FEINWERK_FEINWERK_H_

#include <stdint.h>

#if defined(_WIN32)
#define FEINWERK_API __declspec(dllexport)
#else
#define FEINWERK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum feinwerk_status {
  FEINWERK_OK = 0,
  FEINWERK_INVALID_ARGUMENT = 1, /* a size, dtype, pointer or option breaks its rule */
  FEINWERK_OUT_OF_RANGE = 2,     /* an index in the data points outside its table */
  FEINWERK_NON_FINITE = 3,       /* NaN or infinity where the options forbid it */
  FEINWERK_UNSUPPORTED = 4,      /* valid, but not on this CPU or in this build */
  FEINWERK_INTERNAL = 5          /* a defect of the library */
} feinwerk_status;

typedef enum feinwerk_dtype {
  FEINWERK_FLOAT32 = 0,
  FEINWERK_BFLOAT16 = 1,
  FEINWERK_FLOAT16 = 2
} feinwerk_dtype;

/* Which quantizer's decisions are reproduced (docs/format.md, "Rules"). */
typedef enum feinwerk_rule {
  FEINWERK_RULE_CPU = 0, /* bitsandbytes on CPU, its 65,536-bin search of 8-bit codes included */
  FEINWERK_RULE_CUDA =
      1 /* CUDA's thresholds and zero and NaN rules; exact nearest for 8-bit codes */
} feinwerk_rule;

/* How nf4_linear may compute the product. */
typedef enum feinwerk_compute {
  FEINWERK_COMPUTE_EXACT = 0, /* within the error budget of the activation dtype */
  FEINWERK_COMPUTE_INT8 = 1   /* activations rounded to 8 bits, one scale per 64 elements of K */
} feinwerk_compute;

/* Where parallel work runs. fn(arg, task) is called once for every task in [0, tasks), in any
 * order, possibly at once; parallel_for returns when all have. A null executor, a null
 * parallel_for or threads <= 1 means serial. Results never depend on the executor. */
typedef struct feinwerk_executor {
  void* self;
  int64_t threads;
  void (*parallel_for)(void* self, int64_t tasks, void (*fn)(void* arg, int64_t task), void* arg);
} feinwerk_executor;

/* A matrix or vector held in NF4: flat, row-major, blocks of `blocksize` consecutive elements that
 * may cross rows, the last one may be partial. Element e is the high nibble of packed[e / 2] when e
 * is even, else the low one; its value is codebook[code] * absmax[e / blocksize].
 *
 * Exactly one of absmax and absmax_codes is non-null. With codes (double quantization):
 *   absmax[b] = nested_codebook[absmax_codes[b]] * nested_absmax[b / 256] + nested_offset[0]
 * in fp32, the product rounded before the sum. */
typedef struct feinwerk_nf4_weight {
  int64_t rows;      /* N */
  int64_t cols;      /* K */
  int64_t blocksize; /* 32, 64, 128, 256, 512, 1024, 2048 or 4096 */
  const uint8_t* packed;
  int64_t packed_bytes; /* ceil(rows * cols / 2) */
  const float* absmax;
  const uint8_t* absmax_codes;
  int64_t absmax_count; /* ceil(rows * cols / blocksize) */
  const float* nested_absmax;
  int64_t nested_absmax_count;  /* ceil(absmax_count / 256) */
  const float* nested_codebook; /* 256 entries */
  const float* nested_offset;   /* one value */
} feinwerk_nf4_weight;

/* weight[count] -> packed, absmax. */
typedef struct feinwerk_nf4_quantize_args {
  const void* weight;
  feinwerk_dtype dtype;
  int64_t count;
  int64_t blocksize;
  feinwerk_rule rule;
  int32_t allow_non_finite; /* 0: NaN or infinity is FEINWERK_NON_FINITE */
  uint8_t* packed;
  int64_t packed_bytes;
  float* absmax;
  int64_t absmax_count;
} feinwerk_nf4_quantize_args;

/* weight -> out[rows * cols], one rounding of the fp32 product to dtype. */
typedef struct feinwerk_nf4_dequantize_args {
  feinwerk_nf4_weight weight;
  void* out;
  feinwerk_dtype dtype;
  int64_t out_count;
} feinwerk_nf4_dequantize_args;

/* y[m, N] = x[m, K] @ W^T + bias. */
typedef struct feinwerk_nf4_linear_args {
  feinwerk_nf4_weight weight;
  const void* x;
  void* y;
  feinwerk_dtype dtype; /* of x and y */
  int64_t m;
  const void* bias; /* N values or null */
  feinwerk_dtype bias_dtype;
  feinwerk_compute compute;
  void* workspace; /* 64-byte aligned, feinwerk_nf4_linear_workspace() bytes */
  int64_t workspace_bytes;
} feinwerk_nf4_linear_args;

/* grad_x[m, K] = grad_y[m, N] @ W. */
typedef struct feinwerk_nf4_linear_backward_args {
  feinwerk_nf4_weight weight;
  const void* grad_y;
  void* grad_x;
  feinwerk_dtype dtype; /* of grad_y and grad_x */
  int64_t m;
  void* workspace; /* 64-byte aligned, feinwerk_nf4_linear_backward_workspace() bytes */
  int64_t workspace_bytes;
} feinwerk_nf4_linear_backward_args;

/* A frozen matrix W[N, K]: NF4, or dense when `dense` is not null. nf4.rows and nf4.cols are its
 * shape either way; of a dense one no other member of nf4 is read. */
typedef struct feinwerk_weight {
  feinwerk_nf4_weight nf4;
  const void* dense; /* [N, K] */
  feinwerk_dtype dense_dtype;
} feinwerk_weight;

/* One adapter, W + scaling * lora_B @ lora_A, on the rows [row_begin, row_end) of x. DoRA adds a
 * magnitude: what the adapter makes of a row is multiplied by magnitude / weight_norm, where
 *   weight_norm[i] = || W[i, :] + scaling * (lora_B @ lora_A)[i, :] ||
 * is found from base_norm[i] = || W[i, :] || unless weight_norm_known. */
typedef struct feinwerk_adapter {
  int64_t r;           /* at least 1; 0 in the forward, for a magnitude alone */
  const float* lora_A; /* [r, K] */
  const float* lora_B; /* [N, r] */
  float scaling;
  int64_t row_begin, row_end;
  const float* magnitude;    /* [N], null for LoRA */
  const float* base_norm;    /* [N], read when weight_norm is to be found */
  float* weight_norm;        /* [N], with magnitude; without, null or where to write it */
  int32_t weight_norm_known; /* weight_norm is read, not written */
  float* grad_A;             /* of the backward: [r, K], [N, r] and [N], or null */
  float* grad_B;
  float* grad_magnitude;
} feinwerk_adapter;

/* Dropout of x on the adapters' way: element (m, k) is dropped when its Philox word is below
 * drop_below (docs/philox.md), what stays is multiplied by keep_scale. drop_below = 0: none. */
typedef struct feinwerk_dropout {
  uint64_t seed;
  uint32_t drop_below; /* round(p * 2^32) */
  float keep_scale;    /* 1 / (1 - p) */
} feinwerk_dropout;

/* y = x @ W^T + scaling * (dropout(x) @ lora_A^T) @ lora_B^T + bias, row by row with its adapter;
 * with magnitude as docs/ops/lora_linear.md has it. Adapters are in ascending order of their rows
 * and share none. m = 0 finds weight norms only. */
typedef struct feinwerk_lora_linear_args {
  feinwerk_weight weight;
  const void* x;
  void* y;
  feinwerk_dtype dtype; /* of x and y */
  int64_t m;
  const void* bias; /* N values or null */
  feinwerk_dtype bias_dtype;
  feinwerk_compute compute;
  const feinwerk_adapter* adapters;
  int64_t adapter_count;
  float* s; /* [m, s_cols]: dropout(x) @ lora_A^T, rows of an adapter in its first r columns */
  int64_t s_cols; /* at least every r */
  feinwerk_dropout dropout;
  void* workspace; /* 64-byte aligned, feinwerk_lora_linear_workspace() bytes */
  int64_t workspace_bytes;
} feinwerk_lora_linear_args;

/* The gradients of feinwerk_lora_linear for x, bias and every adapter. */
typedef struct feinwerk_lora_linear_backward_args {
  feinwerk_weight weight;
  const void* grad_y;
  const void* x;
  const void* y; /* what the forward wrote, or null: then grad_magnitude recomputes it in slabs */
  feinwerk_dtype dtype; /* of grad_y, x, y and grad_x */
  int64_t m;
  const void* bias;
  feinwerk_dtype bias_dtype;
  const feinwerk_adapter* adapters; /* weight_norm known */
  int64_t adapter_count;
  const float* s; /* what the forward wrote */
  int64_t s_cols;
  feinwerk_dropout dropout;
  void* grad_x;     /* [m, K] or null */
  float* grad_bias; /* [N] or null */
  void* workspace;  /* 64-byte aligned, feinwerk_lora_linear_backward_workspace() bytes */
  int64_t workspace_bytes;
} feinwerk_lora_linear_backward_args;

/* out[i, :] = W[indices[i], :]. */
typedef struct feinwerk_nf4_embedding_args {
  feinwerk_nf4_weight weight;
  const int64_t* indices;
  int64_t indices_count;
  void* out;
  feinwerk_dtype dtype;
  int64_t out_count; /* indices_count * cols */
} feinwerk_nf4_embedding_args;

/* x[count] -> 8-bit codes into `codebook`, one absmax per block.
 * center != 0: the mean of x (in the order of docs/ops/blockwise_quantize.md) is subtracted first
 * and written to offset[0]; otherwise offset[0] = 0. */
typedef struct feinwerk_blockwise_quantize_args {
  const float* x;
  int64_t count;
  int64_t blocksize;     /* any positive */
  int64_t row_length;    /* blocks do not cross rows of this length; 0: one row */
  const float* codebook; /* 256 entries, ascending */
  feinwerk_rule rule;
  int32_t center;
  uint8_t* codes;
  float* absmax;
  int64_t absmax_count; /* rows * ceil(row_length / blocksize) */
  float* offset;
} feinwerk_blockwise_quantize_args;

/* out[i] = codebook[codes[i]] * absmax[block of i] + offset[0]; a null offset adds nothing. */
typedef struct feinwerk_blockwise_dequantize_args {
  const uint8_t* codes;
  int64_t count;
  int64_t blocksize;
  int64_t row_length;    /* as in feinwerk_blockwise_quantize_args */
  const float* codebook; /* 256 entries */
  const float* absmax;
  int64_t absmax_count;
  const float* offset;
  float* out;
} feinwerk_blockwise_dequantize_args;

/* How AdamW's moments are held. */
typedef enum feinwerk_state {
  FEINWERK_STATE_FLOAT32 = 0,
  FEINWERK_STATE_BFLOAT16 = 1, /* rounded to nearest even */
  FEINWERK_STATE_DYNAMIC8 = 2  /* codes into the 8-bit dynamic maps (docs/format.md) */
} feinwerk_state;

/* How parameters are held. */
typedef enum feinwerk_master {
  FEINWERK_MASTER_FLOAT32 = 0, /* float */
  FEINWERK_MASTER_REMAINDER =
      1, /* bf16, the upper half of an fp32 master; the lower in remainder */
  FEINWERK_MASTER_STOCHASTIC = 2 /* bf16, rounded at random */
} feinwerk_master;

/* One parameter, [rows, cols] row-major, and its states. A block of `blocksize` codes never crosses
 * a row. */
typedef struct feinwerk_adamw_tensor {
  void* param;
  int16_t* remainder; /* FEINWERK_MASTER_REMAINDER only */
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  float* exp_avg_absmax; /* FEINWERK_STATE_DYNAMIC8 only: [rows, ceil(cols / blocksize)] */
  float* exp_avg_sq_absmax;
  int64_t absmax_count; /* of each; 0 without codes */
  int64_t rows, cols;
  int64_t step;          /* 1 is the first */
  int64_t parameter;     /* for random rounding: which parameter, in [0, 2^31) */
  int64_t first_element; /* and which of its elements is the first here */
} feinwerk_adamw_tensor;

/* One step of AdamW over a list of parameters, in place; docs/ops/adamw_step.md. */
typedef struct feinwerk_adamw_step_args {
  const feinwerk_adamw_tensor* tensors;
  int64_t tensor_count;
  feinwerk_master master;
  feinwerk_dtype grad_dtype;
  feinwerk_state state;
  int64_t blocksize;
  double lr, beta1, beta2, eps, weight_decay;
  float grad_factor; /* multiplies the gradients */
  uint64_t seed;
} feinwerk_adamw_step_args;

/* A matrix; an element of a vector is a row of its own. */
typedef struct feinwerk_rows {
  const void* data;
  feinwerk_dtype dtype;
  int64_t rows, cols;
} feinwerk_rows;

/* The sum of all squares: fp64 sums of the rows, added up exactly. limbs[0 .. 19] hold it in units
 * of 2^-300 in base 2^30, lowest first, without carries; limbs[20] and limbs[21] count the rows
 * with an infinity and with a NaN. docs/ops/square_sum.md has the order within a row. */
#define FEINWERK_SQUARE_SUM_LENGTH 22
typedef struct feinwerk_square_sum_args {
  const feinwerk_rows* tensors;
  int64_t tensor_count;
  int64_t* limbs;
  int64_t limb_count; /* FEINWERK_SQUARE_SUM_LENGTH */
} feinwerk_square_sum_args;

FEINWERK_API feinwerk_status feinwerk_nf4_quantize(const feinwerk_nf4_quantize_args* args,
                                                   const feinwerk_executor* executor);
FEINWERK_API feinwerk_status feinwerk_nf4_dequantize(const feinwerk_nf4_dequantize_args* args,
                                                     const feinwerk_executor* executor);
FEINWERK_API feinwerk_status feinwerk_nf4_linear(const feinwerk_nf4_linear_args* args,
                                                 const feinwerk_executor* executor);
FEINWERK_API feinwerk_status feinwerk_nf4_linear_backward(
    const feinwerk_nf4_linear_backward_args* args, const feinwerk_executor* executor);
FEINWERK_API feinwerk_status feinwerk_lora_linear(const feinwerk_lora_linear_args* args,
                                                  const feinwerk_executor* executor);
FEINWERK_API feinwerk_status feinwerk_lora_linear_backward(
    const feinwerk_lora_linear_backward_args* args, const feinwerk_executor* executor);
FEINWERK_API feinwerk_status feinwerk_nf4_embedding(const feinwerk_nf4_embedding_args* args,
                                                    const feinwerk_executor* executor);
FEINWERK_API feinwerk_status feinwerk_blockwise_quantize(
    const feinwerk_blockwise_quantize_args* args, const feinwerk_executor* executor);
FEINWERK_API feinwerk_status feinwerk_blockwise_dequantize(
    const feinwerk_blockwise_dequantize_args* args, const feinwerk_executor* executor);

FEINWERK_API feinwerk_status feinwerk_square_sum(const feinwerk_square_sum_args* args,
                                                 const feinwerk_executor* executor);
FEINWERK_API feinwerk_status feinwerk_adamw_step(const feinwerk_adamw_step_args* args,
                                                 const feinwerk_executor* executor);

/* Scratch that the two products need: *bytes is bounded by about 16 MiB for packed activations
 * plus 1.5 MiB per thread, whatever N is (docs/ops/nf4_linear.md has the formula). */
FEINWERK_API feinwerk_status feinwerk_nf4_linear_workspace(int64_t m, int64_t n, int64_t k,
                                                           int64_t blocksize, feinwerk_dtype dtype,
                                                           feinwerk_compute compute,
                                                           int64_t threads, int64_t* bytes);
FEINWERK_API feinwerk_status feinwerk_nf4_linear_backward_workspace(int64_t m, int64_t n, int64_t k,
                                                                    int64_t blocksize,
                                                                    feinwerk_dtype dtype,
                                                                    int64_t threads,
                                                                    int64_t* bytes);

/* Scratch of the adapter functions for arguments that are complete but for the workspace: only
 * shapes, dtypes, ranks, row ranges and which pointers are null are read. */
FEINWERK_API feinwerk_status feinwerk_lora_linear_workspace(const feinwerk_lora_linear_args* args,
                                                            int64_t threads, int64_t* bytes);
FEINWERK_API feinwerk_status feinwerk_lora_linear_backward_workspace(
    const feinwerk_lora_linear_backward_args* args, int64_t threads, int64_t* bytes);

/* The message of the last failure on this thread; "" when there was none. Never null. */
FEINWERK_API const char* feinwerk_last_error(void);
FEINWERK_API const char* feinwerk_version(void);

/* Instruction sets, in the order of preference, ascending: the last available one is chosen at
 * first use, or the one that the environment variable FEINWERK_ISA names. */
FEINWERK_API int64_t feinwerk_isa_count(void);
FEINWERK_API const char* feinwerk_isa_name(int64_t index);  /* null when out of range */
FEINWERK_API int32_t feinwerk_isa_available(int64_t index); /* built in and supported by this CPU */
/* The ISA in use. FEINWERK_INVALID_ARGUMENT when FEINWERK_ISA names an unknown one,
 * FEINWERK_UNSUPPORTED when this CPU lacks it. */
FEINWERK_API feinwerk_status feinwerk_active_isa(const char** name);
/* Forces one for the whole process (tests); null returns to the default choice. Not thread-safe
 * against running operations. */
FEINWERK_API feinwerk_status feinwerk_force_isa(const char* name);

#ifdef __cplusplus
}
#endif

#endif /* FEINWERK_FEINWERK_H_ */
