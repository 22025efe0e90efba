// Where a product's output has many statistics entries (statistics_entries.h), the last block of those that
// wrote the entries of kFoldedRows rows folds them into the first, by Chan's formula (moments.h). This takes
// the place of a launch.
//
// Threads: each takes one column, and every (threads / columns)-th entry. Shared memory: a number for each
// thread. Numerics: in double; a thread's entries ascending, then the threads of a column in order.
#pragma once

#include "cuda/product/statistics_entries.h"
#include "cuda/run/last_block.h"

namespace maml::cuda {

/// The sum over the threads of this thread's column, for all of them. All threads must call.
template <class Tile>
__device__ __forceinline__ double column_total(double* shared, double sum) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  shared[thread] = sum;
  __syncthreads();
  sum = 0;
  for (int other = thread % Tile::kN; other < Tile::kThreads; other += Tile::kN) sum += shared[other];
  return sum;
}

/// Folds the `count` entries [kMeans + 1, n] of `rows` rows at this thread's column.
template <class Tile, int kMeans, class T>
__device__ __forceinline__ void fold_entries(T* entries, int count, int rows, int n, int column) {
  double* const shared = reinterpret_cast<double*>(dynamic_shared());
  const int first = static_cast<int>(threadIdx.x) / Tile::kN;
  constexpr int kStep = Tile::kThreads / Tile::kN;
  const bool exists = column < n;
  auto rows_of = [&](int entry) {
    const int left = rows - entry * kStatisticsRows;
    return static_cast<double>(left < kStatisticsRows ? left : kStatisticsRows);
  };
  auto value = [&](int entry, int q) {
    return static_cast<double>(entries[(entry * (kMeans + 1) + q) * n + column]);
  };
  double mean[kMeans] = {}, product = 0;
  if (exists) {
#pragma unroll 4
    for (int entry = first; entry < count; entry += kStep) {
      for (int q = 0; q < kMeans; ++q) mean[q] += value(entry, q) * rows_of(entry);
    }
  }
  for (int q = 0; q < kMeans; ++q) mean[q] = column_total<Tile>(shared, mean[q]) / rows;
  if (exists) {
#pragma unroll 4
    for (int entry = first; entry < count; entry += kStep) {
      const double a = value(entry, 0) - mean[0], b = value(entry, kMeans - 1) - mean[kMeans - 1];
      product += value(entry, kMeans) + a * b * rows_of(entry);
    }
  }
  product = column_total<Tile>(shared, product);
  if (!exists || first != 0) return;
  for (int q = 0; q < kMeans; ++q) entries[q * n + column] = static_cast<T>(mean[q]);
  entries[kMeans * n + column] = static_cast<T>(product);
}

/// Called by all threads of the block of the tile at (m0, n0), after its entries [2, n], or with `tangent`
/// [3, n], are written. `counters`: of this task.
template <class Tile, class T>
__device__ __forceinline__ void fold_statistics(int m0, int n0, int rows, int n, bool tangent, T* entries,
                                                unsigned* counters) {
  static_assert(kFoldedRows % Tile::kM == 0 && Tile::kN >= kStatisticsColumns);
  static_assert(Tile::kThreads % Tile::kN == 0);
  const StatisticsEntries of = statistics_entries(rows, n);
  if (of.step == 1) return;
  const int own = m0 / kFoldedRows, start = own * kFoldedRows;
  const int own_rows = rows - start < kFoldedRows ? rows - start : kFoldedRows;
  const unsigned blocks = static_cast<unsigned>((own_rows + Tile::kM - 1) / Tile::kM);
  if (!last_to_arrive(counters + kFirstFoldCounter + n0 / Tile::kN * of.count + own, blocks)) return;
  const int count = (own_rows + kStatisticsRows - 1) / kStatisticsRows;
  const int column = n0 + static_cast<int>(threadIdx.x) % Tile::kN;
  T* const first = entries + static_cast<int64_t>(own) * of.step * (tangent ? 3 : 2) * n;
  if (tangent) {
    fold_entries<Tile, 2>(first, count, own_rows, n, column);
  } else {
    fold_entries<Tile, 1>(first, count, own_rows, n, column);
  }
}

}  // namespace maml::cuda
