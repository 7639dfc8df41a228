// The C ABI as a C11 host sees it: values on fixed sizes, and an error for everything wrong.
//
//   test_abi           every test, the values on every instruction set of this CPU
//   test_abi --small   the same with the first few sizes only, for an emulator
//   test_abi --large   values where the activations do not fit the workspace at once
//   test_abi --isas    prints the instruction sets of this CPU
//   test_abi --isa     prints the instruction set that is chosen by default
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cases.h"
#include "errors.h"
#include "plain.h"

int checks = 0;

void expect_at(const char* file, int line, feinwerk_status want, const char* message,
               feinwerk_status got) {
  ++checks;
  if (got == want && (!message || strncmp(feinwerk_last_error(), message, strlen(message)) == 0))
    return;
  fprintf(stderr, "FAILED %s:%d: status %d with \"%s\", want %d with \"%s...\"\n", file, line,
          (int)got, feinwerk_last_error(), (int)want, message ? message : "");
  exit(1);
}

// One small quantized weight that the error tests break in turn.
float values[kCount], absmax[kBlocks], x[kM * kCols], y[kM * kCols], out[kM * kCols * 8];
float nested_absmax[1], nested_codebook[256], nested_offset[1], bias[kRows];
uint8_t packed[kCount / 2], codes[kCount];
int64_t indices[kM] = {0, kRows - 1, 2};

feinwerk_nf4_weight plain_weight(void) {
  return (feinwerk_nf4_weight){.rows = kRows,
                               .cols = kCols,
                               .blocksize = 64,
                               .packed = packed,
                               .packed_bytes = kCount / 2,
                               .absmax = absmax,
                               .absmax_count = kBlocks};
}

feinwerk_nf4_weight nested_weight(void) {
  feinwerk_nf4_weight weight = plain_weight();
  weight.absmax = NULL;
  weight.absmax_codes = codes;
  weight.nested_absmax = nested_absmax;
  weight.nested_absmax_count = 1;
  weight.nested_codebook = nested_codebook;
  weight.nested_offset = nested_offset;
  return weight;
}

void* workspace(int64_t bytes) {
  void* block = aligned_alloc(64, bytes > 0 ? (size_t)(bytes + 63) / 64 * 64 : 64);
  CHECK(block != NULL);
  return block;
}

static void test_quantize_errors(void) {
  const feinwerk_nf4_quantize_args good = {.weight = values,
                                           .count = kCount,
                                           .blocksize = 64,
                                           .packed = packed,
                                           .packed_bytes = kCount / 2,
                                           .absmax = absmax,
                                           .absmax_count = kBlocks};
#define BREAK(field, value, rule) REJECTS(nf4_quantize, good, field, value, rule)
  expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "nf4_quantize: args must not be null, got null",
         feinwerk_nf4_quantize(NULL, NULL));
  BREAK(weight, NULL, "weight must not be null");
  BREAK(packed, NULL, "packed must not be null");
  BREAK(absmax, NULL, "absmax must not be null");
  BREAK(dtype, (feinwerk_dtype)3, "dtype must be float32 (0), bfloat16 (1) or float16 (2), got 3");
  BREAK(rule, (feinwerk_rule)2, "rule must be cpu (0) or cuda (1), got 2");
  BREAK(count, -1, "count must not be negative, got -1");
  BREAK(count, INT64_MAX, "count must");
  BREAK(count, kCount + 2, "packed_bytes must be 151, got 150");
  BREAK(packed_bytes, kCount / 2 - 1, "packed_bytes must be 150, got 149");
  BREAK(absmax_count, kBlocks + 1, "absmax_count must be 5, got 6");
  static const int64_t blocksizes[] = {0, 1, -64, 16, 48, 63, 65, 8192, INT64_MAX, INT64_MIN};
  for (size_t i = 0; i < sizeof blocksizes / sizeof *blocksizes; ++i)
    BREAK(blocksize, blocksizes[i], "blocksize must be a power of two from 32 to 4096, got ");
