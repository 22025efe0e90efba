// The losses of one task. They are means as in torch, over N samples; a part holds n of them, with
// predictions z [n, c]:
//   cross_entropy  p = softmax z; L = -sum log p[label] / N;  grad_z = (p - onehot) / N;
//                  grad_z_dot = p (z_dot - <p, z_dot>) / N
//   mse            L = sum (z - t)^2 / (N c);  grad_z = 2 (z - t) / (N c);  grad_z_dot = 2 z_dot / (N c)
//   computed       z is the loss itself: grad_z = 1;  grad_z_dot = 0
// Where samples have a scale w, that of a sample takes the place of 1 / N.
// The value is summed in double. `saved` holds p. The twin on the GPU is cuda/loss.h.
#include <algorithm>
#include <cmath>

#include "cpu/layers.h"

namespace maml::MAML_ISA {
namespace {

template <class T>
T cross_entropy_value(const LossPart& part, const T* z, const Target<T>& target, T* grad_z, T* p) {
  const int64_t c = part.c;
  const auto* label = static_cast<const int64_t*>(target.y);
  const T* const scale = target.scale;
  double total = 0;
  for (int64_t i = 0; i < part.n; ++i, z += c) {
    const T largest = *std::max_element(z, z + c);
    T sum = 0;
    for (int64_t j = 0; j < c; ++j) sum += std::exp(z[j] - largest);
    const double loss = static_cast<double>(largest - z[label[i]]) + std::log(static_cast<double>(sum));
    total += scale ? static_cast<double>(scale[i]) * loss : loss;
    if (!grad_z) continue;
    if (scale) {
      for (int64_t j = 0; j < c; ++j) {
        p[i * c + j] = std::exp(z[j] - largest) / sum;
        grad_z[i * c + j] = (p[i * c + j] - (j == label[i] ? T(1) : T(0))) * scale[i];
      }
      continue;
    }
    for (int64_t j = 0; j < c; ++j) {
      p[i * c + j] = std::exp(z[j] - largest) / sum;
      grad_z[i * c + j] = (p[i * c + j] - (j == label[i] ? T(1) : T(0))) / static_cast<T>(part.samples);
    }
  }
  return static_cast<T>(scale ? total : total / static_cast<double>(part.samples));
}

template <class T>
void cross_entropy_tangent(const LossPart& part, const T*, const Target<T>& target, const T* z_dot,
                           const T* p, T* grad_z_dot) {
  const int64_t c = part.c;
  for (int64_t i = 0; i < part.n; ++i, z_dot += c, p += c, grad_z_dot += c) {
    T mean = 0;
    for (int64_t j = 0; j < c; ++j) mean += p[j] * z_dot[j];
    if (target.scale) {
      for (int64_t j = 0; j < c; ++j) grad_z_dot[j] = p[j] * (z_dot[j] - mean) * target.scale[i];
      continue;
    }
    for (int64_t j = 0; j < c; ++j) grad_z_dot[j] = p[j] * (z_dot[j] - mean) / static_cast<T>(part.samples);
  }
}

template <class T>
T mse_value(const LossPart& part, const T* z, const Target<T>& target, T* grad_z, T*) {
  const int64_t count = part.samples * part.c;
  const T* y = static_cast<const T*>(target.y);
  double total = 0;
  if (target.scale) {
    for (int64_t i = 0; i < part.n; ++i) {
      const T share = target.scale[i] / static_cast<T>(part.c);
      double sum = 0;
      for (int64_t j = i * part.c; j < (i + 1) * part.c; ++j) {
        const T d = z[j] - y[j];
        sum += static_cast<double>(d) * static_cast<double>(d);
        if (grad_z) grad_z[j] = 2 * d * share;
      }
      total += static_cast<double>(target.scale[i]) * sum;
    }
    return static_cast<T>(total / static_cast<double>(part.c));
  }
  for (int64_t i = 0; i < part.n * part.c; ++i) {
    const T d = z[i] - y[i];
    total += static_cast<double>(d) * static_cast<double>(d);
    if (grad_z) grad_z[i] = 2 * d / static_cast<T>(count);
  }
  return static_cast<T>(total / static_cast<double>(count));
}

template <class T>
void mse_tangent(const LossPart& part, const T*, const Target<T>& target, const T* z_dot, const T*,
                 T* grad_z_dot) {
  if (target.scale) {
    for (int64_t i = 0; i < part.n * part.c; ++i) {
      grad_z_dot[i] = 2 * z_dot[i] * (target.scale[i / part.c] / static_cast<T>(part.c));
    }
    return;
  }
  for (int64_t i = 0; i < part.n * part.c; ++i) {
    grad_z_dot[i] = 2 * z_dot[i] / static_cast<T>(part.samples * part.c);
  }
}

template <class T>
T computed_value(const LossPart&, const T* z, const Target<T>&, T* grad_z, T*) {
  if (grad_z) *grad_z = T(1);
  return *z;
}

template <class T>
void computed_tangent(const LossPart&, const T*, const Target<T>&, const T*, const T*, T* grad_z_dot) {
  *grad_z_dot = T(0);
}

}  // namespace

template <class T>
LossPasses<T> computed_loss() {
  return {computed_value<T>, computed_tangent<T>};
}
template <class T>
LossPasses<T> cross_entropy() {
  return {cross_entropy_value<T>, cross_entropy_tangent<T>};
}
template <class T>
LossPasses<T> mse() {
  return {mse_value<T>, mse_tangent<T>};
}
template LossPasses<float> computed_loss<float>();
template LossPasses<double> computed_loss<double>();
template LossPasses<float> cross_entropy<float>();
template LossPasses<double> cross_entropy<double>();
template LossPasses<float> mse<float>();
template LossPasses<double> mse<double>();

}  // namespace maml::MAML_ISA
