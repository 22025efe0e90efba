// The rows of softmax and log_softmax, which lie along the last axis of the loops.
#pragma once

#include "cpu/strided.h"
#include "layers/layer.h"

namespace maml::MAML_ISA {

/// A row of an operand.
template <class T, class Step>
struct Row {
  T* at;
  Step step;
  T& operator[](int64_t i) const { return at[i * step]; }
};

/// Calls f(length, x, y) for every row. x(p) and y(p) are the rows of tensors that are like the input and
/// like the output. `apart`: f writes to y only, so that rows may be computed by several threads even where
/// the loops come to an element of x twice.
template <class F>
void each_row(const Layer& l, bool apart, F f) {
  const Loops& loops = *l.loops;
  const View &of_x = loops.x[0], &of_y = loops.y;
  Nest<2> nest = nest_of<2>(loops, l.n, {&of_x, &of_y});
  apart |= injective(nest, 0);
  const int last = loops.axes - 1;
  const int64_t length = extent(loops, last, l.n);
  const int64_t x_step = of_x.stride[last], y_step = of_y.stride[last];
  if (length > 1) --nest.axes;
  const int64_t rows = nest.iterations();
  const auto run = [&](int64_t first, int64_t end, auto x_by, auto y_by) {
    Odometer<2> at(nest, 0, nest.axes, first);
    for (int64_t r = first; r < end; ++r, at.next()) {
      f(
          length, [&]<class T>(T* x) { return Row<T, decltype(x_by)>{x + of_x.offset + at[0], x_by}; },
          [&]<class T>(T* y) { return Row<T, decltype(y_by)>{y + of_y.offset + at[1], y_by}; });
    }
  };
  const auto part = [&](int64_t first, int64_t end) {
    constexpr std::integral_constant<int64_t, 1> one;
    x_step == 1 && y_step == 1 ? run(first, end, one, one) : run(first, end, x_step, y_step);
  };
  apart ? share(rows, 1, kElementWork * rows * length, part) : part(0, rows);
}

/// Prepares the cotangent of x for rows that are written one by one: where the loops do not come to each
/// element once, it is set to 0. Returns whether rows are to be added.
template <class T>
bool start_rows(const Layer& l, T* grad_x, bool add) {
  const View& of_x = l.loops->x[0];
  if (add || of_x.whole) return add;
  set_to_zero(of_x, l.n, grad_x);
  return true;
}

/// The largest element of a row; NaN where all that are not NaN are minus infinity.
template <class Row>
inline auto largest_of(int64_t length, const Row& x) {
  auto largest = x[0];
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < length; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

}  // namespace maml::MAML_ISA
