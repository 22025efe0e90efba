// References for the CUDA layers, sharing no code with them. A reference writes the forward pass and the
// chain rule, step by step, for any number type. With dual numbers it also yields the tangents, and f' is
// computed as the derivative of f itself.
#pragma once

#include <cmath>
#include <cstdlib>
#include <vector>

#include "layers/functions.h"
#include "layers/kinds.h"

namespace maml {

/// v + d epsilon, epsilon^2 = 0.
template <class S>
struct Dual {
  S v, d;
  Dual(double value = 0) : v(value), d(0) {}
  Dual(S value, S dot) : v(value), d(dot) {}
  friend Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
  friend Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
  friend Dual operator-(Dual a) { return Dual(0) - a; }
  friend Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.d * b.v + a.v * b.d}; }
  friend Dual operator/(Dual a, Dual b) { return {a.v / b.v, (a.d - a.v / b.v * b.d) / b.v}; }
  Dual& operator+=(Dual b) { return *this = *this + b; }
};

inline double value_of(double x) { return x; }
template <class S>
double value_of(Dual<S> x) {
  return value_of(x.v);
}

using std::cos, std::erfc, std::exp, std::log, std::sin, std::sqrt;
template <class S>
Dual<S> exp(Dual<S> x) {
  return {exp(x.v), exp(x.v) * x.d};
}
template <class S>
Dual<S> log(Dual<S> x) {
  return {log(x.v), x.d / x.v};
}
template <class S>
Dual<S> sqrt(Dual<S> x) {
  return {sqrt(x.v), x.d / (S(2) * sqrt(x.v))};
}
template <class S>
Dual<S> erfc(Dual<S> x) {
  return {erfc(x.v), S(-1.1283791670955126) * exp(-(x.v * x.v)) * x.d};
}

template <class S>
Dual<S> cos(Dual<S> x);
template <class S>
Dual<S> sin(Dual<S> x) {
  return {sin(x.v), cos(x.v) * x.d};
}
template <class S>
Dual<S> cos(Dual<S> x) {
  return {cos(x.v), -(sin(x.v) * x.d)};
}

template <class S>
struct Values {
  std::vector<S> x[2], w[2], g;            // inputs; an empty w is absent
  std::vector<S> y, grad_x[2], grad_w[2];  // outputs
};

/// The tests give a layer's function the constants that fit it, and arguments that are positive where others
/// have no value or a large derivative.
inline Layer with(Layer l, Function f) {
  l.function = f;
  switch (f) {
    case Function::leaky_relu:
      l.a = 0.1;
      break;
    case Function::elu:
      l.a = 1.3, l.b = 0.9, l.c = 0.7;
      break;
    case Function::softplus:
      l.a = 2, l.b = 3;
      break;
    case Function::hardtanh:
    case Function::clamp:
      l.a = -0.7, l.b = 0.9;
      break;
    case Function::power:
      l.a = -1.7;
      break;
    case Function::affine:
      l.a = -1.3, l.b = 0.4;
      break;
    default:
      break;
  }
  return l;
}
inline bool takes_positive(Function f) {
  return f == Function::log || f == Function::log1p || f == Function::sqrt || f == Function::root ||
         f == Function::rsqrt || f == Function::reciprocal || f == Function::power;
}
inline std::vector<double> made_positive(std::vector<double> values) {
  for (double& v : values) v = std::fabs(v) + 0.3;
  return values;
}

