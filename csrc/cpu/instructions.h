// The instructions of a map's expression, each in one loop over a block of elements: the value and, where
// they are wanted, its tangent, its slopes (the partial derivatives by its arguments) and their tangents.
#pragma once

#include <algorithm>
#include <array>

#include "cpu/function_loop.h"
#include "layers/loops.h"

namespace maml::MAML_ISA {

/// Whether all slopes are the same number everywhere, and then that number.
inline bool has_constant_slopes(const ExpressionStep& s) {
  if (s.unary) return s.function == Function::affine || s.function == Function::sign;
  return s.combination == Combination::add || s.combination == Combination::sub ||
         is_comparison(s.combination);
}
inline double constant_slope(const ExpressionStep& s, int argument) {
  if (is_flat(s)) return 0;
  return s.unary ? s.constants.a : s.combination == Combination::sub && argument == 1 ? -1 : 1;
}
/// Whether each slope is the other argument.
inline bool is_product(const ExpressionStep& s) { return !s.unary && s.combination == Combination::mul; }

/// Whether a slope has a tangent.
inline bool bends(const ExpressionStep& s) {
  static constexpr auto functions =
      for_each_function([]<Function F> { return FunctionDeclaration<F>::bends; });
  static constexpr auto combinations =
      for_each_combination([]<Combination C> { return CombinationDeclaration<C>::bends; });
  return s.unary ? functions[static_cast<size_t>(s.function)]
                 : combinations[static_cast<size_t>(s.combination)];
}

/// What an instruction reads and writes of a block of elements. x_dot, slope and slope_dot are of the
/// arguments that have a derivative.
template <class T>
struct Block {
  int64_t count;
  const T *x[3], *x_dot[2];
  T *y, *y_dot, *slope[2], *slope_dot[2];
};

template <class T>
using Instruction = void (*)(const ExpressionStep&, const Block<T>&);

namespace instructions {

/// Element i, computed in numbers of type N. Moving: the set of arguments with a tangent, as bits. If there
/// is one, the tangents are computed.
template <class N, Function F, bool Slopes, int Moving, class T>
inline void one(const Constants& constants, const Block<T>& b, int64_t i) {
  constexpr bool kSelects = selects(F);
  const Derivatives<N> d = evaluate<F, N>(constants, b.x[0][i]);
  b.y[i] = plain(d.f);
  if constexpr (Moving != 0) b.y_dot[i] = times<kSelects>(plain(d.df), b.x_dot[0][i]);
  if constexpr (Slopes) b.slope[0][i] = plain(d.df);
  if constexpr (Slopes && Moving != 0 && FunctionDeclaration<F>::bends) {
    b.slope_dot[0][i] = plain(d.ddf) * b.x_dot[0][i];
  }
}

template <class T, Function F, bool Slopes, int Moving>
void of_function(const ExpressionStep& s, const Block<T>& block) {
  const Block<T> b = block;
  const Constants constants = s.constants;
  each_element<F>(b.x[0], 0, b.count,
                  [&]<class N>(N, int64_t i) { one<N, F, Slopes, Moving>(constants, b, i); });
}

template <class T, Combination C, bool Slopes, int Moving>
void of_combination(const ExpressionStep&, const Block<T>& b) {
  constexpr bool kBends = CombinationDeclaration<C>::bends, kSelects = selects(C);
  constexpr bool kFirst = Moving & 1, kSecond = Moving & 2;
  const T *x0 = b.x[0], *x1 = b.x[1], *x0_dot = b.x_dot[0], *x1_dot = b.x_dot[1];
  T *y = b.y, *y_dot = b.y_dot, *slope0 = b.slope[0], *slope1 = b.slope[1], *slope0_dot = b.slope_dot[0],
    *slope1_dot = b.slope_dot[1];
#pragma omp simd
  for (int64_t i = 0; i < b.count; ++i) {
    const Partials<T> d = CombinationDeclaration<C>::at(x0[i], x1[i]);
    y[i] = d.f;
    T dot = 0, dot0 = 0, dot1 = 0;
    if constexpr (kFirst) {
      dot += times<kSelects>(d.fx, x0_dot[i]), dot0 += d.fxx * x0_dot[i], dot1 += d.fxy * x0_dot[i];
    }
    if constexpr (kSecond) {
      dot += times<kSelects>(d.fy, x1_dot[i]), dot0 += d.fxy * x1_dot[i], dot1 += d.fyy * x1_dot[i];
    }
    if constexpr (Moving != 0) y_dot[i] = dot;
    if constexpr (Slopes) slope0[i] = d.fx, slope1[i] = d.fy;
    if constexpr (Slopes && Moving != 0 && kBends) slope0_dot[i] = dot0, slope1_dot[i] = dot1;
  }
}

template <class T, bool Slopes, int Moving>
void where(const ExpressionStep&, const Block<T>& b) {
  constexpr bool kFirst = Moving & 1, kSecond = Moving & 2;
  const T *condition = b.x[0], *x0 = b.x[1], *x1 = b.x[2], *x0_dot = b.x_dot[0], *x1_dot = b.x_dot[1];
  T *y = b.y, *y_dot = b.y_dot, *slope0 = b.slope[0], *slope1 = b.slope[1];
#pragma omp simd
  for (int64_t i = 0; i < b.count; ++i) {
    const bool first = condition[i] != 0;
    y[i] = first ? x0[i] : x1[i];
    if constexpr (Moving != 0) y_dot[i] = first ? (kFirst ? x0_dot[i] : T(0)) : kSecond ? x1_dot[i] : T(0);
    if constexpr (Slopes) slope0[i] = first ? T(1) : T(0), slope1[i] = first ? T(0) : T(1);
  }
}

/// The variants of an instruction: with or without slopes, for each set of moving arguments.
template <class T>
using Variants = std::array<std::array<Instruction<T>, 4>, 2>;

template <class T, Function F>
constexpr Variants<T> variants_of_function() {
  return {{{of_function<T, F, false, 0>, of_function<T, F, false, 1>},
           {of_function<T, F, true, 0>, of_function<T, F, true, 1>}}};
}
template <class T, Combination C, bool Slopes, int Moving>
constexpr Instruction<T> variant() {
  if constexpr (C == Combination::where) return where<T, Slopes, Moving>;
  return of_combination<T, C, Slopes, Moving>;
}
template <class T, Combination C>
constexpr Variants<T> variants_of_combination() {
  return {{{variant<T, C, false, 0>(), variant<T, C, false, 1>(), variant<T, C, false, 2>(),
            variant<T, C, false, 3>()},
           {variant<T, C, true, 0>(), variant<T, C, true, 1>(), variant<T, C, true, 2>(),
            variant<T, C, true, 3>()}}};
}

}  // namespace instructions

template <class T>
Instruction<T> instruction_of(const ExpressionStep& s, bool slopes, int moving) {
  static constexpr auto functions =
      for_each_function([]<Function F> { return instructions::variants_of_function<T, F>(); });
  static constexpr auto combinations =
      for_each_combination([]<Combination C> { return instructions::variants_of_combination<T, C>(); });
  const auto& variants =
      s.unary ? functions[static_cast<size_t>(s.function)] : combinations[static_cast<size_t>(s.combination)];
  return variants[slopes][static_cast<size_t>(moving)];
}

}  // namespace maml::MAML_ISA
