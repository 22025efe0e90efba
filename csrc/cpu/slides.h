// Where windows that slide over an axis are inside of it (layers/loops.h, Slide).
#pragma once

#include <algorithm>
#include <cstdint>

namespace maml::MAML_ISA {

/// ceil(a / b), b > 0
inline int64_t ceiling(int64_t a, int64_t b) {
  if (b == 1) return a;  // the usual stride and dilation: no division
  return a > 0 ? (a - 1) / b + 1 : -(-a / b);
}

struct Range {
  int64_t first, end;  // first >= end: empty
};

/// The i in [0, count) for which start + i step, step > 0, is in [0, size).
inline Range inside(int64_t start, int64_t step, int64_t size, int64_t count) {
  return {std::max<int64_t>(0, ceiling(-start, step)), std::min(count, ceiling(size - start, step))};
}

}  // namespace maml::MAML_ISA