template <class S>
S f_of(const Layer& l, S x) {
  const double at = value_of(x);
  const S a(l.a), b(l.b), c(l.c), one(1);
  auto sigmoid = [&](S z) { return one / (one + exp(-z)); };
  switch (l.function) {
    case Function::relu:
      return at > 0 ? x : S(0);
    case Function::leaky_relu:
      return at > 0 ? x : a * x;
    case Function::elu:
      return at > 0 ? b * x : b * a * (exp(x / c) - one);
    case Function::silu:
      return x * sigmoid(x);
    case Function::gelu:
      return x * erfc(-x / sqrt(S(2))) / S(2);
    case Function::gelu_tanh: {
      const S u = S(std::sqrt(2 / M_PI)) * (x + S(0.044715) * x * x * x);
      return x * sigmoid(S(2) * u);  // (1 + tanh u) / 2 = sigmoid(2 u)
    }
    case Function::softplus:
      return l.a * at > l.b ? x : log(one + exp(a * x)) / a;
    case Function::tanh:
      return S(2) * sigmoid(S(2) * x) - one;
    case Function::sigmoid:
      return sigmoid(x);
    case Function::hardtanh:
      return at <= l.a ? a : at >= l.b ? b : x;
    case Function::sin:
      return sin(x);
    case Function::cos:
      return cos(x);
    case Function::exp:
      return exp(x);
    case Function::expm1:
      return exp(x) - one;
    case Function::log:
      return log(x);
    case Function::log1p:
      return log(one + x);
    case Function::log_sigmoid:
      return log(sigmoid(x));
    case Function::erf:
      return one - erfc(x);
    case Function::sqrt:
    case Function::root:
      return sqrt(x);
    case Function::rsqrt:
      return one / sqrt(x);
    case Function::reciprocal:
      return one / x;
    case Function::power:
      return exp(a * log(x));
    case Function::abs:
      return at > 0 ? x : at < 0 ? -x : S(0);
    case Function::sign:
      return S(at > 0 ? 1 : at < 0 ? -1 : 0);
    case Function::clamp:
      return at < l.a ? a : at > l.b ? b : x;
    case Function::affine:
      return a * x + b;
    case Function::count:
      break;
  }
  std::abort();
}

template <class S>
S df_of(const Layer& l, S x) {
  return f_of(l, Dual<S>(x, S(1))).d;
}

inline int64_t rows_in(const Layer& l) { return l.n * l.in.h * l.in.w; }
inline int64_t count_in(const Layer& l) { return l.n * size(l.in); }
inline int64_t count_out(const Layer& l) { return l.n * size(l.out); }

/// Calls f(output element, input element) for every input that an output's window contains, channel by
/// channel.
template <class F>
void each_joined(const Layer& l, F f) {
  const Window& k = l.window;
  for (int64_t s = 0; s < l.n; ++s)
    for (int64_t i = 0; i < l.out.h; ++i)
      for (int64_t j = 0; j < l.out.w; ++j)
        for (int64_t r = i * k.stride_h - k.pad_top; r < i * k.stride_h - k.pad_top + k.kernel_h; ++r)
          for (int64_t q = j * k.stride_w - k.pad_left; q < j * k.stride_w - k.pad_left + k.kernel_w; ++q) {
            if (r < 0 || q < 0 || r >= l.in.h || q >= l.in.w) continue;
            for (int64_t ch = 0; ch < l.in.c; ++ch) {
              f(((s * l.out.h + i) * l.out.w + j) * l.in.c + ch,
                ((s * l.in.h + r) * l.in.w + q) * l.in.c + ch);
            }
          }
}

/// The input element that holds the maximum for each output element.
template <class S>
std::vector<int64_t> chosen_of(const Layer& l, const std::vector<S>& a) {
  std::vector<int64_t> chosen(count_out(l), -1);
  each_joined(l, [&](int64_t out, int64_t in) {
    const double v = value_of(a[in]);
    if (chosen[out] < 0 || v > value_of(a[chosen[out]]) || std::isnan(v)) chosen[out] = in;
  });
  return chosen;
}

template <class S>
void max_pool_reference(const Layer& l, Values<S>& v) {
  const auto chosen = chosen_of(l, v.x[0]);
  v.y.resize(count_out(l));
  v.grad_x[0].assign(count_in(l), S(0));
  for (int64_t i = 0; i < count_out(l); ++i) {
    v.y[i] = v.x[0][chosen[i]];
    v.grad_x[0][chosen[i]] += v.g[i];
  }
}

template <class S>
void avg_pool_reference(const Layer& layer, Values<S>& v) {
  Layer l = layer;
  if (l.kind == Kind::mean_pool) l.window = {l.in.h, l.in.w, 1, 1, 0, 0};
  std::vector<double> divisor(count_out(l), 0);
  each_joined(l, [&](int64_t out, int64_t) { divisor[out] += 1; });
  if (l.count_padding)
    divisor.assign(count_out(l), static_cast<double>(l.window.kernel_h * l.window.kernel_w));
  v.y.assign(count_out(l), S(0));
  v.grad_x[0].assign(count_in(l), S(0));
  each_joined(l, [&](int64_t out, int64_t in) {
    v.y[out] += v.x[0][in] / S(divisor[out]);
    v.grad_x[0][in] += v.g[out] / S(divisor[out]);
  });
}

template <class S>
void pointwise_reference(const Layer& l, Values<S>& v) {
  v.y.resize(count_in(l));
  v.grad_x[0].resize(count_in(l));
  for (int64_t i = 0; i < count_in(l); ++i) {
    v.y[i] = f_of(l, v.x[0][i]);
    v.grad_x[0][i] = df_of(l, v.x[0][i]) * v.g[i];
  }
}

