// The normalisation of a convolution's output, for the columns of one tile, by the block that has computed
// the last of their rows (run/last_block.h): the forward passes of normalise.h without a launch of their own.
//
// Each thread merges the few statistics entries of its channels itself, so that there are no barriers and no
// shared memory. The rows are read again: most of them are sums of other blocks.
#pragma once

#include "cuda/conv2d.h"
#include "cuda/following.h"
#include "cuda/normalise_in_block.h"

namespace maml::cuda {

/// The convolution's product, and what follows it, unless that is null.
template <class T>
void convolve(const Launcher& launch, const char* name, const Layer& l, Terms<T> terms, const T* bias, T* out,
              StatisticsOf<T> statistics, T* scratch, const Following<T>* following);

/// The moments of all rows of this thread's channels: Moments<kMeans>::merge by one thread.
template <int kMeans, class T, int N>
__device__ __forceinline__ void moments_alone(const ChannelThreads& threads, int64_t c, const Partials<T>& p,
                                              Numbers<double, N> (&merged)[kMeans + 1]) {
  auto value = [&](int k, int q) {
    const T* entry = p.at + k * ((kMeans + 1) * c) + threads.channel;
    return converted<double>(load<N>(entry + q * c, threads.lanes));
  };
  const double all_rows = static_cast<double>(p.m);
  for (auto& m : merged) m = 0;
  for (int k = 0; k < p.count; ++k) {
    for (int q = 0; q < kMeans; ++q) merged[q] += value(k, q) * p.rows_of(k, 1);
  }
  for (int q = 0; q < kMeans; ++q) merged[q] = merged[q] / all_rows;
  for (int k = 0; k < p.count; ++k) {
    const auto a = value(k, 0) - merged[0], b = value(k, kMeans - 1) - merged[kMeans - 1];
    merged[kMeans] += value(k, kMeans) + a * b * p.rows_of(k, 1);
  }
}

/// The columns [first, first + kColumns), by a block of kBlock threads.
template <int kColumns, int kBlock, class T>
__device__ __forceinline__ void normalise_columns(const Following<T>& following, const Memory& memory,
                                                  int64_t task, int first) {
  constexpr int N = kVector<T>, kAtOnce = 4;
  static_assert(kColumns % N == 0 && kBlock % (kColumns / N) == 0);
  const Layer& l = following.layer;
  const Tensors<T>& symbolic = following.tensors;
  const Tensors<T> t = resolve(symbolic, memory, task);
  const int rows = static_cast<int>(l.n * l.in.h * l.in.w);
  const Partials<T> p{
      resolve(following.tangent ? symbolic.statistics_dot : symbolic.statistics, memory, task),
      (rows + kStatisticsRows - 1) / kStatisticsRows, kStatisticsRows, rows};
  const bool whole =
      aligned(t.x[0], t.x_dot[0], t.y, t.y_dot, t.w[0], t.w[1], t.w_dot[0], t.w_dot[1], t.saved, p.at);
  const View<T> view(block_team(),
                     channel_threads<N>(l.in.c, first, kColumns / N, kBlock / (kColumns / N), whole), l, t);
  if (following.tangent) {
    Numbers<double, N> moments[3];
    moments_alone<2>(view.threads, view.c, p, moments);
    normalise_forward_tangent<BlockActivation, kAtOnce>(l, view, moments);
  } else {
    Numbers<double, N> moments[2];
    moments_alone<1>(view.threads, view.c, p, moments);
    normalise_forward<BlockActivation, kAtOnce>(l, view, moments);
  }
}

}  // namespace maml::cuda
