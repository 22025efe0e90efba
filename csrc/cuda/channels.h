// How the threads of a block cover a matrix [rows, channels], and sums over its rows. A thread works on N
// consecutive channels, so that their values stay in registers. `width` threads cover consecutive channels of
// one row, so that memory accesses are coalesced; the others cover further rows:
//
//   thread = row * width + lane,   channel = (group * width + lane) * N,   width = 2^k, at most a warp
//
// With N = kVector<T> a thread accesses 16 bytes at a time (vectors.h).
#pragma once

#include "cuda/run/launch.h"
#include "cuda/vectors.h"

namespace maml::cuda {

inline constexpr int kThreads = kSmallTiles ? 32 : 256;  // the block size of these kernels
inline constexpr int kMostWidth = kSmallTiles ? 8 : 32;
// Resident blocks per multiprocessor: 64 registers a thread, or 128 for float64.
template <class T>
inline constexpr int kResident = sizeof(T) == 4 ? 4 : 2;

// The same of kernels whose threads work on vectors of channels: 128 registers hold what a pass knows of four
// channels, and the functions of float64 need more. With 512 threads, each with two to four loads of 16
// bytes, 16 to 32 KB are in flight (vectors.h).
template <class T>
inline constexpr int kResidentVectors = sizeof(T) == 4 ? 2 : 1;

/// The number of threads that cover consecutive channels.
template <int N = 1>
__host__ __device__ constexpr int channel_width(int64_t channels) {
  int width = 1;
  while (width * N < channels && width < kMostWidth) width *= 2;
  return width;
}

/// The number of groups of channels; a block works on one.
template <int N = 1>
__host__ __device__ constexpr int64_t channel_groups(int64_t channels) {
  const int64_t covered = channel_width<N>(channels) * N;
  return (channels + covered - 1) / covered;
}

/// How the block covers the matrix, and this thread's part: its first channel and its first row.
struct ChannelThreads {
  int width, rows;  // the block covers rows x width vectors at a time
  int row, channel;
  bool active;  // the channel exists; other threads have channel 0 and only take part in the barriers
  Lanes lanes;  // which of the N channels exist
};

/// This thread's part of the channels from `first` on, in a block of which `width` threads cover a row.
/// `whole_rows`: every row starts at an aligned address.
template <int N>
__device__ __forceinline__ ChannelThreads channel_threads(int64_t channels, int first, int width, int rows,
                                                          bool whole_rows) {
  ChannelThreads threads;
  threads.width = width;
  threads.rows = rows;
  threads.row = static_cast<int>(threadIdx.x) / threads.width;
  const int lane = static_cast<int>(threadIdx.x) % threads.width;
  threads.channel = first + lane * N;
  threads.active = threads.channel < channels;
  if (!threads.active) threads.channel = 0;
  const int64_t left = channels - threads.channel;
  threads.lanes = {left < N ? static_cast<int>(left) : N, whole_rows && channels % N == 0};
  return threads;
}

/// This thread's part of a group of channels.
template <int N>
__device__ __forceinline__ ChannelThreads channel_threads(int64_t channels, int group, bool whole_rows) {
  const int width = channel_width<N>(channels);
  return channel_threads<N>(channels, group * width * N, width, kThreads / width, whole_rows);
}

__device__ __forceinline__ int channel_group() { return static_cast<int>(blockIdx.y); }

/// One channel a thread, in the group blockIdx.y.
__device__ __forceinline__ ChannelThreads channel_threads(int64_t channels) {
  return channel_threads<1>(channels, channel_group(), false);
}

/// Blocks (x, y) for one channel a thread: x covers `rows`, with at least `rows_per_thread` for each thread;
/// y covers the channels.
inline Grid channel_grid(int64_t rows, int64_t channels, int64_t rows_per_thread) {
  return {blocks_for(rows, kThreads / channel_width(channels) * rows_per_thread), channel_groups(channels)};
}

/// Shared memory for the sums of all calls with this number and type of sums, one for each thread.
template <int Q, class Sum>
__device__ __forceinline__ auto shared_sums() -> Sum (&)[Q][kThreads] {
  __shared__ Sum shared[Q][kThreads];
  return shared;
}

/// Sums over rows, per channel: term(i, sum) is called for every i in [0, count) and adds its terms to
/// sum[q], a number or a vector. All threads of a channel return the totals. Each thread sums every `rows`-th
/// i in ascending order; then a tree in shared memory sums over the threads. All threads must call; there are
/// barriers before and after every use of the shared memory.
template <int Q, class Sum, class Term>
__device__ __forceinline__ void channel_sums(const ChannelThreads& threads, int count, Sum (&sum)[Q],
                                             Term term) {
  Sum(&shared)[Q][kThreads] = shared_sums<Q, Sum>();
  const int thread = static_cast<int>(threadIdx.x);
  for (int q = 0; q < Q; ++q) sum[q] = 0;
  if (threads.active) {
#pragma unroll 1
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
