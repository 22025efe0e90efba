// The policy-gradient losses of one task, over samples with actions a and log pi = log pi(a | z):
//   score form         L = -sum s log pi                  k = s
//   likelihood ratio   L = -sum s exp(log pi - old)       k = s exp(log pi - old), k_dot = k (log pi)_dot
// s is the scale of a sample: its share of the weights times its advantage. A sample with s = 0 is padding:
// its numbers, even NaN, change nothing.
//   Gaussian, z = [mean, log_std], e = (a - mean) / std, e_dot = -mean_dot / std - e log_std_dot:
//     log pi = -sum (e^2 / 2 + log_std + log(2 pi) / 2)
//     (log pi)_dot = sum e / std mean_dot + (e^2 - 1) log_std_dot
//     grad_mean = -k e / std;      grad_mean_dot = -k_dot e / std - k (e_dot - e log_std_dot) / std
//     grad_log_std = -k (e^2 - 1); grad_log_std_dot = -k_dot (e^2 - 1) - 2 k e e_dot
//     `saved` holds e and 1 / std.
//   categorical, z = logits, p = softmax z:
//     log pi = log p[a];  (log pi)_dot = z_dot[a] - <p, z_dot>
//     grad_z = k (p - onehot);  grad_z_dot = k_dot (p - onehot) + k p (z_dot - <p, z_dot>)
//     `saved` holds p.
// The metric is the product of z_dot with the Fisher matrix, summed over samples with weights s:
//   Gaussian: s mean_dot / std^2, 2 s log_std_dot;  categorical: s p (z_dot - <p, z_dot>)
// The value is summed in double, sample by sample; so is log pi. The twin on the GPU is cuda/policy_loss.h.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "cpu/layers.h"