/// The constants of a running_norm.
inline double running_mean(int64_t channel) { return 0.3 * static_cast<double>(channel % 5) - 0.5; }
inline double running_var(int64_t channel) { return 0.2 + 0.4 * static_cast<double>(channel % 3); }

template <class S>
void running_norm_reference(const Layer& l, Values<S>& v) {
  const int64_t count = rows_in(l) * l.in.c, c = l.in.c;
  for (auto& sums : v.grad_w) sums.assign(c, S(0));
  v.y.resize(count);
  v.grad_x[0].resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t ch = i % c;
    const S gamma = v.w[0].empty() ? S(1) : v.w[0][ch], beta = v.w[1].empty() ? S(0) : v.w[1][ch];
    const S deviation = sqrt(S(running_var(ch)) + S(l.eps));
    const S normalised = (v.x[0][i] - S(running_mean(ch))) / deviation;
    v.y[i] = gamma * normalised + beta;
    v.grad_x[0][i] = v.g[i] * gamma / deviation;
    v.grad_w[0][ch] += v.g[i] * normalised;
    v.grad_w[1][ch] += v.g[i];
  }
}

/// group_norm, by the chain rule step by step.
template <class S>
void group_norm_reference(const Layer& l, Values<S>& v) {
  const int64_t pixels = l.in.h * l.in.w, c = l.in.c, width = c / l.groups;
  const S count(static_cast<double>(width * pixels));
  v.y.resize(count_in(l));
  v.grad_x[0].resize(count_in(l));
  for (auto& sums : v.grad_w) sums.assign(c, S(0));
  for (int64_t cell = 0; cell < l.n * l.groups; ++cell) {
    const int64_t first = cell % l.groups * width;
    auto each = [&](auto f) {
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        for (int64_t ch = first; ch < first + width; ++ch) f((cell / l.groups * pixels + pixel) * c + ch, ch);
      }
    };
    auto gamma = [&](int64_t ch) { return v.w[0].empty() ? S(1) : v.w[0][ch]; };
    S mu(0), var(0), grad_mu(0), grad_var(0);
    each([&](int64_t i, int64_t) { mu += v.x[0][i] / count; });
    each([&](int64_t i, int64_t) { var += (v.x[0][i] - mu) * (v.x[0][i] - mu) / count; });
    const S deviation = sqrt(var + S(l.eps));
    each([&](int64_t i, int64_t ch) {
      const S centred = v.x[0][i] - mu, grad = v.g[i] * gamma(ch);
      v.y[i] = gamma(ch) * centred / deviation + (v.w[1].empty() ? S(0) : v.w[1][ch]);
      v.grad_w[0][ch] += v.g[i] * centred / deviation;
      v.grad_w[1][ch] += v.g[i];
      grad_mu += -grad / deviation;
      grad_var += grad * centred * S(-0.5) / (deviation * deviation * deviation);
    });
    each([&](int64_t i, int64_t ch) {
      v.grad_x[0][i] =
          v.g[i] * gamma(ch) / deviation + grad_mu / count + grad_var * S(2) * (v.x[0][i] - mu) / count;
    });
  }
}

