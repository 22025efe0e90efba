// A thread's access to the rows [rows, c] of a task's tensors, in its vector of channels (channels.h).
#pragma once

#include "cuda/channels.h"

namespace maml::cuda {

template <class T>
struct ChannelView {
  static constexpr int N = kVector<T>;
  using Values = Numbers<T, N>;

  Team team;
  ChannelThreads threads;
  int64_t c;
  int channel;  // the first of N

  /// `whole_rows`: every tensor that the kernel accesses starts at an aligned address.
  __device__ __forceinline__ ChannelView(Team team, int group, int64_t c, bool whole_rows)
      : ChannelView(team, channel_threads<N>(c, group, whole_rows), c) {}
  __device__ __forceinline__ ChannelView(Team team, const ChannelThreads& threads, int64_t c)
      : team(team), threads(threads), c(c), channel(threads.channel) {}

  __device__ __forceinline__ int64_t element(int row) const { return row * c + channel; }

  template <class E>
  __device__ __forceinline__ Numbers<E, N> at(const E* p, int64_t element) const {
    return load<N>(p + element, threads.lanes);
  }
  /// The values of a row; zero where there is no tensor.
  __device__ __forceinline__ Values row(const T* p, int row) const {
    return p ? at(p, element(row)) : Values(T(0));
  }
  /// The values in a vector [c] that may be absent.
  __device__ __forceinline__ Values of_channels(const T* p, T absent) const {
    return p ? at(p, channel) : Values(absent);
  }
  /// For each channel the value of the row first + places[channel].
  __device__ __forceinline__ Values chosen(const T* p, int first, const Numbers<int32_t, N>& places) const {
    Values values;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values.at[i] = p[element(first + places.at[i]) + std::min(i, threads.lanes.count - 1)];
    }
    return values;
  }
  template <class E>
  __device__ __forceinline__ void put(E* p, int64_t element, const Numbers<E, N>& values) const {
    store(p + element, values, threads.lanes);
  }

  /// Whether this thread writes the values that are common to its channels: one thread of block 0 does.
  __device__ __forceinline__ bool writes() const {
    return team.block == 0 && threads.row == 0 && threads.active;
  }
  /// The gradient of a parameter [c], unless it is not wanted.
  __device__ __forceinline__ void give(T* to, const Values& values, bool add) const {
    if (to) put(to, channel, add ? at(to, channel) + values : values);
  }
};

/// Blocks (x, y) for rows of vectors: x covers the rows, up to 16 of them for each thread as long as that
/// leaves 64 blocks; y covers the channels.
template <class T>
Grid row_grid(int64_t rows, int64_t c) {
  constexpr int N = kVector<T>;
  const int64_t at_once = kThreads / channel_width<N>(c);
  const int64_t rows_per_thread = std::clamp<int64_t>(rows / (64 * at_once), 1, 16);
  return {blocks_for(rows, at_once * rows_per_thread), channel_groups<N>(c)};
}

}  // namespace maml::cuda
