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
// A tile has kTileRows rows if a kernel of this file computes it; a convolution has tiles of its own
// (statistics_entries.h). Every block of the kernel that needs the total merges all entries of its channels.
// If there are more than kMostEntries, a kernel first folds each kFold of them into one.
#pragma once

#include <algorithm>

#include "cuda/channels.h"
#include "cuda/product/statistics_entries.h"

namespace maml::cuda {

inline constexpr int kTileRows = kSmallTiles ? 16 : 128;
inline constexpr int kFold = kSmallTiles ? 3 : 128;

/// `count` entries, each of `rows` of the m rows (the last entry may have fewer). Each begins where `step`
/// entries after the one before it would.
template <class T>
struct Partials {
  T* at;
  int count, rows;
  int64_t m;
  int step = 1;

  /// Entry k, which has `size` elements.
  __device__ __forceinline__ T* entry(int k, int64_t size) const { return at + k * step * size; }

  /// The number of rows in the entries [first, first + number).
  __device__ __forceinline__ double rows_of(int first, int number) const {
    const int64_t start = static_cast<int64_t>(first) * rows;
    return static_cast<double>(std::min(static_cast<int64_t>(number) * rows, m - start));
  }
};

struct Sums {
  static constexpr int kValues = 2;

  /// The entries [first, first + count) merged into one, for this thread's N channels. All threads must call.
  template <class T, int N>
  static __device__ __forceinline__ void merge(const ChannelThreads& threads, int64_t c, const Partials<T>& p,
                                               int first, int count, Numbers<double, N> (&merged)[kValues]) {
    channel_sums(threads, count, merged, [&](int k, Numbers<double, N>(&sum)[kValues]) {
      const T* entry = p.entry(first + k, kValues * c) + threads.channel;
      for (int q = 0; q < kValues; ++q) sum[q] += converted<double>(load<N>(entry + q * c, threads.lanes));
    });
  }
};

template <int kMeans>
struct Moments {
  static constexpr int kValues = kMeans + 1;

