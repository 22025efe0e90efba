// y = [x, max(w, a)]: appends a parameter's elements to the features of every sample, as a policy's log_std
// to its mean. x [n, in], w [p], y [n, in + p]:
//   grad_x = the first part of grad_y;  grad_w = the sum over samples of the rest, where w >= a
// The tangents follow the same rule: the layer is linear except for the lower bound a, where max(w, a) has
// slope one if w >= a and zero otherwise. The sum over samples is in double, in order. The twin on the GPU is
// cuda/append.h.
#include <algorithm>

#include "cpu/implement.h"

namespace maml::MAML_ISA {
namespace {

/// y from x and the appended elements behind(j); a null x counts as zero.
template <class T, class F>
void join(const Layer& l, const T* x, F behind, T* y) {
  const int64_t in = l.in.c, out = l.out.c;
  for (int64_t i = 0; i < l.n; ++i, y += out) {
    for (int64_t j = 0; j < in; ++j) y[j] = x ? x[i * in + j] : T(0);
    for (int64_t j = in; j < out; ++j) y[j] = behind(j - in);
  }
}

/// Distributes the cotangent g to the two parts.
template <class T>
void split(const Layer& l, const Tensors<T>& t, const T* g, T* grad_x, T* grad_w) {
  const int64_t in = l.in.c, out = l.out.c;
  if (grad_x) {
    for (int64_t i = 0; i < l.n; ++i) {
      for (int64_t j = 0; j < in; ++j) {
        T& to = grad_x[i * in + j];
        to = t.add_x[0] ? to + g[i * out + j] : g[i * out + j];
      }
    }
  }
  if (!grad_w) return;
  for (int64_t j = in; j < out; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < l.n; ++i) sum += static_cast<double>(g[i * out + j]);
    const T value = t.w[0][j - in] >= static_cast<T>(l.a) ? static_cast<T>(sum) : T(0);
    T& to = grad_w[j - in];
    to = t.add_w[0] ? to + value : value;
  }
}

template <class T>
Passes<T> all_passes() {
  return {
      [](const Layer& l, const Tensors<T>& t) {
        join(l, t.x[0], [&](int64_t j) { return std::max(t.w[0][j], static_cast<T>(l.a)); }, t.y);
      },
      [](const Layer& l, const Tensors<T>& t) { split(l, t, t.grad_y, t.grad_x[0], t.grad_w[0]); },
      [](const Layer& l, const Tensors<T>& t) {
        auto behind = [&](int64_t j) {
          return t.w_dot[0] && t.w[0][j] >= static_cast<T>(l.a) ? t.w_dot[0][j] : T(0);
        };
        join(l, t.x_dot[0], behind, t.y_dot);
      },
      [](const Layer& l, const Tensors<T>& t) {
        split(l, t, t.grad_y_dot, t.grad_x_dot[0], t.grad_w_dot[0]);
      },
  };
}

}  // namespace

template <>
struct OnCpu<Kind::append> {
  static Footprint footprint(const Layer&) { return {}; }
  template <class T>
  static Passes<T> passes() {
    return all_passes<T>();
  }
};
template struct Implementation<Kind::append>;

}  // namespace maml::MAML_ISA
