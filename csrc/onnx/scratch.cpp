// The process-wide pool of working memory.
#include "onnx/scratch.h"

#include <cstddef>
#include <mutex>
#include <new>

namespace feinwerk::onnx {

namespace {

struct Buffer {
  uint8_t* data;
  int64_t bytes;
};

struct Pool {
  std::mutex mutex;
  int64_t users = 0;
  int count = 0;
  Buffer kept[kKeptBuffers] = {};
};

// Never destroyed: sessions that a host forgot may end after this library's destructors have run.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

void release(Buffer buffer) { ::operator delete(buffer.data, std::align_val_t{kScratchAlignment}); }

// Takes the smallest buffer that is large enough, else the largest, for its owner to replace.
Buffer take(Pool& pool, int64_t bytes) {
  if (pool.count == 0) return {};
  int best = 0;
  for (int i = 1; i < pool.count; ++i) {
    const int64_t a = pool.kept[i].bytes, b = pool.kept[best].bytes;
    if (a >= bytes ? b < bytes || a < b : a > b) best = i;
  }
  const Buffer buffer = pool.kept[best];
  pool.kept[best] = pool.kept[--pool.count];
  return buffer;
}

}  // namespace

Scratch::Scratch(int64_t bytes) : data_(nullptr), bytes_(0) {
  if (bytes <= 0) return;
  Buffer buffer = {};
  {
    Pool& shared = pool();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    buffer = take(shared, bytes);
  }
  if (buffer.bytes < bytes) {
    release(buffer);
    buffer.data = static_cast<uint8_t*>(
        ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{kScratchAlignment}));
    buffer.bytes = bytes;
  }
  data_ = buffer.data;
  bytes_ = buffer.bytes;
}

Scratch::~Scratch() {
  if (!data_) return;
  {
    Pool& shared = pool();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    if (shared.users > 0 && shared.count < kKeptBuffers) {
      shared.kept[shared.count++] = {data_, bytes_};
      return;
    }
  }
  release({data_, bytes_});
}

ScratchUser::ScratchUser() {
  Pool& shared = pool();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  ++shared.users;
}

ScratchUser::~ScratchUser() {
  Pool& shared = pool();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  if (--shared.users > 0) return;
  while (shared.count > 0) release(shared.kept[--shared.count]);
}

}  // namespace feinwerk::onnx