#undef BREAK
  const volatile float zero = 0;
  const float wrong[] = {1 / zero, -1 / zero, zero / zero};
  for (int i = 0; i < 3; ++i) {
    feinwerk_nf4_quantize_args args = good;
    const int at = i == 0 ? 0 : i == 1 ? 77 : kCount - 1;
    const float right = values[at];
    values[at] = wrong[i];
    expect(__LINE__, FEINWERK_NON_FINITE, "nf4_quantize: weight must be finite, got ",
           feinwerk_nf4_quantize(&args, NULL));
    args.allow_non_finite = 1;
    ACCEPTS(feinwerk_nf4_quantize(&args, NULL));
    values[at] = right;
  }
  ACCEPTS(feinwerk_nf4_quantize(&good, NULL));
  CHECK(absmax[0] > 0);
  const feinwerk_nf4_quantize_args nothing = {.blocksize = 64};
  ACCEPTS(feinwerk_nf4_quantize(&nothing, NULL));
}

static void test_dequantize_errors(void) {
  feinwerk_nf4_dequantize_args good = {plain_weight(), out, FEINWERK_FLOAT32, kCount};
  TEST_WEIGHT_ERRORS(nf4_dequantize, good, weight);
  REJECTS(nf4_dequantize, good, out, NULL, "out must not be null");
  REJECTS(nf4_dequantize, good, out_count, kCount - 1, "out_count must be 300, got 299");
}

static void test_embedding_errors(void) {
  feinwerk_nf4_embedding_args good = {plain_weight(),   indices,   kM, out,
                                      FEINWERK_FLOAT32, kM * kCols};
  TEST_WEIGHT_ERRORS(nf4_embedding, good, weight);
  REJECTS(nf4_embedding, good, out, NULL, "out must not be null");
  REJECTS(nf4_embedding, good, indices, NULL, "indices must not be null");
  REJECTS(nf4_embedding, good, indices_count, -1, "indices_count must not be negative");
  REJECTS(nf4_embedding, good, out_count, kCols, "out_count must be 150, got 50");
  static const int64_t outside[] = {-1, kRows, INT64_MAX, INT64_MIN};
  for (size_t i = 0; i < sizeof outside / sizeof *outside; ++i) {
    indices[1] = outside[i];
    expect(__LINE__, FEINWERK_OUT_OF_RANGE, "nf4_embedding: indices must be in [0, 6), got ",
           feinwerk_nf4_embedding(&good, NULL));
  }
  indices[1] = kRows - 1;
}

static void test_linear_errors(void) {
  feinwerk_nf4_linear_args good = {.weight = plain_weight(), .x = x, .y = y, .m = kM, .bias = bias};
  ACCEPTS(feinwerk_nf4_linear_workspace(kM, kRows, kCols, 64, FEINWERK_FLOAT32,
                                        FEINWERK_COMPUTE_EXACT, 1, &good.workspace_bytes));
  good.workspace = workspace(good.workspace_bytes);
#define BREAK(field, value, rule) REJECTS(nf4_linear, good, field, value, rule)
  TEST_WEIGHT_ERRORS(nf4_linear, good, weight);
  BREAK(x, NULL, "x must not be null for 150 elements, got null");
  BREAK(y, NULL, "y must not be null for 18 elements, got null");
  BREAK(m, -1, "m must not be negative, got -1");
  BREAK(m, INT64_MAX, "x must stay below");
  BREAK(bias_dtype, (feinwerk_dtype)9, "bias_dtype must be float32 (0)");
  BREAK(compute, (feinwerk_compute)5, "compute must be exact (0) or int8 (1), got 5");
  if (good.workspace_bytes > 0) {
    BREAK(workspace_bytes, good.workspace_bytes - 1, "workspace_bytes must be at least ");
    BREAK(workspace, NULL, "workspace must be 64-byte aligned and not null");
    BREAK(workspace, (char*)good.workspace + 4, "workspace must be 64-byte aligned");
  }
#undef BREAK
  free(good.workspace);
  int64_t bytes;
#define SIZE(m, blocksize, dtype, compute, bytes)                                    \
  feinwerk_nf4_linear_workspace(m, kRows, kCols, blocksize, (feinwerk_dtype)(dtype), \
                                (feinwerk_compute)(compute), 1, bytes)
  expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "nf4_linear_workspace: m x n must not be negative",
         SIZE(-1, 64, 0, 0, &bytes));
  expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "nf4_linear_workspace: blocksize must be",
         SIZE(1, 63, 0, 0, &bytes));
  expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "nf4_linear_workspace: dtype must be",
         SIZE(1, 64, 3, 0, &bytes));
  expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "nf4_linear_workspace: compute must be",
         SIZE(1, 64, 0, 2, &bytes));
  expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "nf4_linear_workspace: bytes must not be null",
         SIZE(1, 64, 0, 0, NULL));
