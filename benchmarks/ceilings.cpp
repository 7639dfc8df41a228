// Measures what this machine can do at most: memory traffic of any read:write mix, and arithmetic.
// Built by machine.py with the system compiler and called through ctypes; not part of the library.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
typedef uint64_t Lane __attribute__((vector_size(16)));  // NOLINT: the widest that all CPUs have
constexpr int64_t kLine = 64;
volatile uint64_t sink;

// Seconds from the moment all threads start until the last one ends.
double together(int threads, const std::function<void(int)>& work) {
  std::atomic<int> waiting{0};
  std::atomic<bool> go{false};
  auto body = [&](int t) {
    ++waiting;
    while (!go.load(std::memory_order_acquire)) {
    }
    work(t);
  };
  std::vector<std::thread> team;
  for (int t = 1; t < threads; ++t) team.emplace_back(body, t);
  while (waiting.load() < threads - 1) {
  }
  const auto start = Clock::now();
  go.store(true, std::memory_order_release);
  work(0);
  for (auto& member : team) member.join();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Buffer {
  char* data = nullptr;
  int64_t bytes = 0;
  // Touched pages: a page fault is not memory bandwidth.
  char* at_least(int64_t wanted) {
    if (wanted > bytes) {
      std::free(data);
      bytes = (wanted + 4095) / 4096 * 4096;
      data = static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(bytes)));
      if (data != nullptr) std::memset(data, 1, static_cast<size_t>(bytes));
    }
    return data;
  }
};
Buffer reads[64], writes[64];

inline void read_line(const char* p, Lane& a, Lane& b) {
  const Lane* q = reinterpret_cast<const Lane*>(p);
  a += q[0] ^ q[1];
  b += q[2] ^ q[3];
}

// Streaming stores where the CPU has them: they write without reading the line first.
inline void write_line(char* p, Lane value) {
  for (int i = 0; i < 4; ++i) {
#if defined(__x86_64__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, (__m128i)value);
#else
    reinterpret_cast<Lane*>(p)[i] = value;
#endif
  }
}

// Walks through both buffers once, `r` lines read for every `w` lines written; r and w share their
// buffers' lengths, so both end together. The reads go side by side in that many streams.
template <int64_t streams>
void stream(const char* in, int64_t read_lines, char* out, int64_t write_lines) {
  Lane a = {0, 0}, b = {0, 0};
  const int64_t part = read_lines / streams;
  const int64_t steps = part > 0 ? part : write_lines;
  int64_t written = 0;
  for (int64_t i = 0; i < steps; ++i) {
    if (part > 0) {
      for (int64_t s = 0; s < streams; ++s) read_line(in + (s * part + i) * kLine, a, b);
    }
    const int64_t due = write_lines * (i + 1) / steps;
    for (; written < due; ++written) write_line(out + written * kLine, a);
  }
  sink = a[0] + b[1];
}

#if defined(__x86_64__)
#define REPEAT12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

