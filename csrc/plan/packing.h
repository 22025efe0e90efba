// The layout of all parameters of a plan in one vector.
#pragma once

#include <algorithm>

#include "plan/graph.h"

namespace maml {

/// The size rounded up to whole cache lines of float, so that every tensor in a workspace starts on a cache
/// line.
inline int64_t whole_lines(int64_t elements) { return (elements + 15) / 16 * 16; }

/// Where each parameter starts in a packed parameter vector. Their order is adapted, outer, outer with slots,
/// frozen. So the inner loop changes the first `adapted` elements, the first `trainable` elements have a
/// gradient, and a pass reads one slot of each parameter from `stepwise` on. Every parameter starts on a
/// cache line; the gaps hold no values. The slots of a parameter follow each other.
struct Packing {
  std::vector<int64_t> at;
  int64_t adapted = 0, stepwise = 0, trainable = 0, total = 0;
  explicit Packing(const std::vector<Parameter>& parameters);
  /// Where the slot of parameter p for an inner step stands.
  int64_t at_step(int p, int step) const {
    return at[p] + std::min<int64_t>(step, slots_[p] - 1) * slot_size_[p];
  }

 private:
  std::vector<int64_t> slots_, slot_size_;
};

}  // namespace maml