#undef SIZE
}

static void test_backward_errors(void) {
  feinwerk_nf4_linear_backward_args good = {
      .weight = plain_weight(), .grad_y = y, .grad_x = x, .m = kM};
  ACCEPTS(feinwerk_nf4_linear_backward_workspace(kM, kRows, kCols, 64, FEINWERK_FLOAT32, 1,
                                                 &good.workspace_bytes));
  good.workspace = workspace(good.workspace_bytes);
#define BREAK(field, value, rule) REJECTS(nf4_linear_backward, good, field, value, rule)
  TEST_WEIGHT_ERRORS(nf4_linear_backward, good, weight);
  BREAK(grad_y, NULL, "grad_y must not be null for 18 elements");
  BREAK(grad_x, NULL, "grad_x must not be null for 150 elements");
  BREAK(m, -1, "m must not be negative, got -1");
  if (good.workspace_bytes > 0) {
    BREAK(workspace_bytes, good.workspace_bytes - 1, "workspace_bytes must be at least ");
    BREAK(workspace, NULL, "workspace must be 64-byte aligned and not null");
  }
#undef BREAK
  free(good.workspace);
  int64_t bytes;
  expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "nf4_linear_backward_workspace: m x k must not be",
         feinwerk_nf4_linear_backward_workspace(2, 3, -1, 64, FEINWERK_FLOAT32, 1, &bytes));
}

static void test_blockwise_errors(void) {
  float scales[2], offset;
  const feinwerk_blockwise_quantize_args good = {.x = values,
                                                 .count = kCount,
                                                 .blocksize = 256,
                                                 .codebook = nested_codebook,
                                                 .codes = codes,
                                                 .absmax = scales,
                                                 .absmax_count = 2,
                                                 .offset = &offset};
  ACCEPTS(feinwerk_blockwise_quantize(&good, NULL));
#define BREAK(field, value, rule) REJECTS(blockwise_quantize, good, field, value, rule)
  BREAK(x, NULL, "x must not be null");
  BREAK(codes, NULL, "codes must not be null");
  BREAK(absmax, NULL, "absmax must not be null");
  BREAK(codebook, NULL, "codebook must not be null");
  BREAK(offset, NULL, "offset must not be null");
  BREAK(blocksize, 0, "blocksize must be positive, got 0");
  BREAK(blocksize, 100, "absmax_count must be 3, got 2");
  BREAK(row_length, kCols, "absmax_count must be 6, got 2");
  BREAK(row_length, kCols + 1, "row_length must divide count = 300, got 51");
  BREAK(row_length, kCount + 1, "row_length must divide count = 300, got 301");
  BREAK(row_length, -1, "row_length must not be negative, got -1");
  BREAK(count, -5, "count must not be negative, got -5");
  BREAK(rule, (feinwerk_rule)-1, "rule must be cpu (0) or cuda (1), got -1");
#undef BREAK
  const feinwerk_blockwise_dequantize_args back = {.codes = codes,
                                                   .count = kCount,
                                                   .blocksize = 256,
                                                   .codebook = nested_codebook,
                                                   .absmax = scales,
                                                   .absmax_count = 2,
                                                   .out = out};
  ACCEPTS(feinwerk_blockwise_dequantize(&back, NULL));
#define BREAK(field, value, rule) REJECTS(blockwise_dequantize, back, field, value, rule)
  BREAK(codes, NULL, "codes must not be null");
  BREAK(out, NULL, "out must not be null");
  BREAK(absmax, NULL, "absmax must not be null");
  BREAK(codebook, NULL, "codebook must not be null");
  BREAK(blocksize, -1, "blocksize must be positive, got -1");
  BREAK(absmax_count, 1, "absmax_count must be 2, got 1");
  BREAK(row_length, 7, "row_length must divide count = 300, got 7");
  BREAK(row_length, kCols, "absmax_count must be 6, got 2");
  BREAK(count, -1, "count must not be negative, got -1");
#undef BREAK
}