__attribute__((target("avx2,fma"))) void fma256(int64_t n) {
  const __m256 b = _mm256_set1_ps(0.5f), c = _mm256_set1_ps(1.0f);
#define DECLARE(i) __m256 a##i = c;
#define STEP(i)                       \
  a##i = _mm256_fmadd_ps(a##i, b, c); \
  asm volatile("" : "+x"(a##i));
  REPEAT12(DECLARE)
  for (int64_t i = 0; i < n; ++i) {
    REPEAT12(STEP)
  }
#undef DECLARE
#undef STEP
}

__attribute__((target("avx512f"))) void fma512(int64_t n) {
  const __m512 b = _mm512_set1_ps(0.5f), c = _mm512_set1_ps(1.0f);
#define DECLARE(i) __m512 a##i = c;
#define STEP(i)                       \
  a##i = _mm512_fmadd_ps(a##i, b, c); \
  asm volatile("" : "+v"(a##i));
  REPEAT12(DECLARE)
  for (int64_t i = 0; i < n; ++i) {
    REPEAT12(STEP)
  }
#undef DECLARE
#undef STEP
}

__attribute__((target("avx512f,avx512bf16"))) void bf16_dot(int64_t n) {
  const __m512bh b = (__m512bh)_mm512_set1_epi16(0x3f00), c = (__m512bh)_mm512_set1_epi16(0x3c00);
#define DECLARE(i) __m512 a##i = _mm512_setzero_ps();
#define STEP(i)                        \
  a##i = _mm512_dpbf16_ps(a##i, b, c); \
  asm volatile("" : "+v"(a##i));
  REPEAT12(DECLARE)
  for (int64_t i = 0; i < n; ++i) {
    REPEAT12(STEP)
  }
#undef DECLARE
#undef STEP
}

__attribute__((target("avx512f,avx512vnni"))) void int8_dot(int64_t n) {
  const __m512i b = _mm512_set1_epi8(3), c = _mm512_set1_epi8(-2);
#define DECLARE(i) __m512i a##i = b;
#define STEP(i)                           \
  a##i = _mm512_dpbusd_epi32(a##i, b, c); \
  asm volatile("" : "+v"(a##i));
  REPEAT12(DECLARE)
  for (int64_t i = 0; i < n; ++i) {
    REPEAT12(STEP)
  }
#undef DECLARE
#undef STEP
}

// Two tiles of A times two of B: the largest block whose four accumulators fit the eight tiles.
__attribute__((target("amx-tile,amx-bf16"))) void amx_bf16(int64_t n) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t colsb[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("" : "+m"(config));  // GCC 12 does not see that the next line reads all of it
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < n; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

bool amx_usable() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 22 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // Linux hands tiles out on request
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Unit {
  const char* name;
  void (*run)(int64_t);
  double operations;  // in one step
};

Unit unit(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("fma256") && __builtin_cpu_supports("fma")) return {name, fma256, 12 * 8 * 2};
  if (is("fma512") && __builtin_cpu_supports("avx512f")) return {name, fma512, 12 * 16 * 2};
  if (is("bf16_dot") && __builtin_cpu_supports("avx512bf16")) return {name, bf16_dot, 12 * 32 * 2};
  if (is("int8_dot") && __builtin_cpu_supports("avx512vnni")) return {name, int8_dot, 12 * 64 * 2};
  if (is("amx_bf16") && amx_usable()) return {name, amx_bf16, 4 * 16 * 16 * 32 * 2};
#endif
  return {name, nullptr, 0};
}

}  // namespace

extern "C" {

// Seconds to read and write that many bytes in all, spread over the threads; < 0 on failure.
double ceilings_stream(int threads, int64_t read_bytes, int64_t write_bytes) {
  if (threads < 1 || threads > 64) return -1;
  const int64_t in = read_bytes / threads, out = write_bytes / threads;
  for (int t = 0; t < threads; ++t) {
    if (in > 0 && reads[t].at_least(in) == nullptr) return -1;
    if (out > 0 && writes[t].at_least(out) == nullptr) return -1;
  }
  const auto pass = [&](void (*walk)(const char*, int64_t, char*, int64_t)) {
    return together(threads,
                    [&](int t) { walk(reads[t].data, in / kLine, writes[t].data, out / kLine); });
  };
  // One stream or four: which is faster differs between CPUs by a factor of two. Tried once.
  static void (*const faster)(const char*, int64_t, char*, int64_t) = [&] {
    double one = 1e9, four = 1e9;
    for (int i = 0; i < 5; ++i) {
      one = std::min(one, pass(stream<1>));
      four = std::min(four, pass(stream<4>));
    }
    return one < four ? stream<1> : stream<4>;
  }();
  return pass(faster);
}

// Operations in a second of `steps` steps on every thread; 0 when this CPU lacks the unit.
double ceilings_arithmetic(const char* name, int threads, int64_t steps) {
  const Unit chosen = unit(name);
  if (chosen.run == nullptr || threads < 1) return 0;
  const double seconds = together(threads, [&](int) { chosen.run(steps); });
  return chosen.operations * static_cast<double>(steps) * threads / seconds;
}

}  // extern "C"
