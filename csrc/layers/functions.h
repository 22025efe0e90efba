// The functions of one variable with their derivatives, shared by all backends. Those of a pointwise layer
// are declared here, those of maps alone in map_functions.h. A new function is one line in the enumeration
// and one declaration (docs/adding_a_layer.md). At a kink they have torch's derivatives: relu'(0) = 0,
// leaky_relu'(0) = a, elu'(0) = a b / c, and f'' = 0.
#pragma once

#include <array>
#include <cmath>
#include <utility>

#include "layers/layer.h"

#ifdef __CUDACC__
#define MAML_HOST_DEVICE __host__ __device__
#else
#define MAML_HOST_DEVICE
#endif

namespace maml {

enum class Function : int {
  relu,
  leaky_relu,
  elu,
  silu,
  gelu,
  gelu_tanh,
  softplus,
  tanh,
  sigmoid,
  hardtanh,
  sin,
  of_maps,  // from here on, functions that a pointwise layer does not have
  cos = of_maps,
  exp,
  expm1,
  log,
  log1p,
  log_sigmoid,
  erf,
  sqrt,
  root,
  rsqrt,
  reciprocal,
  power,
  abs,
  sign,
  clamp,
  affine,
  count
};

/// f, f' and f'' at one point.
template <class T>
struct Derivatives {
  T f, df, ddf;
};

// Internal linkage: each instruction set of the CPU backend compiles its own copy.
namespace {

// Elementary functions are called by their names alone: T may be a type that has its own.
using std::acos, std::acosh, std::asin, std::asinh, std::atan, std::atanh, std::cbrt, std::cos, std::cosh,
    std::erf, std::erfc, std::exp, std::exp2, std::expm1, std::log, std::log10, std::log1p, std::log2,
    std::pow, std::sin, std::sinh, std::sqrt, std::tan, std::tanh;

/// The declaration of a function: its name in plans; `bends`, whether f'' is not identically zero; `ascends`,
/// whether f is non-decreasing, so that a max-pool may come before it; `in_megakernel`, whether the CUDA
/// megakernel and the stem's kernels have it; and its derivatives at x. Its constants are a, b and c.
template <Function F>
struct FunctionDeclaration;

template <class T>
MAML_HOST_DEVICE static inline T logistic(T x) {  // never overflows
  if (x >= 0) return 1 / (1 + exp(-x));
  const T e = exp(x);
  return e / (1 + e);
}

/// max(x, 0)
template <>
struct FunctionDeclaration<Function::relu> {
  static constexpr const char* name = "relu";
  static constexpr bool bends = false;
  static constexpr bool in_megakernel = true;
  static bool ascends(const Constants&) { return true; }
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    return {x > 0 || x != x ? x : T(0), x > 0 ? T(1) : T(0), T(0)};
  }
};

/// x > 0 ? x : a x
template <>
struct FunctionDeclaration<Function::leaky_relu> {
  static constexpr const char* name = "leaky_relu";
  static constexpr bool bends = false;
  static constexpr bool in_megakernel = true;
  static bool ascends(const Constants& l) { return l.a >= 0; }
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants& l, T x) {
    const T a = static_cast<T>(l.a);
    return {x > 0 ? x : a * x, x > 0 ? T(1) : a, T(0)};
  }
};

/// x > 0 ? b x : b a (exp(x / c) - 1). ELU: b = c = 1; SELU: c = 1; CELU: a = c
template <>
struct FunctionDeclaration<Function::elu> {
  static constexpr const char* name = "elu";
  static constexpr bool bends = true;
  static constexpr bool in_megakernel = true;
  static bool ascends(const Constants& l) { return l.a >= 0 && l.b >= 0 && l.c > 0; }
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants& l, T x) {
    const T a = static_cast<T>(l.a), b = static_cast<T>(l.b), c = static_cast<T>(l.c);
    if (x > 0) return {b * x, b, T(0)};
    const T e = b * a * exp(x / c);
    return {b * a * expm1(x / c), e / c, x == 0 ? T(0) : e / (c * c)};
  }
};

/// x sigmoid(x)
template <>
struct FunctionDeclaration<Function::silu> {
  static constexpr const char* name = "silu";
  static constexpr bool bends = true;
  static constexpr bool in_megakernel = true;
  static bool ascends(const Constants&) { return false; }
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T p = logistic(x), q = p * (1 - p);
    return {x * p, p + x * q, q * (2 + x * (1 - 2 * p))};
  }
};

