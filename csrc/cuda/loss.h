// The losses of one task. They are means as in torch, over N samples; a part holds n of them, with
// predictions z [n, c]:
//   cross_entropy  p = softmax z; L = -sum log p[label] / N;  grad_z = (p - onehot) / N;
//                  grad_z_dot = p (z_dot - <p, z_dot>) / N
//   mse            L = sum (z - t)^2 / (N c);  grad_z = 2 (z - t) / (N c);  grad_z_dot = 2 z_dot / (N c)
//   computed       z is the loss itself: grad_z = 1;  grad_z_dot = 0
// Where samples have a scale w, that of a sample takes the place of 1 / N.
// `saved` holds p. policy_loss.h has the formulas and kernels of the policy losses.
//
// Cross entropy: `width` threads of a warp share a row, one to eight columns each as long as a warp suffices
// (the five classes of a 5-way task fall to one thread); its maximum and its sums are reduced by shuffles.
// Every thread of a warp runs the same number of rows, so that all lanes take part in the shuffles. mse: one
// element a thread.
//
// Order of sums: the value is summed in double, by each thread over its rows in ascending order, then within
// a warp by shuffles, then by thread 0 over the warps. The order depends on n, c and the block size. One
// block computes the value: it is a single sum of a few hundred rows. A tangent has no such sum and may be
// shared by any number of blocks.
//
// Barriers: loss_value has one, between the warps' sums and thread 0. The caller puts one after every device
// function, which separates two calls. All threads of a block call; a block is a whole number of warps.
#pragma once

#include <cmath>

#include "cuda/policy_loss.h"
#include "cuda/rows.h"

