// Everything wrong in a call of lora_linear, its gradient and their workspace functions.
#include <string.h>

#include "errors.h"

enum { kRank = 3, kAdapters = 2, kColsOfS = 4 };

static float A[kRank * kCols], B[kRows * kRank], magnitude[kRows], norm[kRows], s[kM * kColsOfS];
static float grad_A[kRank * kCols], grad_bias[kRows], grad_x[kM * kCols];
static feinwerk_adapter adapters[kAdapters];  // the first one DoRA, the second one LoRA

static void make_adapters(void) {
  for (int i = 0; i < kRows; ++i) magnitude[i] = bias[i] = norm[i] = 1;
  adapters[0] = (feinwerk_adapter){.r = 2,
                                   .lora_A = A,
                                   .lora_B = B,
                                   .scaling = 1,
                                   .row_end = 2,
                                   .magnitude = magnitude,
                                   .base_norm = bias,
                                   .weight_norm = norm};
  adapters[1] = (feinwerk_adapter){
      .r = kRank, .lora_A = A, .lora_B = B, .scaling = -2, .row_begin = 2, .row_end = kM};
}

#define REJECTS_SIZE(op, good, field, value, message)                       \
  do {                                                                      \
    feinwerk_##op##_args wrong = good;                                      \
    int64_t size = -7;                                                      \
    wrong.field = value;                                                    \
    expect(__LINE__, FEINWERK_INVALID_ARGUMENT, #op "_workspace: " message, \
           feinwerk_##op##_workspace(&wrong, 1, &size));                    \
    CHECK(size == -7);                                                      \
  } while (0)

// What the workspace function reads as well.
#define REJECTS_BOTH(op, good, field, value, message) \
  do {                                                \
    REJECTS(op, good, field, value, message);         \
    REJECTS_SIZE(op, good, field, value, message);    \
  } while (0)

#define REJECTS_ADAPTER(rejects, op, good, at, field, value, message) \
  do {                                                                \
    feinwerk_adapter broken[kAdapters];                               \
    memcpy(broken, good.adapters, sizeof broken);                     \
    broken[at].field = value;                                         \
    rejects(op, good, adapters, broken, message);                     \
  } while (0)

#define ROWS \
  "row_begin and row_end must ascend from one adapter to the next and stay in [0, 3], got "

// The rules that hold in both directions.
#define TEST_ADAPTER_ERRORS(op, good, least)                                                      \
  do {                                                                                            \
    int64_t bytes = 0;                                                                            \
    TEST_WEIGHT_ERRORS(op, good, weight.nf4);                                                     \
    REJECTS(op, good, x, NULL, "x must not be null for 150 elements, got null");                  \
    REJECTS(op, good, m, INT64_MAX, "");                                                          \
    REJECTS(op, good, m, -1, "m must not be negative, got -1");                                   \
    REJECTS(op, good, bias_dtype, (feinwerk_dtype)9, "bias_dtype must be float32 (0)");           \
    feinwerk_##op##_args dense = good, narrow;                                                    \
    dense.weight.dense = values;                                                                  \
    ACCEPTS(feinwerk_##op(&dense, NULL));                                                         \
    REJECTS(op, dense, weight.dense_dtype, (feinwerk_dtype)3, "dense_dtype must be float32 (0)"); \
    REJECTS(op, dense, weight.nf4.cols, -1, "rows x cols must not be negative, got -1");          \
    REJECTS(op, dense, weight.nf4.rows, INT64_MAX, "rows x cols must stay below");                \
    REJECTS_SIZE(op, good, dtype, (feinwerk_dtype)3, "dtype must be float32 (0)");                \
    REJECTS_SIZE(op, good, m, -1, "m x n must not be negative, got -1");                          \
    REJECTS_SIZE(op, good, weight.nf4.rows, -1, "m x n must not be negative, got -1");            \
    REJECTS_SIZE(op, good, weight.nf4.cols, INT64_MAX, "m x k must stay below");                  \
    REJECTS_SIZE(op, good, weight.nf4.blocksize, 63, "blocksize must be a power of two");         \
    expect(__LINE__, FEINWERK_INVALID_ARGUMENT, #op "_workspace: args must not be null",          \
           feinwerk_##op##_workspace(NULL, 1, &bytes));                                           \
    expect(__LINE__, FEINWERK_INVALID_ARGUMENT, #op "_workspace: bytes must not be null",         \
           feinwerk_##op##_workspace(&good, 1, NULL));                                            \
                                                                                                  \
    REJECTS_BOTH(op, good, adapter_count, -1, "adapter_count must not be negative, got -1");      \
    REJECTS_BOTH(op, good, adapters, NULL, "adapters must not be null for 2 elements, got null"); \
    REJECTS_BOTH(op, good, s_cols, 2, "s_cols must be at least every r, got 2");                  \
    REJECTS_BOTH(op, good, s_cols, -1, "s_cols must be at least every r, got -1");                \
    REJECTS_BOTH(op, good, s_cols, INT64_MAX, "m x s_cols must stay below");                      \
    REJECTS(op, good, s, NULL, "s must not be null for 12 elements, got null");                   \
    REJECTS_ADAPTER(REJECTS_BOTH, op, good, 1, r, (least) - 1, "r must be at least " #least);     \
    REJECTS_ADAPTER(REJECTS_BOTH, op, good, 0, r, INT64_MIN,                                      \
                    "r must be at least " #least ", got -");                                      \
    REJECTS_ADAPTER(REJECTS_BOTH, op, good, 1, r, INT64_MAX, "r x K must stay below");            \
    narrow = dense;                                                                               \
    narrow.weight.nf4.cols = 0;                                                                   \
    REJECTS_ADAPTER(REJECTS_BOTH, op, narrow, 1, r, INT64_MAX, "N x r must stay below");          \
    REJECTS_ADAPTER(REJECTS_BOTH, op, good, 0, row_begin, -1, ROWS "-1 and 2");                   \
    REJECTS_ADAPTER(REJECTS_BOTH, op, good, 0, row_begin, 3, ROWS "3 and 2");                     \
    REJECTS_ADAPTER(REJECTS_BOTH, op, good, 0, row_end, 3, ROWS "2 and 3");                       \
    REJECTS_ADAPTER(REJECTS_BOTH, op, good, 1, row_begin, 1, ROWS "1 and 3");                     \
    REJECTS_ADAPTER(REJECTS_BOTH, op, good, 1, row_end, kM + 1, ROWS "2 and 4");                  \
    REJECTS_ADAPTER(REJECTS_BOTH, op, good, 1, row_end, 0, ROWS "2 and 0");                       \
    REJECTS_ADAPTER(REJECTS_BOTH, op, good, 1, row_end, INT64_MIN, ROWS "2 and -");               \
    REJECTS_ADAPTER(REJECTS, op, good, 1, lora_A, NULL, "lora_A must not be null for 150");       \
    REJECTS_ADAPTER(REJECTS, op, good, 0, lora_B, NULL, "lora_B must not be null for 12");        \
    REJECTS_ADAPTER(REJECTS, op, good, 0, weight_norm, NULL,                                      \
                    "weight_norm must not be null for 6");                                        \
    REJECTS_ADAPTER(REJECTS, op, good, 0, scaling, 1 / zero, "scaling must be finite, got inf");  \
    REJECTS_ADAPTER(REJECTS, op, good, 1, scaling, zero / zero, "scaling must be finite, got ");  \
                                                                                                  \
    feinwerk_##op##_args dropping = good;                                                         \
    dropping.dropout = (feinwerk_dropout){.drop_below = 1, .keep_scale = 1};                      \
    ACCEPTS(feinwerk_##op##_workspace(&dropping, 1, &dropping.workspace_bytes));                  \
    dropping.workspace = workspace(dropping.workspace_bytes);                                     \
    ACCEPTS(feinwerk_##op(&dropping, NULL));                                                      \
    REJECTS(op, dropping, dropout.keep_scale, 0.5f,                                               \
            "keep_scale must be finite and at least 1, got 0.5");                                 \
    REJECTS(op, dropping, dropout.keep_scale, 1 / zero,                                           \
            "keep_scale must be finite and at least 1, got inf");                                 \
    REJECTS(op, dropping, dropout.keep_scale, zero / zero,                                        \
            "keep_scale must be finite and at least 1, got ");                                    \
    free(dropping.workspace);                                                                     \
    REJECTS(op, good, workspace_bytes, good.workspace_bytes - 1, "workspace_bytes must be at");   \
    REJECTS(op, good, workspace, NULL, "workspace must be 64-byte aligned and not null, got 0");  \
    REJECTS(op, good, workspace, (char*)good.workspace + 4, "workspace must be 64-byte aligned"); \
    /* No threads are one, and more threads never need less. */                                   \
    ACCEPTS(feinwerk_##op##_workspace(&good, 0, &bytes));                                         \
    CHECK(bytes == good.workspace_bytes);                                                         \
    ACCEPTS(feinwerk_##op##_workspace(&good, 8, &bytes));                                         \
    CHECK(bytes >= good.workspace_bytes);                                                         \
  } while (0)

static void test_forward(void) {
  const volatile float zero = 0;
  feinwerk_lora_linear_args good = {.weight = {.nf4 = plain_weight()},
                                    .x = x,
                                    .y = y,
                                    .m = kM,
                                    .bias = bias,
                                    .adapters = adapters,
                                    .adapter_count = kAdapters,
                                    .s = s,
                                    .s_cols = kColsOfS};
  ACCEPTS(feinwerk_lora_linear_workspace(&good, 1, &good.workspace_bytes));
  good.workspace = workspace(good.workspace_bytes);
  TEST_ADAPTER_ERRORS(lora_linear, good, 0);
  REJECTS(lora_linear, good, y, NULL, "y must not be null for 18 elements, got null");
  REJECTS(lora_linear, good, compute, (feinwerk_compute)5, "compute must be exact (0) or int8 (1)");
  REJECTS_ADAPTER(REJECTS, lora_linear, good, 0, base_norm, NULL,
                  "base_norm must not be null for 6");
  REJECTS_ADAPTER(REJECTS, lora_linear, good, 1, weight_norm, norm, "base_norm must not be null");
  free(good.workspace);

  // No adapters, and neither S nor its columns.
  good.adapters = NULL;
  good.adapter_count = good.s_cols = 0;
  good.s = NULL;
  ACCEPTS(feinwerk_lora_linear_workspace(&good, 1, &good.workspace_bytes));
  good.workspace = workspace(good.workspace_bytes);
  good.bias = NULL;
  ACCEPTS(feinwerk_lora_linear(&good, NULL));
  free(good.workspace);

  // Rank 0: the magnitude alone.
  float twos[kRows], plain[kM * kRows];
  memcpy(plain, y, sizeof plain);
  for (int i = 0; i < kRows; ++i) twos[i] = 2, norm[i] = 1;
  feinwerk_adapter alone = {
      .row_end = kM, .magnitude = twos, .weight_norm = norm, .weight_norm_known = 1};
  good.adapters = &alone;
  good.adapter_count = 1;
  ACCEPTS(feinwerk_lora_linear_workspace(&good, 1, &good.workspace_bytes));
  good.workspace = workspace(good.workspace_bytes);
  ACCEPTS(feinwerk_lora_linear(&good, NULL));
  for (int i = 0; i < kM * kRows; ++i) CHECK(y[i] == 2 * plain[i]);
  free(good.workspace);
}

static void test_backward(void) {
  const volatile float zero = 0;
  feinwerk_lora_linear_backward_args good = {.weight = {.nf4 = plain_weight()},
                                             .grad_y = out,
                                             .x = x,
                                             .y = y,
                                             .m = kM,
                                             .bias = bias,
                                             .adapters = adapters,
                                             .adapter_count = kAdapters,
                                             .s = s,
                                             .s_cols = kColsOfS,
                                             .grad_x = grad_x,
                                             .grad_bias = grad_bias};
  adapters[0].weight_norm_known = 1;
  adapters[1].grad_A = grad_A;
  ACCEPTS(feinwerk_lora_linear_backward_workspace(&good, 1, &good.workspace_bytes));
  good.workspace = workspace(good.workspace_bytes);
  TEST_ADAPTER_ERRORS(lora_linear_backward, good, 1);
  REJECTS(lora_linear_backward, good, grad_y, NULL, "grad_y must not be null for 18 elements");
  REJECTS_ADAPTER(REJECTS, lora_linear_backward, good, 0, weight_norm_known, 0,
                  "weight_norm_known must be set in the backward, got 0");
  free(good.workspace);
}

void test_adapter_errors(void) {
  make_adapters();
  test_forward();
  test_backward();
}
