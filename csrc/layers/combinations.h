// The functions of several variables of a map's expression, with their derivatives, shared by all backends. A
// new one is one line in the enumeration and one declaration. At a tie and at a kink they have torch's
// derivatives.
#pragma once

#include <functional>

#include "layers/map_functions.h"

namespace maml {

enum class Combination : int {
  add,
  sub,
  mul,
  div,
  pow,
  atan2,
  maximum,
  minimum,
  eq,
  ne,
  lt,
  le,
  gt,
  ge,
  where,
  count
};

/// f(x, y) with its first and second partial derivatives.
template <class T>
struct Partials {
  T f, fx, fy, fxx, fxy, fyy;
};

namespace {

/// The declaration of a combination: its name in plans; `bends`, whether a second derivative is not
/// identically zero; and its derivatives at (x, y).
template <Combination C>
struct CombinationDeclaration;

/// x + y
template <>
struct CombinationDeclaration<Combination::add> {
  static constexpr const char* name = "add";
  static constexpr bool bends = false;
  template <class T>
  MAML_HOST_DEVICE static Partials<T> at(T x, T y) {
    return {x + y, T(1), T(1), T(0), T(0), T(0)};
  }
};

/// x - y
template <>
struct CombinationDeclaration<Combination::sub> {
  static constexpr const char* name = "sub";
  static constexpr bool bends = false;
  template <class T>
  MAML_HOST_DEVICE static Partials<T> at(T x, T y) {
    return {x - y, T(1), T(-1), T(0), T(0), T(0)};
  }
};

/// x y
template <>
struct CombinationDeclaration<Combination::mul> {
  static constexpr const char* name = "mul";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Partials<T> at(T x, T y) {
    return {x * y, y, x, T(0), T(1), T(0)};
  }
};

/// x / y
template <>
struct CombinationDeclaration<Combination::div> {
  static constexpr const char* name = "div";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Partials<T> at(T x, T y) {
    const T r = 1 / y, q = x / y;
    return {q, r, -q * r, T(0), -r * r, 2 * q * r * r};
  }
};

/// x to the power of y. A derivative whose factor is y = 0 or x = 0, y >= 0 is zero, as in torch.
template <>
struct CombinationDeclaration<Combination::pow> {
  static constexpr const char* name = "pow";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Partials<T> at(T x, T y) {
    const T f = std::pow(x, y), lower = std::pow(x, y - 1);
    const bool flat = x == 0 && y >= 0;
    const T log = flat ? T(0) : std::log(x);
    return {f,
            y == 0 ? T(0) : y * lower,
            flat ? T(0) : f * log,
            y == 0 || y == 1 ? T(0) : y * (y - 1) * std::pow(x, y - 2),
            flat ? T(0) : lower * (1 + y * log),
            flat ? T(0) : f * log * log};
  }
};

/// The angle of (y, x), as torch.atan2(x, y) names its arguments
template <>
struct CombinationDeclaration<Combination::atan2> {
  static constexpr const char* name = "atan2";
  static constexpr bool bends = true;
  template <class T>
  MAML_HOST_DEVICE static Partials<T> at(T x, T y) {
    const T r = 1 / (x * x + y * y), fx = y * r, fy = -x * r;
    return {std::atan2(x, y), fx, fy, -2 * x * fx * r, r - 2 * y * fx * r, -2 * y * fy * r};
  }
};

/// The larger one; a tie halves the derivative
template <>
struct CombinationDeclaration<Combination::maximum> {
  static constexpr const char* name = "maximum";
  static constexpr bool bends = false;
  template <class T>
  MAML_HOST_DEVICE static Partials<T> at(T x, T y) {
    const T fx = x > y ? T(1) : x == y ? T(0.5) : T(0), fy = y > x ? T(1) : x == y ? T(0.5) : T(0);
    return {x > y || x != x ? x : y, fx, fy, T(0), T(0), T(0)};
  }
};

/// The smaller one; a tie halves the derivative
template <>
struct CombinationDeclaration<Combination::minimum> {
  static constexpr const char* name = "minimum";
  static constexpr bool bends = false;
  template <class T>
  MAML_HOST_DEVICE static Partials<T> at(T x, T y) {
    const T fx = x < y ? T(1) : x == y ? T(0.5) : T(0), fy = y < x ? T(1) : x == y ? T(0.5) : T(0);
    return {x < y || x != x ? x : y, fx, fy, T(0), T(0), T(0)};
  }
};

/// A comparison: 1 if it holds, otherwise 0; its derivatives are zero.
template <class Holds>
struct Comparison {
  static constexpr bool bends = false;
  template <class T>
  MAML_HOST_DEVICE static Partials<T> at(T x, T y) {
    return {Holds()(x, y) ? T(1) : T(0), T(0), T(0), T(0), T(0), T(0)};
  }
};
template <>
struct CombinationDeclaration<Combination::eq> : Comparison<std::equal_to<>> {
  static constexpr const char* name = "eq";
};
template <>
struct CombinationDeclaration<Combination::ne> : Comparison<std::not_equal_to<>> {
  static constexpr const char* name = "ne";
};
template <>
struct CombinationDeclaration<Combination::lt> : Comparison<std::less<>> {
  static constexpr const char* name = "lt";
};
template <>
struct CombinationDeclaration<Combination::le> : Comparison<std::less_equal<>> {
  static constexpr const char* name = "le";
};
template <>
struct CombinationDeclaration<Combination::gt> : Comparison<std::greater<>> {
  static constexpr const char* name = "gt";
};
template <>
struct CombinationDeclaration<Combination::ge> : Comparison<std::greater_equal<>> {
  static constexpr const char* name = "ge";
};

/// where(condition, x, y) has three arguments, so that each backend has it beside the table: x where the
/// condition is not 0, otherwise y. Its derivatives are those of the one that is taken.
template <>
struct CombinationDeclaration<Combination::where> {
  static constexpr const char* name = "where";
  static constexpr bool bends = false;
  template <class T>
  MAML_HOST_DEVICE static Partials<T> at(T, T) {
    return {};
  }
};

}  // namespace

using AllCombinations = std::make_integer_sequence<int, static_cast<int>(Combination::count)>;

/// f.template operator()<C>() for every combination, in the order of the enumeration, as an array.
template <class Body>
constexpr auto for_each_combination(Body body) {
  return [&]<int... C>(std::integer_sequence<int, C...>) {
    return std::array{body.template operator()<static_cast<Combination>(C)>()...};
  }(AllCombinations());
}

/// body.template operator()<C>() for one combination.
template <class Body, int... C>
MAML_HOST_DEVICE static inline void with_one_of(Combination c, Body& body, std::integer_sequence<int, C...>) {
  static_cast<void>(
      ((c == static_cast<Combination>(C) ? (body.template operator()<static_cast<Combination>(C)>(), true)
                                         : false) ||
       ...));
}
template <class Body>
MAML_HOST_DEVICE static inline void with_combination(Combination c, Body body) {
  with_one_of(c, body, AllCombinations());
}

}  // namespace maml