namespace maml::cuda {

/// This thread's part of the sum of -log p[label]. Writes grad_z and p unless grad_z is null.
template <class T>
__device__ double cross_entropy_rows(Team team, const LossPart& part, const T* z, const Target<T>& target,
                                     T* grad_z, T* p) {
  const int64_t c = part.c;
  const auto* const labels = static_cast<const int64_t*>(target.y);
  double total = 0;
  const T of_all = 1 / static_cast<T>(part.samples);
  each_row(team, part.n, c, [&](int64_t row, int lane, int width, bool exists) {
    const int64_t first = exists ? lane : c;  // c: a row that does not exist has no columns to read
    const T* z_row = z + row * c;
    T largest = -INFINITY;
    for (int64_t j = first; j < c; j += width) largest = z_row[j] > largest ? z_row[j] : largest;
    largest = row_max(largest, width);
    T sum = 0;
    for (int64_t j = first; j < c; j += width) sum += std::exp(z_row[j] - largest);
    sum = row_sum(sum, width);
    if (!exists) return;
    const int64_t label = labels[row];
    if (label < 0 || label >= c) refuse_class("cross_entropy: the label", part.first + row, label, c);
    if (lane == 0) {
      const double loss = static_cast<double>(largest - z_row[label]) + std::log(static_cast<double>(sum));
      total += target.scale ? static_cast<double>(target.scale[row]) * loss : loss;
    }
    if (!grad_z) return;
    const T per_row = target.scale ? target.scale[row] : of_all;
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
__device__ double square_elements(Team team, const LossPart& part, const T* z, const Target<T>& of,
                                  T* grad_z) {
  const T* const target = static_cast<const T*>(of.y);
  double total = 0;
  if (of.scale) {
    const int64_t count = part.n * part.c, step = team.step();
    for (int64_t i = team.first(); i < count; i += step) {
      const T d = z[i] - target[i], share = of.scale[i / part.c] / static_cast<T>(part.c);
      total += static_cast<double>(share) * static_cast<double>(d) * static_cast<double>(d);
      if (grad_z) grad_z[i] = 2 * d * share;
    }
    return total;
  }
  const T scale = 2 / static_cast<T>(part.samples * part.c);
  const int64_t count = part.n * part.c, step = team.step();
  for (int64_t i = team.first(); i < count; i += step) {
    const T d = z[i] - target[i];
    total += static_cast<double>(d) * static_cast<double>(d);
    if (grad_z) grad_z[i] = d * scale;
  }
  return total;
}

/// Writes the part's loss of task blockIdx.z (not if `loss` is null) and grad_z [n, c] with saved [n, c]
/// (not if `grad_z` is null). Runs in one block; `sums`: shared memory, one element for each warp.
template <class T>
__device__ void loss_value(Team team, const LossPart& part, const T* z, const Target<T>& target, T* loss,
                           T* grad_z, T* saved, double* sums) {
  double total = 0, count = target.scale ? 1 : static_cast<double>(part.samples);
  switch (part.kind) {
    case Loss::cross_entropy:
      total = cross_entropy_rows(team, part, z, target, grad_z, saved);
      break;
    case Loss::mse:
      total = square_elements(team, part, z, target, grad_z);
      if (!target.scale) count *= static_cast<double>(part.c);
      break;
    case Loss::gaussian_policy:
      total = gaussian_rows(team, part, z, target, grad_z, saved);
      count = 1;
      break;
    case Loss::categorical_policy:
      total = categorical_rows(team, part, z, target, grad_z, saved);
      count = 1;
      break;
    case Loss::computed:
      if (threadIdx.x == 0) {
        total = static_cast<double>(*z);
        if (grad_z) *grad_z = T(1);
      }
      break;
  }
  total = row_sum(total, kWarp);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x == 0 && loss) {
    for (int k = 1; k < warps; ++k) total += sums[k];
    const T value = static_cast<T>(total / count);
    *loss = part.add ? *loss + value : value;
  }
}

template <class T>
__device__ void cross_entropy_tangent(Team team, const LossPart& part, const Target<T>& target,
                                      const T* z_dot, const T* p, T* grad_z_dot) {
  const int64_t c = part.c;
  const T of_all = 1 / static_cast<T>(part.samples);
  each_row(team, part.n, c, [&](int64_t row, int lane, int width, bool exists) {
    const int64_t first = exists ? lane : c;
    T mean = 0;
    for (int64_t j = first; j < c; j += width) mean += p[row * c + j] * z_dot[row * c + j];
    mean = row_sum(mean, width);
    const T per_row = target.scale && exists ? target.scale[row] : of_all;
    for (int64_t j = first; j < c; j += width) {
      grad_z_dot[row * c + j] = p[row * c + j] * (z_dot[row * c + j] - mean) * per_row;
    }
  });
}

template <class T>
__device__ void loss_tangent(Team team, const LossPart& part, const T* z, const Target<T>& target,
                             const T* z_dot, const T* saved, T* grad_z_dot) {
  if (part.kind == Loss::cross_entropy)
    return cross_entropy_tangent(team, part, target, z_dot, saved, grad_z_dot);
  if (part.kind == Loss::gaussian_policy)
    return gaussian_tangent(team, part, z, target, z_dot, saved, grad_z_dot);
  if (part.kind == Loss::categorical_policy)
    return categorical_tangent(team, part, z, target, z_dot, saved, grad_z_dot);
  const int64_t count = part.n * part.c, step = team.step();
  const bool computed = part.kind == Loss::computed;  // the derivative of its cotangent, which is 1
  if (target.scale && !computed) {
    for (int64_t i = team.first(); i < count; i += step)
      grad_z_dot[i] = 2 * z_dot[i] * (target.scale[i / part.c] / static_cast<T>(part.c));
    return;
  }
  const T scale = computed ? T(0) : 2 / static_cast<T>(part.samples * part.c);
  for (int64_t i = team.first(); i < count; i += step) grad_z_dot[i] = computed ? T(0) : z_dot[i] * scale;
}

/// The product of a policy's Fisher matrix with z_dot, into grad_z (policy losses only).
template <class T>
__device__ void loss_metric(Team team, const LossPart& part, const T* z, const Target<T>& target,
                            const T* z_dot, T* grad_z) {
  if (part.kind == Loss::gaussian_policy) return gaussian_metric(team, part, z, target, z_dot, grad_z);
  return categorical_metric(team, part, z, target, z_dot, grad_z);
}

}  // namespace maml::cuda