// The published vectors of Philox4x32-10, and which word an element has (docs/philox.md).
static void test_philox(void) {
  static const uint32_t vectors[3][10] = {
      {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
      {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d,
       0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
       0x94fdcceb, 0x5001e420, 0x24126ea1},
  };
  uint32_t words[4];
  for (int i = 0; i < 3; ++i) {
    plain_philox(vectors[i], vectors[i] + 4, words);
    CHECK(memcmp(words, vectors[i] + 6, sizeof words) == 0);
  }
  // Column 64 b + 16 j + i of a row has word j of the counter 16 b + i.
  feinwerk_dropout dropout = {.seed = 0x0123456789abcdefu, .keep_scale = 2};
  for (int64_t column = 0; column < 200; ++column) {
    const uint32_t counter[4] = {(uint32_t)(column / 64 * 16 + column % 16), 0, 7, 1};
    const uint32_t key[2] = {0x89abcdef, 0x01234567};
    const int64_t row = (int64_t)1 << 32 | 7;
    plain_philox(counter, key, words);
    dropout.drop_below = words[column / 16 % 4];
    CHECK(dropout.drop_below > 0 && plain_dropout(&dropout, row, column) == 2);
    ++dropout.drop_below;
    CHECK(plain_dropout(&dropout, row, column) == 0);
  }
  dropout.drop_below = 0;
  CHECK(plain_dropout(&dropout, 3, 5) == 1);
}

static void test_isas(void) {
  const int64_t count = feinwerk_isa_count();
  CHECK(count >= 1 && strcmp(feinwerk_isa_name(0), "scalar") == 0 && feinwerk_isa_available(0));
  CHECK(feinwerk_isa_name(-1) == NULL && feinwerk_isa_name(count) == NULL);
  CHECK(!feinwerk_isa_available(-1) && !feinwerk_isa_available(count));
  expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "force_isa: ", feinwerk_force_isa("sse9"));
  CHECK(strstr(feinwerk_last_error(), "sse9") && strstr(feinwerk_last_error(), "scalar"));
  for (int64_t i = 0; i < count; ++i) {
    const char *name = feinwerk_isa_name(i), *active = NULL;
    if (!feinwerk_isa_available(i)) {
      expect(__LINE__, FEINWERK_UNSUPPORTED, "force_isa: ", feinwerk_force_isa(name));
      continue;
    }
    ACCEPTS(feinwerk_force_isa(name));
    ACCEPTS(feinwerk_active_isa(&active));
    CHECK(strcmp(active, name) == 0);
  }
  ACCEPTS(feinwerk_force_isa(NULL));
  expect(__LINE__, FEINWERK_INVALID_ARGUMENT, "active_isa: name must not be null",
         feinwerk_active_isa(NULL));
}

