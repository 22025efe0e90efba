// The functions of one variable with their derivatives, shared by all backends: of a pointwise layer, and of
// the expression of a map. A new function is one line in the enumeration and one declaration
// (docs/adding_a_layer.md). At a kink they have torch's
// derivatives: relu'(0) = 0, leaky_relu'(0) = a, elu'(0) = a b / c, and f'' = 0.
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
  cos,
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
/// megakernel has it; and its derivatives at x. Its constants are a, b and c.
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

/// sin(x). To reduce large arguments takes CUDA local memory, which the megakernel must not use.
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

/// The functions below are those of map alone.
struct OfMap {
  static constexpr bool in_megakernel = false;
  static bool ascends(const Constants&) { return false; }
};

/// cos(x)
template <>
struct FunctionDeclaration<Function::cos> : OfMap {
  static constexpr const char* name = "cos";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T c = cos(x);
    return {c, -sin(x), -c};
  }
};

/// exp(x)
template <>
struct FunctionDeclaration<Function::exp> : OfMap {
  static constexpr const char* name = "exp";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T e = exp(x);
    return {e, e, e};
  }
};

/// exp(x) - 1
template <>
struct FunctionDeclaration<Function::expm1> : OfMap {
  static constexpr const char* name = "expm1";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T m = expm1(x);
    return {m, m + 1, m + 1};
  }
};

/// log(x)
template <>
struct FunctionDeclaration<Function::log> : OfMap {
  static constexpr const char* name = "log";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T r = 1 / x;
    return {log(x), r, -r * r};
  }
};

/// log(1 + x)
template <>
struct FunctionDeclaration<Function::log1p> : OfMap {
  static constexpr const char* name = "log1p";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T r = 1 / (1 + x);
    return {log1p(x), r, -r * r};
  }
};

/// log(sigmoid(x))
template <>
struct FunctionDeclaration<Function::log_sigmoid> : OfMap {
  static constexpr const char* name = "log_sigmoid";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T p = logistic(x);
    return {(x < 0 ? x : T(0)) - log1p(exp(x < 0 ? x : -x)), 1 - p, -p * (1 - p)};
  }
};

/// The error function
template <>
struct FunctionDeclaration<Function::erf> : OfMap {
  static constexpr const char* name = "erf";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T d = T(1.12837916709551257390) * exp(-x * x);
    return {erf(x), d, -2 * x * d};
  }
};

/// The square root
template <>
struct FunctionDeclaration<Function::sqrt> : OfMap {
  static constexpr const char* name = "sqrt";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T r = sqrt(x), d = 1 / (2 * r);
    return {r, d, -d / (2 * x)};
  }
};

/// The square root, with the derivative 0 at 0, as of a norm or a standard deviation
template <>
struct FunctionDeclaration<Function::root> : OfMap {
  static constexpr const char* name = "root";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T r = sqrt(x), d = x == 0 ? T(0) : 1 / (2 * r);
    return {r, d, x == 0 ? T(0) : -d / (2 * x)};
  }
};

/// 1 / sqrt(x)
template <>
struct FunctionDeclaration<Function::rsqrt> : OfMap {
  static constexpr const char* name = "rsqrt";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T r = 1 / sqrt(x), d = T(-0.5) * r * r * r;
    return {r, d, T(-1.5) * d * r * r};
  }
};

/// 1 / x
template <>
struct FunctionDeclaration<Function::reciprocal> : OfMap {
  static constexpr const char* name = "reciprocal";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    const T r = 1 / x;
    return {r, -r * r, 2 * r * r * r};
  }
};

/// x to the power of a number a. A derivative whose factor a or a - 1 is zero is zero everywhere.
template <>
struct FunctionDeclaration<Function::power> : OfMap {
  static constexpr const char* name = "power";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants& l, T x) {
    const T a = static_cast<T>(l.a);
    if (a == 2) return {x * x, 2 * x, T(2)};
    return {pow(x, a), a == 0 ? T(0) : a * pow(x, a - 1),
            a == 0 || a == 1 ? T(0) : a * (a - 1) * pow(x, a - 2)};
  }
};

/// |x|, with the derivative 0 at 0
template <>
struct FunctionDeclaration<Function::abs> : OfMap {
  static constexpr const char* name = "abs";
  static constexpr bool bends = false;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    return {x < 0 ? -x : x, x > 0 ? T(1) : x < 0 ? T(-1) : T(0), T(0)};
  }
};

/// 1, 0 or -1
template <>
struct FunctionDeclaration<Function::sign> : OfMap {
  static constexpr const char* name = "sign";
  static constexpr bool bends = false;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants&, T x) {
    return {x > 0 ? T(1) : x < 0 ? T(-1) : T(0), T(0), T(0)};
  }
};

/// min(max(x, a), b), with the derivative 1 at both ends, where hardtanh has 0
template <>
struct FunctionDeclaration<Function::clamp> : OfMap {
  static constexpr const char* name = "clamp";
  static constexpr bool bends = false;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants& l, T x) {
    const T a = static_cast<T>(l.a), b = static_cast<T>(l.b);
    return {x < a ? a : x > b ? b : x, x >= a && x <= b ? T(1) : T(0), T(0)};
  }
};

/// a x + b
template <>
struct FunctionDeclaration<Function::affine> : OfMap {
  static constexpr const char* name = "affine";
  static constexpr bool bends = false;
  template <class T>
  MAML_HOST_DEVICE static Derivatives<T> at(const Constants& l, T x) {
    const T a = static_cast<T>(l.a), b = static_cast<T>(l.b);
    return {a * x + b, a, T(0)};
  }
};

}  // namespace

template <Function F, class T>
MAML_HOST_DEVICE static inline Derivatives<T> evaluate(const Constants& l, T x) {
  return FunctionDeclaration<F>::at(l, x);
}

using AllFunctions = std::make_integer_sequence<int, static_cast<int>(Function::count)>;

/// f.template operator()<F>() for every function, in the order of the enumeration, as an array.
template <class Body>
constexpr auto for_each_function(Body body) {
  return [&]<int... F>(std::integer_sequence<int, F...>) {
    return std::array{body.template operator()<static_cast<Function>(F)>()...};
  }(AllFunctions());
}

/// body.template operator()<F>() for the layer's function.
template <class Body, int... F>
MAML_HOST_DEVICE static inline void with_one_of(Function f, Body& body, std::integer_sequence<int, F...>) {
  static_cast<void>(
      ((f == static_cast<Function>(F) ? (body.template operator()<static_cast<Function>(F)>(), true)
                                      : false) ||
       ...));
}
template <class Body>
MAML_HOST_DEVICE static inline void with_function(Function f, Body body) {
  with_one_of(f, body, AllFunctions());
}

}  // namespace maml
