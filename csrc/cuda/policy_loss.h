// The policy-gradient losses of one task, over samples with actions a and log pi = log pi(a | z):
//   score form         L = -sum s log pi                  k = s
//   likelihood ratio   L = -sum s exp(log pi - old)       k = s exp(log pi - old), k_dot = k (log pi)_dot
// s is the scale of a sample. A sample with s = 0 is padding: its numbers, even NaN, change nothing.
//   Gaussian, z = [mean, log_std], e = (a - mean) / std, e_dot = -mean_dot / std - e log_std_dot:
//     log pi = -sum (e^2 / 2 + log_std + log(2 pi) / 2)
//     grad_mean = -k e / std;      grad_mean_dot = -k_dot e / std - k (e_dot - e log_std_dot) / std
//     grad_log_std = -k (e^2 - 1); grad_log_std_dot = -k_dot (e^2 - 1) - 2 k e e_dot
//     `saved` holds e and 1 / std.
//   categorical, z = logits, p = softmax z:
//     grad_z = k (p - onehot);  grad_z_dot = k_dot (p - onehot) + k p (z_dot - <p, z_dot>)
//     `saved` holds p.
// The metric is the product of the Fisher matrix with z_dot:
//   Gaussian: s mean_dot / std^2, 2 s log_std_dot;  categorical: s p (z_dot - <p, z_dot>)
//
// Threads: one thread computes a Gaussian sample, one dimension after the other. `width` threads of a warp
// share the logits of a categorical sample (rows.h). log pi is summed in double; k is of type T. There are no
// barriers; all threads of a warp must call. The twin on the CPU is cpu/policy_loss.cpp.
#pragma once

#include <cmath>
#include <cstdio>

#include "cuda/rows.h"

