// Splits work over the caller's threads. Who runs which piece never changes a result.
#ifndef FEINWERK_CORE_PARALLEL_H_
#define FEINWERK_CORE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <vector>

#include "feinwerk/feinwerk.h"

namespace feinwerk {

inline int64_t thread_count(const feinwerk_executor* executor) {
  return executor && executor->parallel_for && executor->threads > 1 ? executor->threads : 1;
}

// Calls body(unit, task) for every unit in [0, units). At most one thread at a time runs a given
// task in [0, thread_count), so a task may own scratch. Tasks fetch units one by one: on a busy
// machine the faster thread takes more of them.
template <class Body>
void for_each_unit(const feinwerk_executor* executor, int64_t units, const Body& body) {
  const int64_t tasks = std::min(units, thread_count(executor));
  if (tasks <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) body(unit, int64_t{0});
    return;
  }
  struct Shared {
    const Body& body;
    int64_t units;
    std::atomic<int64_t> next;
  } shared{body, units, {0}};
  executor->parallel_for(
      executor->self, tasks,
      [](void* arg, int64_t task) {
        auto& state = *static_cast<Shared*>(arg);
        for (int64_t unit;
             (unit = state.next.fetch_add(1, std::memory_order_relaxed)) < state.units;)
          state.body(unit, task);
      },
      &shared);
}

// Calls body(begin, end) over [0, count) in pieces of `grain`; small counts stay on one thread.
template <class Body>
void for_each_range(const feinwerk_executor* executor, int64_t count, int64_t grain,
                    const Body& body) {
  const int64_t units = (count + grain - 1) / grain;
  for_each_unit(executor, units, [&](int64_t unit, int64_t) {
    body(unit * grain, std::min(count, (unit + 1) * grain));
  });
}

// The same over a list whose items have counts and grains of their own: their pieces are numbered
// through, so that small items run side by side and a large one on several threads.
class ItemRanges {
 public:
  void add(int64_t count, int64_t grain) {
    items_.push_back({count, grain, units_});
    units_ += (count + grain - 1) / grain;
  }

  // Calls body(item, begin, end).
  template <class Body>
  void for_each(const feinwerk_executor* executor, const Body& body) const {
    for_each_unit(executor, units_, [&](int64_t unit, int64_t) {
      const auto after = std::upper_bound(
          items_.begin(), items_.end(), unit,
          [](int64_t wanted, const Item& item) { return wanted < item.first_unit; });
      const Item& item = *(after - 1);
      const int64_t begin = (unit - item.first_unit) * item.grain;
      body(after - 1 - items_.begin(), begin, std::min(item.count, begin + item.grain));
    });
  }

 private:
  struct Item {
    int64_t count, grain, first_unit;
  };
  std::vector<Item> items_;
  int64_t units_ = 0;
};

}  // namespace feinwerk

#endif  // FEINWERK_CORE_PARALLEL_H_
