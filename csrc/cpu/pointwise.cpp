// y = f(x), element by element, for every f of Function. With g = grad_y:
//   grad_x = f'(x) g,   y_dot = f'(x) x_dot,   grad_x_dot = f'(x) g_dot + f''(x) g x_dot.
// A kink takes the side that torch takes: relu'(0) = 0, leaky_relu'(0) = a, and f'' = 0 there.
#include <cmath>

#include "layers.h"

namespace maml::MAML_ISA {
namespace {

/// f, f' and f'' at one point.
template <class T>
struct Derivatives {
  T f, df, ddf;
};

template <class T>
T logistic(T x) {  // never overflows
  if (x >= 0) return 1 / (1 + std::exp(-x));
  const T e = std::exp(x);
  return e / (1 + e);
}

template <Function F, class T>
Derivatives<T> evaluate(const Layer& l, T x) {
  const T a = static_cast<T>(l.a), b = static_cast<T>(l.b), c = static_cast<T>(l.c);
  if constexpr (F == Function::relu) {
    return {x > 0 || x != x ? x : T(0), x > 0 ? T(1) : T(0), T(0)};
  } else if constexpr (F == Function::leaky_relu) {
    return {x > 0 ? x : a * x, x > 0 ? T(1) : a, T(0)};
  } else if constexpr (F == Function::elu) {
    if (x > 0) return {b * x, b, T(0)};
    const T e = b * a * std::exp(x / c);
    return {b * a * std::expm1(x / c), e / c, e / (c * c)};
  } else if constexpr (F == Function::silu) {
    const T p = logistic(x), q = p * (1 - p);
    return {x * p, p + x * q, q * (2 + x * (1 - 2 * p))};
  } else if constexpr (F == Function::gelu) {
    const T cdf = std::erfc(-x * T(0.70710678118654752440)) / 2;
    const T pdf = T(0.39894228040143267794) * std::exp(-x * x / 2);
    return {x * cdf, cdf + x * pdf, pdf * (2 - x * x)};
  } else if constexpr (F == Function::gelu_tanh) {
    const T k = T(0.79788456080286535588), q = T(0.044715);
    const T u = k * (x + q * x * x * x), du = k * (1 + 3 * q * x * x), ddu = 6 * k * q * x;
    const T h = std::tanh(u), dh = 1 - h * h;
    return {x * (1 + h) / 2, (1 + h) / 2 + x * dh * du / 2, dh * du + x * dh * (ddu - 2 * h * du * du) / 2};
  } else if constexpr (F == Function::softplus) {
    if (a * x > b) return {x, T(1), T(0)};
    const T p = logistic(a * x);
    return {std::log1p(std::exp(a * x)) / a, p, a * p * (1 - p)};
  } else if constexpr (F == Function::tanh) {
    const T h = std::tanh(x), dh = 1 - h * h;
    return {h, dh, -2 * h * dh};
  } else if constexpr (F == Function::sigmoid) {
    const T p = logistic(x), dp = p * (1 - p);
    return {p, dp, dp * (1 - 2 * p)};
  } else {  // hardtanh
    return {x < a ? a : x > b ? b : x, x > a && x < b ? T(1) : T(0), T(0)};
  }
}

/// body.template operator()<F>() for the layer's function.
template <class Body>
void with_function(Function f, Body body) {
  switch (f) {
    case Function::relu:
      return body.template operator()<Function::relu>();
    case Function::leaky_relu:
      return body.template operator()<Function::leaky_relu>();
    case Function::elu:
      return body.template operator()<Function::elu>();
    case Function::silu:
      return body.template operator()<Function::silu>();
    case Function::gelu:
      return body.template operator()<Function::gelu>();
    case Function::gelu_tanh:
      return body.template operator()<Function::gelu_tanh>();
    case Function::softplus:
      return body.template operator()<Function::softplus>();
    case Function::tanh:
      return body.template operator()<Function::tanh>();
    case Function::sigmoid:
      return body.template operator()<Function::sigmoid>();
    case Function::hardtanh:
      return body.template operator()<Function::hardtanh>();
  }
}

template <class T>
void put(T* to, int64_t i, T value, bool add) {
  to[i] = add ? to[i] + value : value;
}

template <class T>
void forward(const Layer& layer, const Tensors<T>& t) {
  const int64_t count = layer.n * size(layer.in);
  with_function(layer.function, [&]<Function F>() {
    const Layer l = layer;
    const T* __restrict x = t.x[0];
    T* __restrict y = t.y;
    for (int64_t i = 0; i < count; ++i) y[i] = evaluate<F, T>(l, x[i]).f;
  });
}

template <class T>
void backward(const Layer& layer, const Tensors<T>& t) {
  if (!t.grad_x[0]) return;
  const int64_t count = layer.n * size(layer.in);
  const bool add = t.add_x[0];
  with_function(layer.function, [&]<Function F>() {
    const Layer l = layer;
    const T* __restrict x = t.x[0], * __restrict g = t.grad_y;
    T* __restrict grad_x = t.grad_x[0];
    for (int64_t i = 0; i < count; ++i) put(grad_x, i, evaluate<F, T>(l, x[i]).df * g[i], add);
  });
}

template <class T>
void forward_tangent(const Layer& layer, const Tensors<T>& t) {
  const int64_t count = layer.n * size(layer.in);
  with_function(layer.function, [&]<Function F>() {
    const Layer l = layer;
    const T* __restrict x = t.x[0], * __restrict x_dot = t.x_dot[0];
    T* __restrict y_dot = t.y_dot;
    for (int64_t i = 0; i < count; ++i) y_dot[i] = evaluate<F, T>(l, x[i]).df * x_dot[i];
  });
}

template <class T>
void backward_tangent(const Layer& layer, const Tensors<T>& t) {
  if (!t.grad_x_dot[0]) return;
  const int64_t count = layer.n * size(layer.in);
  const bool add = t.add_x[0];
  with_function(layer.function, [&]<Function F>() {
    const Layer l = layer;
    const T* __restrict x = t.x[0], * __restrict g = t.grad_y;
    const T* __restrict x_dot = t.x_dot[0], * __restrict g_dot = t.grad_y_dot;
    T* __restrict grad_x_dot = t.grad_x_dot[0];
    if (!x_dot) {  // the layer does not move
      for (int64_t i = 0; i < count; ++i) put(grad_x_dot, i, evaluate<F, T>(l, x[i]).df * g_dot[i], add);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const Derivatives<T> d = evaluate<F, T>(l, x[i]);
      put(grad_x_dot, i, d.df * g_dot[i] + d.ddf * g[i] * x_dot[i], add);
    }
  });
}

}  // namespace

template <>
Passes<float> pointwise<float>() {
  return {forward<float>, backward<float>, forward_tangent<float>, backward_tangent<float>};
}
template <>
Passes<double> pointwise<double>() {
  return {forward<double>, backward<double>, forward_tangent<double>, backward_tangent<double>};
}

}  // namespace maml::MAML_ISA
