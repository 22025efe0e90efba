// The memory of a test's launches.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/run/launch.h"

namespace maml::cuda {

inline constexpr int kMostTestTasks = 64;

/// The counters that every test uses: a launch leaves them at zero.
inline std::vector<unsigned>& test_counters() {
  static std::vector<unsigned> counters(static_cast<size_t>(kMostTestTasks * kStreams * kCounters));
  return counters;
}
inline bool counters_are_zero() {
  return std::all_of(test_counters().begin(), test_counters().end(), [](unsigned c) { return c == 0; });
}

/// The memory of a call with this table, as a kernel takes it.
inline Deferred memory_of(const Table& table) {
  auto region = [&](Region r) { return table.regions[static_cast<int>(r)]; };
  return Deferred(Memory{&table, region(Region::shared).start, region(Region::task), test_counters().data()});
}

}  // namespace maml::cuda