namespace maml::cuda {

inline constexpr double kLogRoot2Pi = 0.91893853320467274178;

__device__ inline void refuse_class(const char* what, int64_t sample, int64_t got, int64_t classes) {
  printf("%s of sample %lld of task %lld is %lld, expected 0 to %lld for %lld classes\n", what,
         static_cast<long long>(sample), static_cast<long long>(blockIdx.z), static_cast<long long>(got),
         static_cast<long long>(classes - 1), static_cast<long long>(classes));
  __trap();
}

/// The factor k of a sample.
template <class T>
__device__ __forceinline__ T coefficient(const Target<T>& target, int64_t sample, double log_prob) {
  const T scale = target.scale[sample];
  if (scale == T(0) || !target.old_log_probs) return scale;
  return scale * static_cast<T>(std::exp(log_prob - static_cast<double>(target.old_log_probs[sample])));
}

/// The sample's term of the loss.
template <class T>
__device__ __forceinline__ double part_of_loss(const Target<T>& target, T k, double log_prob) {
  if (k == T(0)) return 0;
  return target.old_log_probs ? -static_cast<double>(k) : -static_cast<double>(k) * log_prob;
}

/// This thread's part of the loss. Writes grad_z and saved unless grad_z is null.
template <class T>
__device__ double gaussian_rows(Team team, const LossPart& part, const T* z, const Target<T>& target,
                                T* grad_z, T* saved) {
  const int64_t c = part.c, dims = c / 2, step = team.step();
  double total = 0;
  for (int64_t i = team.first(); i < part.n; i += step) {
    const T* row = z + i * c;
    const T* action = static_cast<const T*>(target.y) + i * dims;
    double log_prob = 0;
    for (int64_t j = 0; j < dims; ++j) {
      const T inverse = std::exp(-row[dims + j]), e = (action[j] - row[j]) * inverse;
      log_prob -= static_cast<double>(e * e / 2 + row[dims + j]) + kLogRoot2Pi;
      if (grad_z) saved[i * c + j] = e, saved[i * c + dims + j] = inverse;
    }
    const T k = coefficient(target, i, log_prob);
    total += part_of_loss(target, k, log_prob);
    for (int64_t j = 0; grad_z && j < dims; ++j) {
      const T e = saved[i * c + j];
      grad_z[i * c + j] = k == T(0) ? T(0) : -k * e * saved[i * c + dims + j];
      grad_z[i * c + dims + j] = k == T(0) ? T(0) : -k * (e * e - 1);
    }
  }
  return total;
}

template <class T>
__device__ void gaussian_tangent(Team team, const LossPart& part, const T* z, const Target<T>& target,
                                 const T* z_dot, const T* saved, T* grad_z_dot) {
  const int64_t c = part.c, dims = c / 2, step = team.step();
  for (int64_t i = team.first(); i < part.n; i += step) {
    const T *mean_dot = z_dot + i * c, *log_std_dot = mean_dot + dims;
    const T *e = saved + i * c, *inverse = e + dims;
    T* grad = grad_z_dot + i * c;
    const bool padding = target.scale[i] == T(0);
    double log_prob = 0;
    T log_prob_dot = 0;
    for (int64_t j = 0; target.old_log_probs && !padding && j < dims; ++j) {
      log_prob -= static_cast<double>(e[j] * e[j] / 2 + z[i * c + dims + j]) + kLogRoot2Pi;
      log_prob_dot += e[j] * inverse[j] * mean_dot[j] + (e[j] * e[j] - 1) * log_std_dot[j];
    }
    const T k = coefficient(target, i, log_prob), k_dot = k * log_prob_dot;
    for (int64_t j = 0; j < dims; ++j) {
      const T e_dot = -mean_dot[j] * inverse[j] - e[j] * log_std_dot[j];
      grad[j] = padding ? T(0) : -(k_dot * e[j] + k * (e_dot - e[j] * log_std_dot[j])) * inverse[j];
      grad[dims + j] = padding ? T(0) : -k_dot * (e[j] * e[j] - 1) - 2 * k * e[j] * e_dot;
    }
  }
}

template <class T>
__device__ void gaussian_metric(Team team, const LossPart& part, const T* z, const Target<T>& target,
                                const T* z_dot, T* grad_z) {
  const int64_t c = part.c, dims = c / 2, step = team.step();
  for (int64_t i = team.first(); i < part.n; i += step) {
    const T scale = target.scale[i];
    for (int64_t j = 0; j < dims; ++j) {
      const int64_t mean = i * c + j, log_std = mean + dims;
      grad_z[mean] = scale == T(0) ? T(0) : scale * std::exp(-2 * z[log_std]) * z_dot[mean];
      grad_z[log_std] = 2 * scale * z_dot[log_std];
    }
  }
}

/// The softmax of a row that `width` threads share: its largest logit, the sum of exponentials relative to
/// it, and the reciprocal of that sum. `first` is the thread's first column.
template <class T>
struct Softmax {
  T largest = -INFINITY, sum = 0, scale;
  __device__ Softmax(const T* z, int64_t first, int64_t c, int width) {
    for (int64_t j = first; j < c; j += width) largest = z[j] > largest ? z[j] : largest;
    largest = row_max(largest, width);
    for (int64_t j = first; j < c; j += width) sum += std::exp(z[j] - largest);
    sum = row_sum(sum, width);
    scale = 1 / sum;
  }
  __device__ double log_prob(T logit) const {
    return static_cast<double>(logit - largest) - std::log(static_cast<double>(sum));
  }
  __device__ T prob(T logit) const { return std::exp(logit - largest) * scale; }
};

/// This thread's part of the loss. Writes grad_z and p unless grad_z is null.
template <class T>
__device__ double categorical_rows(Team team, const LossPart& part, const T* z, const Target<T>& target,
                                   T* grad_z, T* p) {
  const int64_t c = part.c;
  const auto* actions = static_cast<const int64_t*>(target.y);
  double total = 0;
  each_row(team, part.n, c, [&](int64_t row, int lane, int width, bool exists) {
    const T* logits = z + row * c;
    const Softmax<T> softmax(logits, exists ? lane : c, c, width);
    if (!exists) return;
    const int64_t action = actions[row];
    if (action < 0 || action >= c)
      refuse_class("categorical_policy_gradient: the action", part.first + row, action, c);
    const double log_prob = softmax.log_prob(logits[action]);
    const T k = coefficient(target, row, log_prob);
    if (lane == 0) total += part_of_loss(target, k, log_prob);
    for (int64_t j = lane; grad_z && j < c; j += width) {
      p[row * c + j] = softmax.prob(logits[j]);
      grad_z[row * c + j] = k * (p[row * c + j] - (j == action ? T(1) : T(0)));
    }
  });
  return total;
}

template <class T>
__device__ void categorical_tangent(Team team, const LossPart& part, const T* z, const Target<T>& target,
                                    const T* z_dot, const T* p, T* grad_z_dot) {
  const int64_t c = part.c;
  const auto* actions = static_cast<const int64_t*>(target.y);
  each_row(team, part.n, c, [&](int64_t row, int lane, int width, bool exists) {
    const int64_t first = exists ? lane : c, at = row * c;
    T mean = 0;
    for (int64_t j = first; j < c; j += width) mean += p[at + j] * z_dot[at + j];
    mean = row_sum(mean, width);
    const Softmax<T> softmax(z + at, target.old_log_probs ? first : c, c, width);
    if (!exists) return;
    const int64_t action = actions[row];
    T k = target.scale[row], k_dot = 0;
    if (target.old_log_probs) {
      k = coefficient(target, row, softmax.log_prob(z[at + action]));
      k_dot = k * (z_dot[at + action] - mean);
    }
    for (int64_t j = lane; j < c; j += width) {
      const T q = p[at + j];
      grad_z_dot[at + j] = k_dot * (q - (j == action ? T(1) : T(0))) + k * q * (z_dot[at + j] - mean);
    }
  });
}

template <class T>
__device__ void categorical_metric(Team team, const LossPart& part, const T* z, const Target<T>& target,
                                   const T* z_dot, T* grad_z) {
  const int64_t c = part.c;
  each_row(team, part.n, c, [&](int64_t row, int lane, int width, bool exists) {
    const int64_t first = exists ? lane : c, at = row * c;
    const Softmax<T> softmax(z + at, first, c, width);
    T mean = 0;
    for (int64_t j = first; j < c; j += width) {
      const T q = softmax.prob(z[at + j]);
      grad_z[at + j] = q;
      mean += q * z_dot[at + j];
    }
    mean = row_sum(mean, width);
    const T scale = exists ? target.scale[row] : T(0);
    for (int64_t j = first; j < c; j += width) grad_z[at + j] *= scale * (z_dot[at + j] - mean);
  });
}

}  // namespace maml::cuda
