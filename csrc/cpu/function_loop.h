// A loop that evaluates a function at each element of an array, in vectors wherever the function has a form
// without branches (vector_math.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/vector_math.h"
#include "layers/functions.h"

namespace maml::MAML_ISA {

/// Calls body(N(), i) for every i in [first, last): N is the type of number in which F is evaluated at x[i].
/// The body may overwrite x[i]. An element has the same bits whatever its neighbours are.
/// flatten: a loop with a call is not vectorised, and the compiler does not inline a long function by itself.
template <Function F, class T, class Body>
[[gnu::flatten]] inline void each_element(const T* x, int64_t first, int64_t last, Body body) {
  if constexpr (std::is_same_v<T, float> && (F == Function::sin || F == Function::cos)) {
    const auto in_range = [x](int64_t i) { return std::abs(x[i]) <= kMostAngle; };
    constexpr int64_t kBlock = 1024;
    for (int64_t start = first; start < last; start += kBlock) {
      const int64_t end = std::min(last, start + kBlock);
      bool all = true;
#pragma omp simd reduction(& : all)
      for (int64_t i = start; i < end; ++i) all &= in_range(i);
      if (all) {
#pragma omp simd
        for (int64_t i = start; i < end; ++i) body(InLoop<T>(), i);
      } else {
        for (int64_t i = start; i < end; ++i) in_range(i) ? body(InLoop<T>(), i) : body(T(), i);
      }
    }
  } else {
#pragma omp simd
    for (int64_t i = first; i < last; ++i) body(InLoop<T>(), i);
  }
}

}  // namespace maml::MAML_ISA
