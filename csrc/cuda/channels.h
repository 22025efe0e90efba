// How the threads of a block cover a matrix [rows, channels], and sums over its rows. `width` threads cover
// consecutive channels of one row, so that memory accesses are coalesced; the others cover further rows:
//
//   thread = row * width + lane,   channel = blockIdx.y * width + lane,   width = 2^k, at most a warp
//
// A thread works on one channel only, so that the channel's values stay in registers.
#pragma once

#include "cuda/run/launch.h"

namespace maml::cuda {

inline constexpr int kThreads = kSmallTiles ? 32 : 256;  // the block size of these kernels
inline constexpr int kMostWidth = kSmallTiles ? 8 : 32;
// Resident blocks per multiprocessor: 64 registers a thread, or 128 for float64.
template <class T>
inline constexpr int kResident = sizeof(T) == 4 ? 4 : 2;

/// The number of threads that cover consecutive channels.
__host__ __device__ constexpr int channel_width(int64_t channels) {
  int width = 1;
  while (width < channels && width < kMostWidth) width *= 2;
  return width;
}

/// How the block covers the matrix, and this thread's part: its channel and its first row.
struct ChannelThreads {
  int width, rows;  // the block covers rows x width elements at a time
  int row, channel;
  bool active;  // the channel exists; other threads only take part in the barriers
};

__device__ __forceinline__ ChannelThreads channel_threads(int64_t channels) {
  ChannelThreads threads;
  threads.width = channel_width(channels);
  threads.rows = kThreads / threads.width;
  threads.row = static_cast<int>(threadIdx.x) / threads.width;
  threads.channel =
      static_cast<int>(blockIdx.y) * threads.width + static_cast<int>(threadIdx.x) % threads.width;
  threads.active = threads.channel < channels;
  return threads;
}

/// Blocks (x, y): x covers `rows`, with at least `rows_per_thread` for each thread; y covers the channels.
inline Grid channel_grid(int64_t rows, int64_t channels, int64_t rows_per_thread) {
  const int width = channel_width(channels);
  return {blocks_for(rows, kThreads / width * rows_per_thread), blocks_for(channels, width)};
}

/// Sums over rows, per channel: term(i, sum) is called for every i in [0, count) and adds its terms to
/// sum[q]. All threads of a channel return the totals. Each thread sums every `rows`-th i in ascending order;
/// then a tree in shared memory sums over the threads. All threads must call; there are barriers before and
/// after every use of the shared memory.
template <int Q, class Sum, class Term>
__device__ __forceinline__ void channel_sums(const ChannelThreads& threads, int count, Sum (&sum)[Q],
                                             Term term) {
  __shared__ Sum shared[Q][kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  for (int q = 0; q < Q; ++q) sum[q] = 0;
  if (threads.active) {
    for (int i = threads.row; i < count; i += threads.rows) term(i, sum);
  }
  for (int q = 0; q < Q; ++q) shared[q][thread] = sum[q];
  __syncthreads();
  for (int half = kThreads / 2; half >= threads.width; half /= 2) {
    if (thread < half) {
      for (int q = 0; q < Q; ++q) shared[q][thread] += shared[q][thread + half];
    }
    __syncthreads();
  }
  for (int q = 0; q < Q; ++q) sum[q] = shared[q][thread % threads.width];
  __syncthreads();
}

}  // namespace maml::cuda
