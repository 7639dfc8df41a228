// Working memory of the operators: a few buffers that all sessions of the process share.
//
// Fresh memory costs a page fault every 4 KiB, more than a product with one row of x takes, so a
// run borrows a buffer and gives it back. A model of many layers runs one node after the other and
// so holds one buffer, as large as the largest need so far; runs at the same time hold one each.
// At most kKept are kept, and none once the last kernel is gone.
#ifndef FEINWERK_ONNX_SCRATCH_H_
#define FEINWERK_ONNX_SCRATCH_H_

#include <cstdint>

namespace feinwerk::onnx {

constexpr int kKeptBuffers = 8;
constexpr int64_t kScratchAlignment = 64;

// A buffer for the time of one run; bytes may be 0.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_;
  int64_t bytes_;
};

// What every kernel holds for its lifetime: the last one to go takes the kept buffers along.
class ScratchUser {
 public:
  ScratchUser();
  ~ScratchUser();
  ScratchUser(const ScratchUser&) = delete;
  ScratchUser& operator=(const ScratchUser&) = delete;
};

}  // namespace feinwerk::onnx

#endif  // FEINWERK_ONNX_SCRATCH_H_