static void test_values(size_t first) {
  static const test_case cases[] = {
      {.m = 1, .n = 64, .k = 128, .blocksize = 64, .threads = 1},
      {.m = 0, .n = 3, .k = 5, .blocksize = 32, .threads = 2},
      {.m = 2, .n = 0, .k = 5, .blocksize = 64, .threads = 1},
      {.m = 2, .n = 5, .k = 0, .blocksize = 64, .threads = 2},
      {.m = 1, .n = 1, .k = 1, .blocksize = 4096, .nested = 1, .shift = 1, .threads = 3},
      {.m = 17, .n = 67, .k = 131, .blocksize = 32, .nested = 1, .shift = 1, .threads = 3},
      {.m = 33, .n = 96, .k = 576, .blocksize = 64, .nested = 1, .threads = 2},
      {.m = 70, .n = 90, .k = 700, .blocksize = 128, .nested = 1, .threads = 4},
      {.m = 5, .n = 40, .k = 300, .blocksize = 4096, .shift = 1, .threads = 4},
      {.m = 16, .n = 300, .k = 64, .blocksize = 64, .nested = 1, .threads = 2},
      // Past what adapters take at once: ranks, chunks of rows, columns of W for the gradient.
      {.m = 3, .n = 11, .k = 128, .blocksize = 128, .nested = 1, .threads = 2},
      {.m = 9, .n = 70, .k = 130, .blocksize = 64, .rank = 300, .threads = 2},
      {.m = 4, .n = 40, .k = 192, .blocksize = 64, .rank = 70, .nested = 1, .threads = 3},
      {.m = 1100, .n = 7, .k = 65, .blocksize = 64, .nested = 1, .threads = 3},
      {.m = 20, .n = 1100, .k = 70, .blocksize = 64, .nested = 1, .threads = 2},
      {.m = 6, .n = 3, .k = 2100, .blocksize = 64, .threads = 2},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases && i < first; ++i) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      test_case test = cases[i];
      test.dtype = (feinwerk_dtype)dtype;
      test.seed = 3 * i + (size_t)dtype;
      check_case_on_every_isa(&test);
    }
  }
}

// More rows than are packed at once: the workspace is bounded, whatever m is.
static void test_large_values(void) {
  for (int dtype = 0; dtype < 2; ++dtype) {
    const test_case test = {.m = dtype == 0 ? 2100 : 4200,
                            .n = 5,
                            .k = 2500,
                            .blocksize = 64,
                            .dtype = (feinwerk_dtype)dtype,
                            .nested = 1,
                            .threads = 2};
    check_case_on_every_isa(&test);
  }
}

static void print_isas(void) {
  for (int64_t i = 0; i < feinwerk_isa_count(); ++i)
    if (feinwerk_isa_available(i)) printf(" %s", feinwerk_isa_name(i));
  puts("");
}

int main(int argc, char** argv) {
  const char* isa = NULL;
  if (feinwerk_active_isa(&isa) != FEINWERK_OK) {
    fprintf(stderr, "%s\n", feinwerk_last_error());
    return 1;
  }
  if (argc > 1 && strcmp(argv[1], "--isa") == 0) {
    puts(isa);
    return 0;
  }
  if (argc > 1 && strcmp(argv[1], "--isas") == 0) {
    print_isas();
    return 0;
  }
  if (argc > 1 && strcmp(argv[1], "--large") == 0) {
    test_large_values();
    puts("test_abi: large values passed");
    return 0;
  }
  CHECK(strcmp(feinwerk_last_error(), "") == 0 && strlen(feinwerk_version()) > 0);
  for (int i = 0; i < kCount; ++i) values[i] = (float)((i * 37) % 101 - 50) / 25.0f;
  for (int i = 0; i < 256; ++i) nested_codebook[i] = (float)(i - 127) / 128.0f;
  test_quantize_errors();
  test_dequantize_errors();
  test_embedding_errors();
  test_linear_errors();
  test_backward_errors();
  test_adapter_errors();
  test_adamw_errors();
  test_square_sum_errors();
  test_blockwise_errors();
  test_philox();
  test_isas();
  test_values(argc > 1 && strcmp(argv[1], "--small") == 0 ? 6 : SIZE_MAX);
  printf("test_abi: %d checks passed; instruction sets:", checks);
  print_isas();
  return 0;
}
