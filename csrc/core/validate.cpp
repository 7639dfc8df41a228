// The rules of the C ABI, each in one place.
#include "core/validate.h"

#include <string>

#include "core/kernel_table.h"
#include "core/status.h"

namespace feinwerk {

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

void check_dtype(const char* op, const char* name, feinwerk_dtype dtype) {
  const int value = static_cast<int>(dtype);
  if (value < FEINWERK_FLOAT32 || value > FEINWERK_FLOAT16)
    invalid(op, name, "be float32 (0), bfloat16 (1) or float16 (2)", value);
}

void check_count(const char* op, const char* name, int64_t got, int64_t want) {
  if (got != want) invalid(op, name, "be " + std::to_string(want), got);
}

void check_buffer(const char* op, const char* name, const void* pointer, int64_t count) {
  if (!pointer && count > 0)
    invalid(op, name, "not be null for " + std::to_string(count) + " elements", "null");
}

void check_nf4_blocksize(const char* op, int64_t blocksize) {
  if (blocksize < 32 || blocksize > 4096 || (blocksize & (blocksize - 1)) != 0)
    invalid(op, "blocksize", "be a power of two from 32 to 4096", blocksize);
}

void check_rule(const char* op, feinwerk_rule rule) {
  const int value = static_cast<int>(rule);
  if (value != FEINWERK_RULE_CPU && value != FEINWERK_RULE_CUDA)
    invalid(op, "rule", "be cpu (0) or cuda (1)", value);
}

int64_t checked_product(const char* op, const char* name, int64_t a, int64_t b) {
  constexpr int64_t kLimit = int64_t{1} << 62;
  if (a < 0) invalid(op, name, "not be negative", a);
  if (b < 0) invalid(op, name, "not be negative", b);
  if (b != 0 && a > kLimit / b)
    invalid(op, name, "stay below 2^62 elements", std::to_string(a) + " x " + std::to_string(b));
  return a * b;
}

void check_weight(const char* op, const feinwerk_nf4_weight& weight) {
  check_nf4_blocksize(op, weight.blocksize);
  const int64_t count = checked_product(op, "rows x cols", weight.rows, weight.cols);
  const int64_t blocks = ceil_div(count, weight.blocksize);
  check_count(op, "packed_bytes", weight.packed_bytes, ceil_div(count, 2));
  check_buffer(op, "packed", weight.packed, count);
  check_count(op, "absmax_count", weight.absmax_count, blocks);
  if (weight.absmax && weight.absmax_codes)
    invalid(op, "absmax", "be given either plain or as codes", "both");
  if (!weight.absmax_codes) {
    check_buffer(op, "absmax", weight.absmax, blocks);
    return;
  }
  check_count(op, "nested_absmax_count", weight.nested_absmax_count,
              ceil_div(blocks, kNestedBlocksize));
  check_buffer(op, "nested_absmax", weight.nested_absmax, blocks);
  check_buffer(op, "nested_codebook", weight.nested_codebook, blocks);
  check_buffer(op, "nested_offset", weight.nested_offset, blocks);
}

void check_weight(const char* op, const feinwerk_weight& weight) {
  if (!weight.dense) return check_weight(op, weight.nf4);
  check_dtype(op, "dense_dtype", weight.dense_dtype);
  checked_product(op, "rows x cols", weight.nf4.rows, weight.nf4.cols);
}

}  // namespace feinwerk
