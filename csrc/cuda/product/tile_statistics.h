// Statistics of a product's output, computed while it is still in registers, for the normalisation that
// follows.
// There is one entry for each kStatisticsRows rows of C. The warp that holds these rows computes it in two
// passes over its registers:
//
//   entry [2, n]   mean of c, sum of (c - mean)^2
//   entry [3, n]   means of y and c, sum of (y - mean)(c - mean), with the primal pass's y read from memory
//
// Order of sums: a thread's rows ascending, then a tree over the lanes.
#pragma once

#include "cuda/product/product.h"

namespace maml::cuda {

/// The sum over the lanes that hold the same column.
template <class Accumulators, class T>
__device__ __forceinline__ T over_rows(T sum) {
#pragma unroll
  for (int lanes = Accumulators::kRowLane; lanes <= 2 * Accumulators::kRowLane; lanes *= 2)
    sum += __shfl_xor_sync(~0u, sum, lanes);
  return sum;
}

/// Called by the warps that own the sums of C [rows, n], by all lanes together.
template <class Product, class T>
__device__ __forceinline__ void take_statistics(const typename Product::Position& at,
                                                typename Product::Accumulators& sums, int rows, int n,
                                                const T* primal, T* entries) {
  using Accumulators = typename Product::Accumulators;
  constexpr int kRows = Accumulators::kGroupRows;
  static_assert(Accumulators::kRows % kRows == 0);
#pragma unroll
  for (int group = 0; group < Accumulators::kRows / kRows; ++group) {
    const int first = at.m + group * kStatisticsRows;
    if (first >= rows) break;
    const T count = static_cast<T>(rows - first < kStatisticsRows ? rows - first : kStatisticsRows);
    T* const entry = entries + static_cast<int64_t>(first / kStatisticsRows) * (primal ? 3 : 2) * n;
#pragma unroll
    for (int c = 0; c < Accumulators::kColumns; ++c) {
      const int column = at.column(c);
      T y[kRows] = {};
      T sum_y = 0, sum = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int r = group * kRows + i, row = at.row(r);
        if (row >= rows) continue;
        if (primal && column < n) y[i] = primal[static_cast<int64_t>(row) * n + column];
        sum_y += y[i];
        sum += sums.at(r, c);
      }
      const T mean = over_rows<Accumulators>(sum) / count;
      const T mean_y = primal ? over_rows<Accumulators>(sum_y) / count : T(0);
      T products = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int r = group * kRows + i;
        if (at.row(r) >= rows) continue;
        const T d = sums.at(r, c) - mean;
        products += (primal ? y[i] - mean_y : d) * d;
      }
      products = over_rows<Accumulators>(products);
      if ((at.lane & 3 * Accumulators::kRowLane) == 0 && column < n) {
        T* to = entry + column;
        if (primal) *to = mean_y, to += n;
        *to = mean, to += n;
        *to = products;
      }
    }
  }
}

}  // namespace maml::cuda
