// f(u) = u where u is positive, else a u, for a = Layer::a >= 0: relu, leaky_relu, and with a = 1 nothing at
// all. y = f(u) is positive where u is, so y tells f', and f'' is zero. As in pointwise_functions.h relu
// keeps NaN, and makes 0 of minus infinity.
#pragma once

#include "cpu/simd.h"
#include "layers/layer.h"

namespace maml::MAML_ISA {

template <class T>
struct Kink {
  const T* y;
  T a;
  bool kinks;
  Kink(const Layer& l, const T* y_) : y(y_), a(static_cast<T>(l.a)), kinks(l.a != 1) {}

  Vector<T> operator()(Vector<T> u) const {
    if (a == 0) return u <= Vector<T>{} ? Vector<T>{} : u;
    return u > Vector<T>{} ? u : u * broadcast(a);
  }
  /// f' x, of what stands at element `at` of y.
  template <class L>
  Vector<T> slope(Vector<T> x, int64_t at, const L& lanes) const {
    return !kinks ? x : load(y + at, lanes) > Vector<T>{} ? x : x * broadcast(a);
  }
};

}  // namespace maml::MAML_ISA