  template <class T, int N>
  static __device__ __forceinline__ void merge(const ChannelThreads& threads, int64_t c, const Partials<T>& p,
                                               int first, int count, Numbers<double, N> (&merged)[kValues]) {
    using Values = Numbers<double, N>;
    Values mean[kMeans], product[1];
    auto value = [&](int k, int q) {
      const T* entry = p.entry(first + k, kValues * c) + threads.channel;
      return converted<double>(load<N>(entry + q * c, threads.lanes));
    };
    channel_sums(threads, count, mean, [&](int k, Values(&sum)[kMeans]) {
      const double rows = p.rows_of(first + k, 1);
      for (int q = 0; q < kMeans; ++q) sum[q] += value(k, q) * rows;
    });
    const double all_rows = p.rows_of(first, count);
    for (int q = 0; q < kMeans; ++q) mean[q] = mean[q] / all_rows;
    channel_sums(threads, count, product, [&](int k, Values(&sum)[1]) {
      const Values a = value(k, 0) - mean[0], b = value(k, kMeans - 1) - mean[kMeans - 1];
      sum[0] += value(k, kMeans) + a * b * p.rows_of(first + k, 1);
    });
    for (int q = 0; q < kMeans; ++q) merged[q] = mean[q];
    merged[kMeans] = product[0];
  }
};

/// The addresses of one task's entries.
template <class T>
__device__ __forceinline__ Partials<T> resolve(const Partials<T>& symbolic, const Memory& memory,
                                               int64_t task) {
  return {resolve(symbolic.at, memory, task), symbolic.count, symbolic.rows, symbolic.m, symbolic.step};
}

/// How many of n samples are no padding, which stands behind the others: those with a share of the loss.
/// `shares` [n], as in Walk; null: all.
template <class T>
__device__ __forceinline__ int counted_samples(const T* shares, int n) {
  if (!shares) return n;
  int counted = 0, padding = n;  // the first of the padding is in [counted, padding]
  while (counted < padding) {
    const int middle = (counted + padding) / 2;
    if (shares[middle] > T(0)) {
      counted = middle + 1;
    } else {
      padding = middle;
    }
  }
  return counted;
}

/// Writes entry `tile` [values, c] at this thread's channels.
template <class T, int kValues, class V, int N>
__device__ __forceinline__ void write_entry(const ChannelThreads& threads, int tile, int64_t c, T* entries,
                                            const Numbers<V, N> (&values)[kValues]) {
  if (!threads.active || threads.row != 0) return;
  T* entry = entries + tile * (kValues * c) + threads.channel;
  for (int q = 0; q < kValues; ++q) store(entry + q * c, converted<T>(values[q]), threads.lanes);
}

/// Merges kFold entries, from entry team.block * kFold on, into one of `out`.
template <class Kind, class T>
__device__ __forceinline__ void fold(Team team, int group, int64_t c, const Partials<T>& p, T* out) {
  constexpr int N = kVector<T>;
  const ChannelThreads threads = channel_threads<N>(c, group, aligned(p.at, out));
  const int first = team.block * kFold;
  Numbers<double, N> merged[Kind::kValues];
  Kind::merge(threads, c, p, first, std::min(int{kFold}, p.count - first), merged);
  write_entry(threads, team.block, c, out, merged);
}

template <class Kind, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    fold_kernel(int64_t c, Partials<T> symbolic, T* symbolic_out, Deferred deferred) {
  const Memory memory = deferred.ready();
  fold<Kind>(grid_team(), static_cast<int>(blockIdx.y), c, resolve(symbolic, memory, blockIdx.z),
             resolve(symbolic_out, memory, blockIdx.z));
}

/// The moments of tile team.block of a, or of a and b. `b` is not read where kMeans is 1. A tile beyond the m
/// rows has an entry that is not read.
template <int kMeans, class T>
__device__ __forceinline__ void tile_moments(Team team, int group, int64_t m, int64_t c, const T* a,
                                             const T* b, T* out) {
  constexpr int N = kVector<T>;
  using Values = Numbers<T, N>;
  const ChannelThreads threads = channel_threads<N>(c, group, aligned(a, b, out));
  const int64_t first = static_cast<int64_t>(team.block) * kTileRows;
  const int count = static_cast<int>(std::min<int64_t>(kTileRows, m - first));
  auto value = [&](const T* x, int i) {
    return load<N>(x + (first + i) * c + threads.channel, threads.lanes);
  };
  Values values[kMeans + 1], mean[kMeans], product[1];
  channel_sums(threads, count, mean, [&](int i, Values(&sum)[kMeans]) {
    sum[0] += value(a, i);
    if constexpr (kMeans == 2) sum[1] += value(b, i);
  });
  for (int q = 0; q < kMeans; ++q) values[q] = mean[q] = mean[q] / static_cast<T>(count);
  channel_sums(threads, count, product, [&](int i, Values(&sum)[1]) {
    const Values from_mean = value(a, i) - mean[0];
    sum[0] += from_mean * (kMeans == 1 ? from_mean : value(b, i) - mean[kMeans - 1]);
  });
  values[kMeans] = product[0];
  write_entry(threads, team.block, c, out, values);
}

template <int kMeans, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    moments_kernel(int64_t m, int64_t c, const T* a, const T* b, T* out, const T* shares, int samples,
                   Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  if (shares) m = m / samples * counted_samples(resolve(shares, memory, task), samples);
  tile_moments<kMeans>(grid_team(), static_cast<int>(blockIdx.y), m, c, resolve(a, memory, task),
                       resolve(b, memory, task), resolve(out, memory, task));
}

inline int64_t tiles_of(int64_t rows) { return blocks_for(rows, kTileRows); }

/// Scratch for the entries of `rows` rows, of at most three values each, and for the entries that they, or
/// those of a convolution, are folded into.
inline int64_t partials_scratch(int64_t rows, int64_t c) {
  const int64_t entries = blocks_for(rows, std::min(kTileRows, kStatisticsRows));
  return 3 * c * (tiles_of(rows) + blocks_for(entries, kFold));
}

/// The entries, folded into those at `to` if there are too many for every block to merge.
template <class Kind, class T>
Partials<T> few_partials(const Launcher& launch, int64_t c, const Partials<T>& p, T* to) {
  if (p.count <= kMostEntries) return p;
  const Partials<T> folded{to, static_cast<int>(blocks_for(p.count, kFold)), p.rows * kFold, p.m};
  launch("fold partial sums", fold_kernel<Kind, T>, Grid{folded.count, channel_groups<kVector<T>>(c)},
         kThreads, 0, c, p, folded.at, launch.memory);
  return folded;
}

/// The same of the tiles of m rows, whose entries are in `scratch`.
template <class Kind, class T>
Partials<T> few_partials(const Launcher& launch, int64_t m, int64_t c, T* scratch) {
  const Partials<T> p{scratch, static_cast<int>(tiles_of(m)), kTileRows, m};
  return few_partials<Kind>(launch, c, p, scratch + 3 * c * p.count);
}

/// The statistics of [m, c] that a convolution has taken.
template <class T>
__host__ __device__ Partials<T> taken_partials(int64_t m, int64_t c, T* taken) {
  const StatisticsEntries of = statistics_entries(m, c);
  return {taken, of.count, of.rows, m, of.step};
}

/// The moments of a [m, c], or of a and b: from the statistics `taken` by a convolution, or computed here.
/// `shares` of the samples, as in Walk: then those of each task's rows that are no padding, in entries that
/// are not folded, as their number is the task's.
template <int kMeans, class T>
Partials<T> moments_of(const Launcher& launch, int64_t m, int64_t c, const T* a, const T* b, T* taken,
                       T* scratch, const T* shares, int64_t samples) {
  if (taken) return few_partials<Moments<kMeans>>(launch, c, taken_partials(m, c, taken), scratch);
  launch("moments", moments_kernel<kMeans, T>, Grid{tiles_of(m), channel_groups<kVector<T>>(c)}, kThreads, 0,
         m, c, a, b, scratch, shares, static_cast<int>(samples), launch.memory);
  if (shares) return {scratch, static_cast<int>(tiles_of(m)), kTileRows, m};
  return few_partials<Moments<kMeans>>(launch, m, c, scratch);
}

}  // namespace maml::cuda
