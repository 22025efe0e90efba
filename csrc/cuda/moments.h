// Sums per channel over the rows of a matrix [m, c] that is too large for one block. There is one entry for
// each tile of rows, [tiles, values, c]; the kernel that needs the total merges the entries. Two kinds of
// entries:
//
//   Sums         two plain sums
//   Moments<1>   mean a, sum (a - mean a)^2
//   Moments<2>   mean a, mean b, sum (a - mean a)(b - mean b)
//
// Moments are merged by Chan's formula (Chan, Golub, LeVeque 1979) for any number of parts k of n_k rows:
// mean = sum n_k mean_k / m, and sum (a - mean)^2 = sum_k [M2_k + n_k (mean_k - mean)^2]. Unlike E[x^2] -
// mean^2, this does not cancel. Within a tile T suffices, because a thread sums a few rows only. Merging is
// done in double: it costs little, and an error in a merged mean affects every element. The order of every
// sum depends on m and c only.
//
// A tile has kTileRows rows if a kernel of this file computes it, and kStatisticsRows if a convolution does
// (statistics.h). Every block of the kernel that needs the total merges all entries of its channels. If there
// are more than kMostEntries, a kernel first folds each kFold of them into one.
#pragma once

#include <algorithm>

#include "cuda/channels.h"
#include "cuda/product/statistics.h"

namespace maml::cuda {

inline constexpr int kTileRows = kSmallTiles ? 16 : 128;
inline constexpr int kMostEntries = kSmallTiles ? 4 : 256;
inline constexpr int kFold = kSmallTiles ? 3 : 128;

/// `count` entries, each of `rows` of the m rows (the last entry may have fewer).
template <class T>
struct Partials {
  T* at;
  int count, rows;
  int64_t m;

  /// The number of rows in the entries [first, first + number).
  __device__ __forceinline__ double rows_of(int first, int number) const {
    const int64_t start = static_cast<int64_t>(first) * rows;
    return static_cast<double>(std::min(static_cast<int64_t>(number) * rows, m - start));
  }
};

struct Sums {
  static constexpr int kValues = 2;

  /// The entries [first, first + count) merged into one, for this thread's channel. All threads must call.
  template <class T>
  static __device__ __forceinline__ void merge(const ChannelThreads& threads, int64_t c, const Partials<T>& p,
                                               int first, int count, double (&merged)[kValues]) {
    channel_sums(threads, count, merged, [&](int k, double (&sum)[kValues]) {
      const T* entry = p.at + (first + k) * (kValues * c) + threads.channel;
      for (int q = 0; q < kValues; ++q) sum[q] += static_cast<double>(entry[q * c]);
    });
  }
};

template <int kMeans>
struct Moments {
  static constexpr int kValues = kMeans + 1;

