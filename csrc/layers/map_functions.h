// The functions of one variable that only the expression of a map has, and the table of all functions.
#pragma once

#include "layers/functions.h"

namespace maml {
namespace {

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

using AllFunctions = std::make_integer_sequence<int, static_cast<int>(Function::count)>;

/// f.template operator()<F>() for every function, in the order of the enumeration, as an array.
template <class Body>
constexpr auto for_each_function(Body body) {
  return [&]<int... F>(std::integer_sequence<int, F...>) {
    return std::array{body.template operator()<static_cast<Function>(F)>()...};
  }(AllFunctions());
}

/// body.template operator()<F>() for any function.
template <class Body>
MAML_HOST_DEVICE static inline void with_function(Function f, Body body) {
  with_one_of(f, body, AllFunctions());
}

}  // namespace maml
