// y = the largest or the smallest element of x over the axes along which y has stride 0. NaN wins. amax and
// amin save the number of equal extremes, among which they share the derivative; max and min save the place
// of the first one, the number of the iteration over those axes. The twin on the GPU is cuda/extreme.cu.
#include <cmath>

#include "cpu/implement.h"
#include "cpu/strided.h"

namespace maml::MAML_ISA {
namespace {

bool shares(const Layer& l) { return l.reduction == Reduction::amax || l.reduction == Reduction::amin; }
bool largest(const Layer& l) { return l.reduction == Reduction::amax || l.reduction == Reduction::max; }

/// The axes of y, with strides of x and y, and those that are reduced, with strides of x.
struct Axes {
  Nest<2> kept;
  Nest<1> reduced;
  explicit Axes(const Layer& l) {
    const Loops& loops = *l.loops;
    for (int a = 0; a < loops.axes; ++a) {
      const int64_t size = extent(loops, a, l.n), x = loops.x[0].stride[a], y = loops.y.stride[a];
      if (y != 0) {
        kept.append(size, {x, y});
      } else {
        reduced.append(size, {x});
      }
    }
    kept.join();
    reduced.join();
  }
  int64_t place(int64_t iteration) const { return Odometer<1>(reduced, 0, reduced.axes, iteration)[0]; }
};

/// Calls f(axes, x, y) for every element of y, at `y`, which comes from the elements of x from `x` on.
/// `apart`: f does not write to x.
template <class F>
void each_element(const Layer& l, bool apart, F f) {
  const Axes axes(l);
  const View &of_x = l.loops->x[0], &of_y = l.loops->y;
  apart |= injective(nest_of<1>(*l.loops, l.n, {&of_x}), 0);
  const int64_t count = axes.kept.iterations();
  const auto part = [&](int64_t first, int64_t last) {
    Odometer<2> at(axes.kept, 0, axes.kept.axes, first);
    for (int64_t i = first; i < last; ++i, at.next()) f(axes, of_x.offset + at[0], of_y.offset + at[1]);
  };
  const int64_t work = kElementWork * count * axes.reduced.iterations();
  apart ? share(count, 1, work, part) : part(0, count);
}

/// Calls f(iteration, place) for the elements of x that are reduced to one.
template <class F>
void each_reduced(const Axes& axes, F f) {
  const int64_t count = axes.reduced.iterations();
  Odometer<1> at(axes.reduced, 0, axes.reduced.axes);
  for (int64_t i = 0; i < count; ++i, at.next()) f(i, at[0]);
}

template <class T>
void forward(const Layer& l, const Tensors<T>& t) {
  const bool up = largest(l), counts = shares(l);
  int32_t* const chosen = choice_of(t);
  each_element(l, true, [&](const Axes& axes, int64_t x, int64_t y) {
    const T* from = t.x[0] + x;
    T best = from[0];
    int64_t first = 0, ties = 0;
    each_reduced(axes, [&](int64_t i, int64_t at) {
      const T value = from[at];
      if ((up ? value > best : value < best) || (value != value && best == best)) {
        best = value;
        first = i;
        ties = 0;
      }
      ties += value == best;
    });
    t.y[y] = best;
    chosen[y] = static_cast<int32_t>(counts ? ties : first);
  });
}

/// y = the elements of x in the places of the extremes; the mean of equal ones.
template <class T>
void apply(const Layer& l, const Tensors<T>& t, const T* from, T* to) {
  const int32_t* chosen = choice_of(t);
  if (!shares(l)) {
    each_element(l, true,
                 [&](const Axes& axes, int64_t x, int64_t y) { to[y] = from[x + axes.place(chosen[y])]; });
    return;
  }
  each_element(l, true, [&](const Axes& axes, int64_t x, int64_t y) {
    T sum = 0;
    each_reduced(axes, [&](int64_t, int64_t at) {
      if (t.x[0][x + at] == t.y[y]) sum += from[x + at];
    });
    to[y] = sum / static_cast<T>(chosen[y]);  // NaN has no equal: 0 / 0
  });
}

template <class T>
void adjoint(const Layer& l, const Tensors<T>& t, const T* g, T* grad_x) {
  if (!grad_x) return;
  if (!t.add_x[0]) set_to_zero(l.loops->x[0], l.n, grad_x);
  const int32_t* chosen = choice_of(t);
  if (!shares(l)) {
    each_element(l, false,
                 [&](const Axes& axes, int64_t x, int64_t y) { grad_x[x + axes.place(chosen[y])] += g[y]; });
    return;
  }
  each_element(l, false, [&](const Axes& axes, int64_t x, int64_t y) {
    const T extreme = t.y[y], count = static_cast<T>(chosen[y]), share = g[y] / count;
    each_reduced(axes, [&](int64_t, int64_t at) {
      const bool equal = t.x[0][x + at] == extreme;
      if (equal || count == 0) grad_x[x + at] += equal ? share : T(0) / count;
    });
  });
}

}  // namespace

template <>
struct OnCpu<Kind::extreme> {
  static Footprint footprint(const Layer& l) { return {elements(l.loops->y, l.n)}; }

  template <class T>
  static Passes<T> passes() {
    return {
        forward<T>,
        [](const Layer& l, const Tensors<T>& t) { adjoint(l, t, t.grad_y, t.grad_x[0]); },
        [](const Layer& l, const Tensors<T>& t) { apply(l, t, t.x_dot[0], t.y_dot); },
        [](const Layer& l, const Tensors<T>& t) { adjoint(l, t, t.grad_y_dot, t.grad_x_dot[0]); },
    };
  }
};
template struct Implementation<Kind::extreme>;

}  // namespace maml::MAML_ISA
