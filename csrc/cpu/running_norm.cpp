// BatchNorm with given statistics mu and var [c], which are constants, over the m = n h w rows of a matrix
// [m, c], for one task. Per channel, with g = grad_y:
//
//   s = (var + eps)^-1/2, xh = (x - mu) s,       y = gamma xh + beta
//   grad_gamma = sum g xh, grad_beta = sum g,    grad_x = gamma s g
//   y_dot = gamma s x_dot + gamma_dot xh + beta_dot
//   grad_gamma_dot = sum(g_dot xh + g s x_dot), grad_beta_dot = sum g_dot,
//   grad_x_dot = gamma s g_dot + gamma_dot s g
//
// gamma and beta may be absent (1 and 0). Samples do not depend on each other. The twin on the GPU is
// cuda/running_norm.cu.
#include <cmath>

#include "cpu/implement.h"
#include "cpu/rows.h"

namespace maml::MAML_ISA {
namespace {

int64_t rows_of(const Layer& l) { return l.n * l.in.h * l.in.w; }

/// The values of the channels from j on; s is read from t.saved.
template <class T>
struct Channels {
  Vector<T> mu, s, gamma, beta, gamma_dot, beta_dot;
  Channels(const Tensors<T>& t, int64_t j, const Lanes<T>& lanes)
      : mu(load(t.w[2] + j, lanes)),
        s(load(t.saved + j, lanes)),
        gamma(t.w[0] ? load(t.w[0] + j, lanes) : broadcast(T(1))),
        beta(t.w[1] ? load(t.w[1] + j, lanes) : broadcast(T(0))),
        gamma_dot(t.w_dot[0] ? load(t.w_dot[0] + j, lanes) : broadcast(T(0))),
        beta_dot(t.w_dot[1] ? load(t.w_dot[1] + j, lanes) : broadcast(T(0))) {}
  Vector<T> xh(Vector<T> x) const { return (x - mu) * s; }
};

/// to [m, c] (+)= f(element, values of its channels, lanes).
template <class T, class F>
void each(const Layer& l, const Tensors<T>& t, T* to, bool add, F f) {
  const int64_t channels = l.in.c;
  each_block<T>(rows_of(l), channels, [&](int64_t j, const Lanes<T>& lanes, int64_t i0, int64_t i1) {
    const Channels<T> known(t, j, lanes);
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t at = i * channels + j;
      const Vector<T> value = f(at, known, lanes);
      store(to + at, add ? load(to + at, lanes) + value : value, lanes);
    }
  });
}

/// out [c] (+)= sums, unless `out` is null.
template <class T>
void give(const T* sums, int64_t channels, bool add, T* out) {
  if (!out) return;
  for (int64_t j = 0; j < channels; ++j) out[j] = add ? out[j] + sums[j] : sums[j];
}

template <class T>
void forward(const Layer& l, const Tensors<T>& t) {
  for (int64_t j = 0; j < l.in.c; ++j) t.saved[j] = 1 / std::sqrt(t.w[3][j] + static_cast<T>(l.eps));
  each<T>(l, t, t.y, false, [&](int64_t at, const Channels<T>& k, const Lanes<T>& lanes) {
    return k.gamma * k.xh(load(t.x[0] + at, lanes)) + k.beta;
  });
}

template <class T>
void backward(const Layer& l, const Tensors<T>& t) {
  const int64_t channels = l.in.c;
  if (t.grad_w[0] || t.grad_w[1]) {
    T *by_gamma = t.scratch, *by_beta = t.scratch + channels;
    channel_sums<T, 2>(rows_of(l), channels, {by_gamma, by_beta},
                       [&](int64_t at, int64_t j, const Lanes<T>& lanes, Vector<T>* sum) {
                         const Vector<T> g = load(t.grad_y + at, lanes);
                         const Vector<T> d = load(t.x[0] + at, lanes) - load(t.w[2] + j, lanes);
                         sum[0] += g * d * load(t.saved + j, lanes);
                         sum[1] += g;
                       });
    give(by_gamma, channels, t.add_w[0], t.grad_w[0]);
    give(by_beta, channels, t.add_w[1], t.grad_w[1]);
  }
  if (!t.grad_x[0]) return;
  each<T>(l, t, t.grad_x[0], t.add_x[0], [&](int64_t at, const Channels<T>& k, const Lanes<T>& lanes) {
    return k.gamma * k.s * load(t.grad_y + at, lanes);
  });
}

template <class T>
void forward_tangent(const Layer& l, const Tensors<T>& t) {
  each<T>(l, t, t.y_dot, false, [&](int64_t at, const Channels<T>& k, const Lanes<T>& lanes) {
    Vector<T> y_dot = k.gamma_dot * k.xh(load(t.x[0] + at, lanes)) + k.beta_dot;
    if (t.x_dot[0]) y_dot += k.gamma * k.s * load(t.x_dot[0] + at, lanes);
    return y_dot;
  });
}

/// grad_y may be absent, then also x_dot and gamma_dot.
template <class T>
void backward_tangent(const Layer& l, const Tensors<T>& t) {
  const int64_t channels = l.in.c;
  if (t.grad_w_dot[0] || t.grad_w_dot[1]) {
    T *by_gamma = t.scratch, *by_beta = t.scratch + channels;
    channel_sums<T, 2>(rows_of(l), channels, {by_gamma, by_beta},
                       [&](int64_t at, int64_t j, const Lanes<T>& lanes, Vector<T>* sum) {
                         const Vector<T> s = load(t.saved + j, lanes), g_dot = load(t.grad_y_dot + at, lanes);
                         sum[0] += g_dot * (load(t.x[0] + at, lanes) - load(t.w[2] + j, lanes)) * s;
                         if (t.x_dot[0])
                           sum[0] += load(t.grad_y + at, lanes) * s * load(t.x_dot[0] + at, lanes);
                         sum[1] += g_dot;
                       });
    give(by_gamma, channels, t.add_w[0], t.grad_w_dot[0]);
    give(by_beta, channels, t.add_w[1], t.grad_w_dot[1]);
  }
  if (!t.grad_x_dot[0]) return;
  each<T>(l, t, t.grad_x_dot[0], t.add_x[0], [&](int64_t at, const Channels<T>& k, const Lanes<T>& lanes) {
    Vector<T> grad_x_dot = k.gamma * k.s * load(t.grad_y_dot + at, lanes);
    if (t.grad_y) grad_x_dot += k.gamma_dot * k.s * load(t.grad_y + at, lanes);
    return grad_x_dot;
  });
}

}  // namespace

template <>
struct OnCpu<Kind::running_norm> {
  static Footprint footprint(const Layer& l) { return {l.in.c, 2 * l.in.c}; }
  template <class T>
  static Passes<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::running_norm>;

}  // namespace maml::MAML_ISA
