// An NF4 weight as the inputs and attributes of a node: packed codes, absmax, and the three nested
// tensors of double quantization.
#ifndef FEINWERK_ONNX_NF4_INPUTS_H_
#define FEINWERK_ONNX_NF4_INPUTS_H_

#include "onnx/host.h"

namespace feinwerk::onnx {

// Where a node has them; the nested ones are absent, or empty, with float32 absmax.
struct Nf4Places {
  size_t packed, absmax, nested_absmax, nested_codebook, nested_offset;
};

class Nf4Inputs {
 public:
  // Reads N, K and block_size. `codes`: absmax is uint8.
  Nf4Inputs(const Node& node, const Nf4Places& places, bool codes);
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  // Checks input `index` if it is one of the weight's: once for a constant, else at every run.
  void check(const char* op, size_t index, const char* name, const Tensor& tensor) const;
  // The weight of one run; tensors[index] is a checked input.
  template <class Tensors>
  feinwerk_nf4_weight weight(const Tensors& tensors) const {
    feinwerk_nf4_weight weight = {};
    weight.rows = rows_;
    weight.cols = cols_;
    weight.blocksize = blocksize_;
    weight.packed = tensors[places_.packed].bytes();
    weight.packed_bytes = ceil_div(rows_ * cols_, 2);
    weight.absmax_count = blocks_;
    if (codes_) {
      weight.absmax_codes = tensors[places_.absmax].bytes();
      weight.nested_absmax = tensors[places_.nested_absmax].floats();
      weight.nested_absmax_count = nested_blocks_;
      weight.nested_codebook = tensors[places_.nested_codebook].floats();
      weight.nested_offset = tensors[places_.nested_offset].floats();
    } else {
      weight.absmax = tensors[places_.absmax].floats();
    }
    return weight;
  }

 private:
  Nf4Places places_;
  bool codes_;
  int64_t rows_, cols_, blocksize_, blocks_, nested_blocks_;
};

}  // namespace feinwerk::onnx

#endif  // FEINWERK_ONNX_NF4_INPUTS_H_
