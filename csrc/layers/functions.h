// The functions of a pointwise layer with their derivatives, once for every backend. A kink takes the side
// that torch takes: relu'(0) = 0, leaky_relu'(0) = a, elu'(0) = a b / c, and f'' = 0 there. All functions are
// static: each instruction set of the CPU backend compiles its own.
#pragma once

#include <cmath>

#include "layers/layer.h"

#ifdef __CUDACC__
#define MAML_HOST_DEVICE __host__ __device__
#else
#define MAML_HOST_DEVICE
#endif

namespace maml {

/// Whether f'' is anything but zero.
MAML_HOST_DEVICE static constexpr bool bends(Function f) {
  return f != Function::relu && f != Function::leaky_relu && f != Function::hardtanh;
}

/// f, f' and f'' at one point.
template <class T>
struct Derivatives {
  T f, df, ddf;
};

/// Whether a larger x never gives a smaller f(x): then a max-pool may as well come before f.
static inline bool ascends(const Layer& f) {
  switch (f.function) {
    case Function::silu:
    case Function::gelu:
    case Function::gelu_tanh:
      return false;
    case Function::leaky_relu:
      return f.a >= 0;
    case Function::elu:
      return f.a >= 0 && f.b >= 0 && f.c > 0;
    case Function::softplus:
      return f.a > 0 && f.b >= 20;  // at the threshold b it falls by ln(1 + exp(-b)) / a
    default:
      return true;
  }
}

template <class T>
MAML_HOST_DEVICE static inline T logistic(T x) {  // never overflows
  if (x >= 0) return 1 / (1 + std::exp(-x));
  const T e = std::exp(x);
  return e / (1 + e);
}

template <Function F, class T>
MAML_HOST_DEVICE static inline Derivatives<T> evaluate(const Layer& l, T x) {
  const T a = static_cast<T>(l.a), b = static_cast<T>(l.b), c = static_cast<T>(l.c);
  if constexpr (F == Function::relu) {
    return {x > 0 || x != x ? x : T(0), x > 0 ? T(1) : T(0), T(0)};
  } else if constexpr (F == Function::leaky_relu) {
    return {x > 0 ? x : a * x, x > 0 ? T(1) : a, T(0)};
  } else if constexpr (F == Function::elu) {
    if (x > 0) return {b * x, b, T(0)};
    const T e = b * a * std::exp(x / c);
    return {b * a * std::expm1(x / c), e / c, x == 0 ? T(0) : e / (c * c)};
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
    return {std::log1p(std::exp(a * x)) / a, p, a * x == b ? T(0) : a * p * (1 - p)};
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
MAML_HOST_DEVICE static inline void with_function(Function f, Body body) {
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

}  // namespace maml