namespace maml::MAML_ISA {
namespace {

/// The factor k of sample i.
template <class T>
T coefficient(const Target<T>& target, int64_t i, double log_prob) {
  const T scale = target.scale[i];
  if (scale == T(0) || !target.old_log_probs) return scale;
  return scale * static_cast<T>(std::exp(log_prob - static_cast<double>(target.old_log_probs[i])));
}

/// The sample's term of the loss.
template <class T>
double part_of_loss(const Target<T>& target, T k, double log_prob) {
  if (k == T(0)) return 0;
  return target.old_log_probs ? -static_cast<double>(k) : -static_cast<double>(k) * log_prob;
}

const double kLogRoot2Pi = std::log(2 * std::numbers::pi) / 2;

template <class T>
T gaussian_value(const LossPart& part, const T* z, const Target<T>& target, T* grad_z, T* saved) {
  const int64_t c = part.c, dims = c / 2;
  const T* action = static_cast<const T*>(target.y);
  double total = 0;
  for (int64_t i = 0; i < part.n; ++i, z += c, action += dims) {
    double log_prob = 0;
    for (int64_t j = 0; j < dims; ++j) {
      const T inverse = std::exp(-z[dims + j]), e = (action[j] - z[j]) * inverse;
      log_prob -= static_cast<double>(e * e / 2 + z[dims + j]) + kLogRoot2Pi;
      if (grad_z) saved[i * c + j] = e, saved[i * c + dims + j] = inverse;
    }
    const T k = coefficient(target, i, log_prob);
    total += part_of_loss(target, k, log_prob);
    if (!grad_z) continue;
    T* grad = grad_z + i * c;
    for (int64_t j = 0; j < dims; ++j) {
      const T e = saved[i * c + j], inverse = saved[i * c + dims + j];
      grad[j] = k == T(0) ? T(0) : -k * e * inverse;
      grad[dims + j] = k == T(0) ? T(0) : -k * (e * e - 1);
    }
  }
  return static_cast<T>(total);
}

template <class T>
void gaussian_tangent(const LossPart& part, const T* z, const Target<T>& target, const T* z_dot,
                      const T* saved, T* grad_z_dot) {
  const int64_t c = part.c, dims = c / 2;
  for (int64_t i = 0; i < part.n; ++i, z += c, z_dot += c, saved += c, grad_z_dot += c) {
    if (target.scale[i] == T(0)) {
      std::fill_n(grad_z_dot, c, T(0));
      continue;
    }
    double log_prob = 0;
    T log_prob_dot = 0;
    for (int64_t j = 0; target.old_log_probs && j < dims; ++j) {
      const T e = saved[j];
      log_prob -= static_cast<double>(e * e / 2 + z[dims + j]) + kLogRoot2Pi;
      log_prob_dot += e * saved[dims + j] * z_dot[j] + (e * e - 1) * z_dot[dims + j];
    }
    const T k = coefficient(target, i, log_prob), k_dot = k * log_prob_dot;
    for (int64_t j = 0; j < dims; ++j) {
      const T e = saved[j], inverse = saved[dims + j], log_std_dot = z_dot[dims + j];
      const T e_dot = -z_dot[j] * inverse - e * log_std_dot;
      grad_z_dot[j] = -(k_dot * e + k * (e_dot - e * log_std_dot)) * inverse;
      grad_z_dot[dims + j] = -k_dot * (e * e - 1) - 2 * k * e * e_dot;
    }
  }
}

template <class T>
void gaussian_metric(const LossPart& part, const T* z, const Target<T>& target, const T* z_dot, T* grad_z) {
  const int64_t c = part.c, dims = c / 2;
  for (int64_t i = 0; i < part.n; ++i, z += c, z_dot += c, grad_z += c) {
    const T scale = target.scale[i];
    for (int64_t j = 0; j < dims; ++j) {
      grad_z[j] = scale == T(0) ? T(0) : scale * std::exp(-2 * z[dims + j]) * z_dot[j];
      grad_z[dims + j] = 2 * scale * z_dot[dims + j];
    }
  }
}

/// p = softmax z, unless p is null; returns log sum exp z.
template <class T>
double softmax(int64_t c, const T* z, T* p) {
  const T largest = *std::max_element(z, z + c);
  T sum = 0;
  for (int64_t j = 0; j < c; ++j) sum += std::exp(z[j] - largest);
  for (int64_t j = 0; p && j < c; ++j) p[j] = std::exp(z[j] - largest) / sum;
  return static_cast<double>(largest) + std::log(static_cast<double>(sum));
}

template <class T>
T categorical_value(const LossPart& part, const T* z, const Target<T>& target, T* grad_z, T* p) {
  const int64_t c = part.c;
  const auto* action = static_cast<const int64_t*>(target.y);
  double total = 0;
  for (int64_t i = 0; i < part.n; ++i, z += c) {
    const double normaliser = softmax(c, z, grad_z ? p + i * c : nullptr);
    const double log_prob = static_cast<double>(z[action[i]]) - normaliser;
    const T k = coefficient(target, i, log_prob);
    total += part_of_loss(target, k, log_prob);
    for (int64_t j = 0; grad_z && j < c; ++j) {
      grad_z[i * c + j] = k * (p[i * c + j] - (j == action[i] ? T(1) : T(0)));
    }
  }
  return static_cast<T>(total);
}

template <class T>
void categorical_tangent(const LossPart& part, const T* z, const Target<T>& target, const T* z_dot,
                         const T* p, T* grad_z_dot) {
  const int64_t c = part.c;
  const auto* action = static_cast<const int64_t*>(target.y);
  for (int64_t i = 0; i < part.n; ++i, z += c, z_dot += c, p += c, grad_z_dot += c) {
    T mean = 0;
    for (int64_t j = 0; j < c; ++j) mean += p[j] * z_dot[j];
    const int64_t a = action[i];
    T k = target.scale[i], k_dot = 0;
    if (target.old_log_probs) {
      k = coefficient(target, i, static_cast<double>(z[a]) - softmax<T>(c, z, nullptr));
      k_dot = k * (z_dot[a] - mean);
    }
    for (int64_t j = 0; j < c; ++j) {
      grad_z_dot[j] = k_dot * (p[j] - (j == a ? T(1) : T(0))) + k * p[j] * (z_dot[j] - mean);
    }
  }
}

template <class T>
void categorical_metric(const LossPart& part, const T* z, const Target<T>& target, const T* z_dot,
                        T* grad_z) {
  const int64_t c = part.c;
  for (int64_t i = 0; i < part.n; ++i, z += c, z_dot += c, grad_z += c) {
    T mean = 0;
    softmax(c, z, grad_z);  // grad_z holds p for now
    for (int64_t j = 0; j < c; ++j) mean += grad_z[j] * z_dot[j];
    for (int64_t j = 0; j < c; ++j) grad_z[j] *= target.scale[i] * (z_dot[j] - mean);
  }
}

}  // namespace

template <class T>
LossPasses<T> gaussian_policy() {
  return {gaussian_value<T>, gaussian_tangent<T>, gaussian_metric<T>};
}
template <class T>
LossPasses<T> categorical_policy() {
  return {categorical_value<T>, categorical_tangent<T>, categorical_metric<T>};
}
template LossPasses<float> gaussian_policy<float>();
template LossPasses<double> gaussian_policy<double>();
template LossPasses<float> categorical_policy<float>();
template LossPasses<double> categorical_policy<double>();

}  // namespace maml::MAML_ISA
