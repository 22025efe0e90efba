// f(u) = u where u is positive, else a u, with a = Layer::a >= 0: relu, leaky_relu, and with a = 1 the
// identity. y = f(u) is positive exactly where u is, so that f' can be computed from y; f'' is zero. As in
// layers/functions.h, relu maps NaN to NaN and minus infinity to 0.
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
  /// f' x, where y is read at element `at`.
  template <class L>
  Vector<T> slope(Vector<T> x, int64_t at, const L& lanes) const {
    return !kinks ? x : load(y + at, lanes) > Vector<T>{} ? x : x * broadcast(a);
  }
};

}  // namespace maml::MAML_ISA
