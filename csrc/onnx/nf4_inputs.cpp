// The rules of an NF4 weight's inputs.
#include "onnx/nf4_inputs.h"

namespace feinwerk::onnx {

namespace {

constexpr int64_t kNestedBlocksize = 256, kCodebookSize = 256;

int64_t positive(const Node& node, const char* name) {
  const int64_t value = node.integer(name);
  if (value < 1) reject(node.op, name, "be at least 1", std::to_string(value));
  return value;
}

}  // namespace

Nf4Inputs::Nf4Inputs(const Node& node, const Nf4Places& places, bool codes)
    : places_(places), codes_(codes), rows_(positive(node, "N")), cols_(positive(node, "K")) {
  blocksize_ = node.integer("block_size", 64);
  if (blocksize_ < 32 || blocksize_ > 4096 || (blocksize_ & (blocksize_ - 1)) != 0)
    reject(node.op, "block_size", "be a power of two from 32 to 4096", std::to_string(blocksize_));
  blocks_ = ceil_div(checked_product(node.op, "N x K", rows_, cols_), blocksize_);
  nested_blocks_ = ceil_div(blocks_, kNestedBlocksize);
  if (!codes) return;
  const char* const names[] = {"nested_absmax", "nested_codebook", "nested_offset"};
  const size_t indices[] = {places.nested_absmax, places.nested_codebook, places.nested_offset};
  for (int i = 0; i < 3; ++i)
    if (!node.has(indices[i])) reject(node.op, names[i], "be given with uint8 absmax", "none");
}

void Nf4Inputs::check(const char* op, size_t index, const char* name, const Tensor& tensor) const {
  if (index == places_.packed) {
    check_type(op, name, tensor, ort::kUint8);
    check_count(op, name, tensor, ceil_div(rows_ * cols_, 2));
  } else if (index == places_.absmax) {
    check_type(op, name, tensor, codes_ ? ort::kUint8 : ort::kFloat);
    check_count(op, name, tensor, blocks_);
  } else if (index == places_.nested_absmax || index == places_.nested_codebook ||
             index == places_.nested_offset) {
    if (!codes_) {
      if (tensor.count > 0) reject(op, name, "be absent with float32 absmax", shape_text(tensor));
      return;
    }
    check_type(op, name, tensor, ort::kFloat);
    check_count(op, name, tensor,
                index == places_.nested_absmax     ? nested_blocks_
                : index == places_.nested_codebook ? kCodebookSize
                                                   : 1);
  }
}

}  // namespace feinwerk::onnx
