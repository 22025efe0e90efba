// log_softmax over the last axis (the formulas are in layers/log_softmax.h). The largest element is
// subtracted first, so that nothing overflows. The twin on the GPU is cuda/log_softmax.cu.
#include <cmath>

#include "cpu/implement.h"
#include "cpu/softmax_rows.h"
#include "cpu/vector_math.h"

namespace maml::MAML_ISA {
namespace {

template <class T>
void forward(const Layer& l, const Tensors<T>& t) {
  each_row(l, true, [&](int64_t length, auto of_x, auto of_y) {
    const auto x = of_x(t.x[0]);
    const auto y = of_y(t.y);
    const T largest = largest_of(length, x);
    const T sum = sum_of<T>(length, [=](int64_t i) { return exp_of(x[i] - largest); });
    const T log_sum = std::log(sum);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) y[i] = (x[i] - largest) - log_sum;
  });
}

template <class T>
void backward(const Layer& l, const Tensors<T>& t) {
  if (!t.grad_x[0]) return;
  const bool add = start_rows(l, t.grad_x[0], t.add_x[0]);
  each_row(l, false, [&](int64_t length, auto of_x, auto of_y) {
    const auto y = of_y(t.y);
    const auto g = of_y(t.grad_y);
    const auto to = of_x(t.grad_x[0]);
    const T sum = sum_of<T>(length, [=](int64_t i) { return g[i]; });
    put_row(length, to.at, to.step, add, [=](int64_t i) { return g[i] - exp_of(y[i]) * sum; });
  });
}

template <class T>
void forward_tangent(const Layer& l, const Tensors<T>& t) {
  each_row(l, true, [&](int64_t length, auto of_x, auto of_y) {
    const auto y = of_y(t.y);
    const auto x_dot = of_x(t.x_dot[0]);
    const auto y_dot = of_y(t.y_dot);
    const T mean = sum_of<T>(length, [=](int64_t i) { return exp_of(y[i]) * x_dot[i]; });
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) y_dot[i] = x_dot[i] - mean;
  });
}

template <class T>
void backward_tangent(const Layer& l, const Tensors<T>& t) {
  if (!t.grad_x_dot[0]) return;
  const bool add = start_rows(l, t.grad_x_dot[0], t.add_x[0]);
  const bool bends = t.x_dot[0] && t.grad_y;
  each_row(l, false, [&](int64_t length, auto of_x, auto of_y) {
    const auto y = of_y(t.y);
    const auto g_dot = of_y(t.grad_y_dot);
    const auto to = of_x(t.grad_x_dot[0]);
    const T sum_dot = sum_of<T>(length, [=](int64_t i) { return g_dot[i]; });
    if (!bends) {
      put_row(length, to.at, to.step, add, [=](int64_t i) { return g_dot[i] - exp_of(y[i]) * sum_dot; });
      return;
    }
    const auto g = of_y(t.grad_y);
    const auto x_dot = of_x(t.x_dot[0]);
    const T sum = sum_of<T>(length, [=](int64_t i) { return g[i]; });
    const T mean = sum_of<T>(length, [=](int64_t i) { return exp_of(y[i]) * x_dot[i]; });
    put_row(length, to.at, to.step, add,
            [=](int64_t i) { return g_dot[i] - exp_of(y[i]) * ((x_dot[i] - mean) * sum + sum_dot); });
  });
}

}  // namespace

template <>
struct OnCpu<Kind::log_softmax> {
  static Footprint footprint(const Layer&) { return {}; }
  template <class T>
  static Passes<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::log_softmax>;

}  // namespace maml::MAML_ISA