  template <class T>
  static __device__ __forceinline__ void merge(const ChannelThreads& threads, int64_t c, const Partials<T>& p,
                                               int first, int count, double (&merged)[kValues]) {
    double mean[kMeans], product[1];
    channel_sums(threads, count, mean, [&](int k, double (&sum)[kMeans]) {
      const T* entry = p.at + (first + k) * (kValues * c) + threads.channel;
      const double rows = p.rows_of(first + k, 1);
      for (int q = 0; q < kMeans; ++q) sum[q] += rows * static_cast<double>(entry[q * c]);
    });
    const double all_rows = p.rows_of(first, count);
    for (int q = 0; q < kMeans; ++q) mean[q] /= all_rows;
    channel_sums(threads, count, product, [&](int k, double (&sum)[1]) {
      const T* entry = p.at + (first + k) * (kValues * c) + threads.channel;
      const double a = static_cast<double>(entry[0]) - mean[0];
      const double b = static_cast<double>(entry[(kMeans - 1) * c]) - mean[kMeans - 1];
      sum[0] += static_cast<double>(entry[kMeans * c]) + p.rows_of(first + k, 1) * a * b;
    });
    for (int q = 0; q < kMeans; ++q) merged[q] = mean[q];
    merged[kMeans] = product[0];
  }
};

/// The addresses of one task's entries.
template <class T>
__device__ __forceinline__ Partials<T> resolve(const Partials<T>& symbolic, const Memory& memory,
                                               int64_t task) {
  return {resolve(symbolic.at, memory, task), symbolic.count, symbolic.rows, symbolic.m};
}

/// Writes entry blockIdx.x [values, c] at this thread's channel.
template <class T, int kValues, class Value>
__device__ __forceinline__ void write_entry(const ChannelThreads& threads, int64_t c, T* entries,
                                            const Value (&values)[kValues]) {
  if (!threads.active || threads.row != 0) return;
  T* entry = entries + blockIdx.x * (kValues * c) + threads.channel;
  for (int q = 0; q < kValues; ++q) entry[q * c] = static_cast<T>(values[q]);
}

/// Block x merges the entries from x * kFold on into entry x.
template <class Kind, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    fold_kernel(int64_t c, Partials<T> symbolic, T* symbolic_out, Deferred deferred) {
  const Memory memory = deferred.ready();
  const ChannelThreads threads = channel_threads(c);
  const Partials<T> p = resolve(symbolic, memory, blockIdx.z);
  const int first = static_cast<int>(blockIdx.x) * kFold;
  double merged[Kind::kValues];
  Kind::merge(threads, c, p, first, std::min(int{kFold}, p.count - first), merged);
  write_entry(threads, c, resolve(symbolic_out, memory, blockIdx.z), merged);
}

/// Block x computes the moments of tile x of a, or of a and b.
template <int kMeans, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    moments_kernel(int64_t m, int64_t c, const T* symbolic_a, const T* symbolic_b, T* symbolic_out,
                   Deferred deferred) {
  const Memory memory = deferred.ready();
  const ChannelThreads threads = channel_threads(c);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int count = static_cast<int>(std::min<int64_t>(kTileRows, m - first));
  const T* a = resolve(symbolic_a, memory, blockIdx.z) + first * c + threads.channel;
  const T* b = kMeans == 1 ? a : resolve(symbolic_b, memory, blockIdx.z) + first * c + threads.channel;
  T values[kMeans + 1], mean[kMeans], product[1];
  channel_sums(threads, count, mean, [&](int i, T(&sum)[kMeans]) {
    sum[0] += a[i * c];
    if constexpr (kMeans == 2) sum[1] += b[i * c];
  });
  for (int q = 0; q < kMeans; ++q) values[q] = mean[q] /= static_cast<T>(count);
  channel_sums(threads, count, product,
               [&](int i, T(&sum)[1]) { sum[0] += (a[i * c] - mean[0]) * (b[i * c] - mean[kMeans - 1]); });
  values[kMeans] = product[0];
  write_entry(threads, c, resolve(symbolic_out, memory, blockIdx.z), values);
}

inline int64_t tiles_of(int64_t rows) { return blocks_for(rows, kTileRows); }

/// Scratch for the entries of `rows` rows, of at most three values each, and for the entries that they, or
/// those of a convolution, are folded into.
inline int64_t partials_scratch(int64_t rows, int64_t c) {
  const int64_t entries = blocks_for(rows, std::min(kTileRows, kStatisticsRows));
  return 3 * c * (tiles_of(rows) + blocks_for(entries, kFold));
}

/// The entries of `rows` rows each, folded if there are too many for every block to merge.
template <class Kind, class T>
Partials<T> few_partials(const Launcher& launch, int64_t m, int64_t c, int rows, T* entries, T* scratch) {
  const int64_t count = blocks_for(m, rows);
  const Partials<T> p{entries, static_cast<int>(count), rows, m};
  if (count <= kMostEntries) return p;
  const Partials<T> folded{scratch + 3 * c * tiles_of(m), static_cast<int>(blocks_for(count, kFold)),
                           rows * kFold, m};
  launch("fold partial sums", fold_kernel<Kind, T>, Grid{folded.count, blocks_for(c, channel_width(c))},
         kThreads, 0, c, p, folded.at, launch.memory);
  return folded;
}

/// The moments of a [m, c], or of a and b: from the statistics `taken` by a convolution, or computed here.
template <int kMeans, class T>
Partials<T> moments_of(const Launcher& launch, int64_t m, int64_t c, const T* a, const T* b, T* taken,
                       T* scratch) {
  if (taken) return few_partials<Moments<kMeans>>(launch, m, c, kStatisticsRows, taken, scratch);
  launch("moments", moments_kernel<kMeans, T>, Grid{tiles_of(m), blocks_for(c, channel_width(c))}, kThreads,
         0, m, c, a, b, scratch, launch.memory);
  return few_partials<Moments<kMeans>>(launch, m, c, kTileRows, scratch, scratch);
}

}  // namespace maml::cuda
