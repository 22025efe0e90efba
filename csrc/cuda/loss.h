// The losses of one task, means as in torch, over N samples; here n of them, with z their prediction [n, c]:
//   cross_entropy  p = softmax z; L = -sum log p[label] / N;  grad_z = (p - onehot) / N;
//                  grad_z_dot = p (z_dot - <p, z_dot>) / N
//   mse            L = sum (z - t)^2 / (N c);  grad_z = 2 (z - t) / (N c);  grad_z_dot = 2 z_dot / (N c)
// `saved` keeps p.
//
// Cross entropy: `width` threads of a warp share a row, one to eight columns each while they can (the five
// classes of five-way tasks fall to one thread), and shuffle its maximum and sums. Every thread of a warp
// walks the same number of rows, so that the shuffles have all of them. mse: an element a thread.
//
// The value is summed in double: each thread over its rows, in ascending order, then shuffles within a warp,
// then thread 0 over the warps; the order depends on n, c and the size of the block. One block does this, for
// it is one sum of some hundred rows. A tangent has no such sum, and any number of blocks may share it.
//
// Barriers: loss_value has one inside, between the warps' sums and thread 0; the caller's own behind every
// device function keeps two calls apart. All threads of a block call; a block is a whole number of warps.
#pragma once

#include <cmath>
#include <cstdio>

#include "launch.h"

namespace maml::cuda {

inline constexpr unsigned kWholeWarp = 0xffffffffu;
inline constexpr int kWarp = 32;

/// Threads that share a row of c columns: a power of two, at most a warp.
__device__ __forceinline__ int row_width(int64_t c) {
  int width = 1;
  while (width < kWarp && width * 8 < c) width *= 2;
  return width;
}

/// Over the `width` threads of a row; the same in all of them.
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

/// f(row, lane, width, exists): every thread of a warp is called equally often; beyond the last row with
/// exists = false.
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

__device__ inline void refuse_label(int64_t task, int64_t sample, int64_t label, int64_t classes) {
  printf(
      "cross_entropy: the label of sample %lld of task %lld is %lld, expected 0 to %lld for %lld classes\n",
      static_cast<long long>(sample), static_cast<long long>(task), static_cast<long long>(label),
      static_cast<long long>(classes - 1), static_cast<long long>(classes));
  __trap();
}

/// This thread's part of the sum of -log p[label]; grad_z and p where wanted.
template <class T>
__device__ double cross_entropy_rows(Team team, const LossPart& part, const T* z, const int64_t* labels,
                                     T* grad_z, T* p) {
  const int64_t c = part.c;
  double total = 0;
  const T per_row = 1 / static_cast<T>(part.samples);
  each_row(team, part.n, c, [&](int64_t row, int lane, int width, bool exists) {
    const int64_t first = exists ? lane : c;  // a row that does not exist has no columns
    const T* z_row = z + row * c;
    T largest = -INFINITY;
    for (int64_t j = first; j < c; j += width) largest = z_row[j] > largest ? z_row[j] : largest;
    largest = row_max(largest, width);
    T sum = 0;
    for (int64_t j = first; j < c; j += width) sum += std::exp(z_row[j] - largest);
    sum = row_sum(sum, width);
    if (!exists) return;
    const int64_t label = labels[row];
    if (label < 0 || label >= c) refuse_label(blockIdx.z, row, label, c);
    if (lane == 0) total += static_cast<double>(largest - z_row[label]) + std::log(static_cast<double>(sum));
    if (!grad_z) return;
    const T scale = 1 / sum;
    for (int64_t j = lane; j < c; j += width) {
      const T probability = std::exp(z_row[j] - largest) * scale;
      p[row * c + j] = probability;
      grad_z[row * c + j] = (probability - (j == label ? T(1) : T(0))) * per_row;
    }
  });
  return total;
}

template <class T>
__device__ double square_elements(Team team, const LossPart& part, const T* z, const T* target, T* grad_z) {
  double total = 0;
  const T scale = 2 / static_cast<T>(part.samples * part.c);
  const int64_t count = part.n * part.c, step = team.step();
  for (int64_t i = team.first(); i < count; i += step) {
    const T d = z[i] - target[i];
    total += static_cast<double>(d) * static_cast<double>(d);
    if (grad_z) grad_z[i] = d * scale;
  }
  return total;
}

/// The part's loss of the task blockIdx.z where wanted (loss null: not), with grad_z [n, c] and saved [n, c]
/// (grad_z null: not). One block.
template <class T>
__device__ void loss_value(Team team, const LossPart& part, const T* z, const void* target, T* loss,
                           T* grad_z, T* saved) {
  __shared__ double sums[kWarp];  // one a warp
  const bool labels = part.kind == Loss::cross_entropy;
  double total = labels
                     ? cross_entropy_rows(team, part, z, static_cast<const int64_t*>(target), grad_z, saved)
                     : square_elements(team, part, z, static_cast<const T*>(target), grad_z);
  total = row_sum(total, kWarp);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x == 0 && loss) {
    for (int k = 1; k < warps; ++k) total += sums[k];
    const T value =
        static_cast<T>(total / static_cast<double>(labels ? part.samples : part.samples * part.c));
    *loss = part.add ? *loss + value : value;
  }
}

template <class T>
__device__ void loss_tangent(Team team, const LossPart& part, const T* z_dot, const T* p, T* grad_z_dot) {
  const int64_t c = part.c;
  if (part.kind == Loss::mse) {
    const int64_t count = part.n * c, step = team.step();
    const T scale = 2 / static_cast<T>(part.samples * c);
    for (int64_t i = team.first(); i < count; i += step) grad_z_dot[i] = z_dot[i] * scale;
    return;
  }
  const T per_row = 1 / static_cast<T>(part.samples);
  each_row(team, part.n, c, [&](int64_t row, int lane, int width, bool exists) {
    const int64_t first = exists ? lane : c;
    T mean = 0;
    for (int64_t j = first; j < c; j += width) mean += p[row * c + j] * z_dot[row * c + j];
    mean = row_sum(mean, width);
    for (int64_t j = first; j < c; j += width) {
      grad_z_dot[row * c + j] = p[row * c + j] * (z_dot[row * c + j] - mean) * per_row;
    }
  });
}

}  // namespace maml::cuda
