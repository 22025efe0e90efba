// Splitting rows or columns into register blocks.
#pragma once

#include <cstdint>

namespace maml::MAML_ISA {

/// Calls f.template operator()<size>(i) for a size of 1 to Most; not for 0.
template <int Most, class F>
inline void of_size(int64_t size, int64_t i, F f) {
  if (size == Most) {
    f.template operator()<Most>(i);
  } else if constexpr (Most > 1) {
    of_size<Most - 1>(size, i, f);
  }
}

/// Splits [first, last) into blocks of Most. If the rest at the end is longer than Most, it is two blocks of
/// nearly equal size, because a small block does not hide the latency of its multiply-adds. Calls
/// f.template operator()<size>(start of the block).
template <int Most, class F>
inline void in_like_blocks(int64_t first, int64_t last, F f) {
  for (; last - first >= 2 * Most; first += Most) f.template operator()<Most>(first);
  const int64_t left = last - first, half = left > Most ? (left + 1) / 2 : left;
  of_size<Most>(half, first, f);
  of_size<Most>(left - half, first + half, f);
}

}  // namespace maml::MAML_ISA
