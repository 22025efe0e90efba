// Rows of a matrix [n, c], each shared by some threads of a warp, and reductions over a row in a fixed tree.
#pragma once

#include "cuda/run/launch.h"

namespace maml::cuda {

inline constexpr unsigned kWholeWarp = 0xffffffffu;
inline constexpr int kWarp = 32;

/// The number of threads that share a row of c columns: a power of two, at most a warp.
__device__ __forceinline__ int row_width(int64_t c) {
  int width = 1;
  while (width < kWarp && width * 8 < c) width *= 2;
  return width;
}

/// The sum, or the maximum, over the `width` threads of a row; all of them get it.
template <class T>
__device__ __forceinline__ T row_sum(T value, int width) {
  for (int k = width / 2; k > 0; k /= 2) value += __shfl_xor_sync(kWholeWarp, value, k);
  return value;
}
template <class T>
__device__ __forceinline__ T row_max(T value, int width) {
  for (int k = width / 2; k > 0; k /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, value, k);
    value = other > value ? other : value;
  }
  return value;
}

/// Calls f(row, lane, width, exists) for this thread's rows. All threads of a warp are called equally often,
/// so that f may shuffle; beyond the last row `exists` is false.
template <class F>
__device__ __forceinline__ void each_row(Team team, int64_t n, int64_t c, F f) {
  const int width = row_width(c);
  const int64_t first = team.first() / width, step = team.step() / width;
  const int64_t of_warp = team.first() / kWarp * (kWarp / width);  // the first row of this thread's warp
  const int64_t turns = of_warp < n ? (n - of_warp + step - 1) / step : 0;
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t row = first + turn * step;
    f(row, static_cast<int>(threadIdx.x) % width, width, row < n);
  }
}

}  // namespace maml::cuda