/// batch_norm and block, by the chain rule step by step.
template <class S>
void normalise_reference(const Layer& l, Values<S>& v) {
  const int64_t m = rows_in(l), c = l.in.c;
  const S rows(static_cast<double>(m));
  std::vector<S> mu(c, S(0)), var(c, S(0)), u(m * c), a(m * c), grad_u(m * c, S(0));
  for (int64_t i = 0; i < m * c; ++i) mu[i % c] += v.x[0][i] / rows;
  for (int64_t i = 0; i < m * c; ++i) var[i % c] += (v.x[0][i] - mu[i % c]) * (v.x[0][i] - mu[i % c]) / rows;
  auto gamma = [&](int64_t ch) { return v.w[0].empty() ? S(1) : v.w[0][ch]; };
  auto beta = [&](int64_t ch) { return v.w[1].empty() ? S(0) : v.w[1][ch]; };
  const bool f = l.kind == Kind::norm_block;
  for (int64_t i = 0; i < m * c; ++i) {
    const int64_t ch = i % c;
    u[i] = gamma(ch) * (v.x[0][i] - mu[ch]) / sqrt(var[ch] + S(l.eps)) + beta(ch);
    a[i] = f ? f_of(l, u[i]) : u[i];
  }
  std::vector<int64_t> chosen(count_out(l));
  for (int64_t i = 0; i < count_out(l); ++i) chosen[i] = i;
  if (l.pooled) chosen = chosen_of(l, a);
  v.y.resize(count_out(l));
  for (int64_t i = 0; i < count_out(l); ++i) {
    v.y[i] = a[chosen[i]];
    grad_u[chosen[i]] += v.g[i];
  }
  if (f) {
    for (int64_t i = 0; i < m * c; ++i) grad_u[i] = df_of(l, u[i]) * grad_u[i];
  }
  std::vector<S> grad_mu(c, S(0)), grad_var(c, S(0));
  v.grad_w[0].assign(c, S(0));
  v.grad_w[1].assign(c, S(0));
  v.grad_x[0].resize(m * c);
  for (int64_t i = 0; i < m * c; ++i) {
    const int64_t ch = i % c;
    const S deviation = sqrt(var[ch] + S(l.eps)), centred = v.x[0][i] - mu[ch];
    v.grad_w[0][ch] += grad_u[i] * centred / deviation;
    v.grad_w[1][ch] += grad_u[i];
    grad_mu[ch] += -(grad_u[i] * gamma(ch)) / deviation;
    grad_var[ch] += grad_u[i] * gamma(ch) * centred * S(-0.5) / (deviation * deviation * deviation);
  }
  for (int64_t i = 0; i < m * c; ++i) {
    const int64_t ch = i % c;
    const S centred = v.x[0][i] - mu[ch];
    v.grad_x[0][i] = grad_u[i] * gamma(ch) / sqrt(var[ch] + S(l.eps)) + grad_mu[ch] / rows +
                     grad_var[ch] * S(2) * centred / rows;
  }
}

/// [n, rows, columns] -> [n, columns, rows]
template <class S>
std::vector<S> transposed(int64_t n, int64_t rows, int64_t columns, const std::vector<S>& in) {
  std::vector<S> out(in.size());
  for (int64_t s = 0; s < n; ++s)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        out[(s * columns + j) * rows + i] = in[(s * rows + i) * columns + j];
  return out;
}

template <class S>
void reference(const Layer& l, Values<S>& v) {
  const int64_t pixels = l.in.h * l.in.w;
  switch (l.kind) {
    case Kind::channels_last:
      v.y = transposed(l.n, l.in.c, pixels, v.x[0]);
      v.grad_x[0] = transposed(l.n, pixels, l.in.c, v.g);
      return;
    case Kind::flatten:
      v.y = transposed(l.n, pixels, l.in.c, v.x[0]);
      v.grad_x[0] = transposed(l.n, l.in.c, pixels, v.g);
      return;
    case Kind::add:
      v.y = v.x[0];
      for (size_t i = 0; i < v.y.size(); ++i) v.y[i] += v.x[1][i];
      v.grad_x[0] = v.grad_x[1] = v.g;
      return;
    case Kind::scale:
      for (const S& x : v.x[0]) v.y.push_back(S(l.a) * x);
      for (const S& g : v.g) v.grad_x[0].push_back(S(l.a) * g);
      return;
    case Kind::batch_norm:
    case Kind::norm_block:
      return normalise_reference(l, v);
    case Kind::running_norm:
      return running_norm_reference(l, v);
    case Kind::group_norm:
      return group_norm_reference(l, v);
    case Kind::pointwise:
      return pointwise_reference(l, v);
    case Kind::max_pool:
      return max_pool_reference(l, v);
    case Kind::avg_pool:
    case Kind::mean_pool:
      return avg_pool_reference(l, v);
    case Kind::append:  // test_policy.cpp, test_conv2d.cpp and test_stem.cpp
    case Kind::conv2d:
    case Kind::conv_block:
    case Kind::patch_gram:
    case Kind::stem:
    case Kind::parameter:  // computes nothing, like target and view
    case Kind::target:
    case Kind::view:
    case Kind::recurrence:  // test_recurrence.cpp
    case Kind::move:        // loop_references.h, and those that follow
    case Kind::windows:
    case Kind::map:
    case Kind::reduce:
    case Kind::extreme:
    case Kind::contract:
    case Kind::depthwise:
    case Kind::attention:
    case Kind::gather:
    case Kind::scatter:
    case Kind::sort:
    case Kind::dropout:
    case Kind::softmax:
    case Kind::log_softmax:
    case Kind::stop:
    case Kind::count:
      break;
  }
  std::abort();
}

}  // namespace maml