/// x Phi(x), Phi the distribution function of the normal distribution
template <>
struct FunctionDeclaration<Function::gelu> {
  static constexpr const char* name = "gelu";
  static constexpr bool bends = true;
  static constexpr bool in_megakernel = true;
  static bool ascends(const Constants&) { return false; }
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T cdf = erfc(-x * T(0.70710678118654752440)) / 2;
    const T pdf = T(0.39894228040143267794) * exp(-x * x / 2);
    return {x * cdf, cdf + x * pdf, pdf * (2 - x * x)};
  }
};

/// gelu's approximation by tanh
template <>
struct FunctionDeclaration<Function::gelu_tanh> {
  static constexpr const char* name = "gelu_tanh";
  static constexpr bool bends = true;
  static constexpr bool in_megakernel = true;
  static bool ascends(const Constants&) { return false; }
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T k = T(0.79788456080286535588), q = T(0.044715);
    const T u = k * (x + q * x * x * x), du = k * (1 + 3 * q * x * x), ddu = 6 * k * q * x;
    const T h = tanh(u), dh = 1 - h * h;
    return {x * (1 + h) / 2, (1 + h) / 2 + x * dh * du / 2, dh * du + x * dh * (ddu - 2 * h * du * du) / 2};
  }
};

/// log(1 + exp(a x)) / a, and x where a x > b, as in torch; at that threshold f falls by ln(1 + exp(-b)) / a
template <>
struct FunctionDeclaration<Function::softplus> {
  static constexpr const char* name = "softplus";
  static constexpr bool bends = true;
  static constexpr bool in_megakernel = true;
  static bool ascends(const Constants& l) { return l.a > 0 && l.b >= 20; }
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants& l, T x) {
    const T a = static_cast<T>(l.a), b = static_cast<T>(l.b);
    if (a * x > b) return {x, T(1), T(0)};
    const T p = logistic(a * x);
    return {log1p(exp(a * x)) / a, p, a * x == b ? T(0) : a * p * (1 - p)};
  }
};

/// tanh(x)
template <>
struct FunctionDeclaration<Function::tanh> {
  static constexpr const char* name = "tanh";
  static constexpr bool bends = true;
  static constexpr bool in_megakernel = true;
  static bool ascends(const Constants&) { return true; }
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T h = tanh(x), dh = 1 - h * h;
    return {h, dh, -2 * h * dh};
  }
};

/// 1 / (1 + exp(-x))
template <>
struct FunctionDeclaration<Function::sigmoid> {
  static constexpr const char* name = "sigmoid";
  static constexpr bool bends = true;
  static constexpr bool in_megakernel = true;
  static bool ascends(const Constants&) { return true; }
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T p = logistic(x), dp = p * (1 - p);
    return {p, dp, dp * (1 - 2 * p)};
  }
};

/// min(max(x, a), b): also ReLU6
template <>
struct FunctionDeclaration<Function::hardtanh> {
  static constexpr const char* name = "hardtanh";
  static constexpr bool bends = false;
  static constexpr bool in_megakernel = true;
  static bool ascends(const Constants&) { return true; }
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants& l, T x) {
    const T a = static_cast<T>(l.a), b = static_cast<T>(l.b);
    return {x < a ? a : x > b ? b : x, x > a && x < b ? T(1) : T(0), T(0)};
  }
};

/// sin(x). To reduce large arguments takes CUDA local memory, which kernels with several functions must not
/// use.
template <>
struct FunctionDeclaration<Function::sin> {
  static constexpr const char* name = "sin";
  static constexpr bool bends = true;
  static constexpr bool in_megakernel = false;
  static bool ascends(const Constants&) { return false; }
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T s = sin(x);
    return {s, cos(x), -s};
  }
};

}  // namespace

template <Function F, class T>
MAML_HOST_DEVICE static inline Derivatives<T> evaluate(const Constants& l, T x) {
  return FunctionDeclaration<F>::at(l, x);
}

/// body.template operator()<F>() for one function.
template <class Body, int... F>
MAML_HOST_DEVICE static inline void with_one_of(Function f, Body& body, std::integer_sequence<int, F...>) {
  static_cast<void>(
      ((f == static_cast<Function>(F) ? (body.template operator()<static_cast<Function>(F)>(), true)
                                      : false) ||
       ...));
}

/// body.template operator()<F>() for the function of a pointwise layer.
template <class Body>
MAML_HOST_DEVICE static inline void with_activation(Function f, Body body) {
  with_one_of(f, body, std::make_integer_sequence<int, static_cast<int>(Function::of_maps)>());
}

}  // namespace maml
