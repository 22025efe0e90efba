// Layers that only place values: channels_last [n, c, h, w] -> [n, h, w, c], flatten the other way round, and
// the residual sum of two values.
#include "cpu/linear_map.h"
#include "cpu/product/product.h"
#include "cpu/run/share.h"

namespace maml::MAML_ISA {
namespace {

/// out[s, j, i] (+)= in[s, i, j], per sample.
template <class T>
void reorder(int64_t n, int64_t rows, int64_t columns, const T* in, bool add, T* out) {
  if (!add) return transpose(n, rows, columns, in, out);
  for (int64_t s = 0; s < n; ++s, in += rows * columns, out += rows * columns) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i) out[j * rows + i] += in[i * columns + j];
    }
  }
}

struct ToChannelsLast {
  template <class T>
  static void apply(const Layer& l, const T* x, T* y) {
    reorder(l.n, l.in.c, l.in.h * l.in.w, x, false, y);
  }
  template <class T>
  static void transposed(const Layer& l, const T* g, bool add, T* grad_x) {
    reorder(l.n, l.in.h * l.in.w, l.in.c, g, add, grad_x);
  }
};

struct ToChannelsFirst {
  template <class T>
  static void apply(const Layer& l, const T* x, T* y) {
    reorder(l.n, l.in.h * l.in.w, l.in.c, x, false, y);
  }
  template <class T>
  static void transposed(const Layer& l, const T* g, bool add, T* grad_x) {
    reorder(l.n, l.in.c, l.in.h * l.in.w, g, add, grad_x);
  }
};

/// y = a + b, where an absent one is zero.
template <class T>
void sum(int64_t count, const T* a, const T* b, T* y) {
  share_elements(count, [=](int64_t first, int64_t last) {
    if (!a || !b) {
      const T* only = a ? a : b;
      for (int64_t i = first; i < last; ++i) y[i] = only[i];
      return;
    }
    for (int64_t i = first; i < last; ++i) y[i] = a[i] + b[i];
  });
}

template <class T>
void pass_on(int64_t count, const T* g, const bool* add, T* const* grad_x) {
  for (int j = 0; j < 2; ++j) {
    T* to = grad_x[j];
    if (!to) continue;
    share_elements(count, [=](int64_t first, int64_t last) {
      if (add[j]) {
        for (int64_t i = first; i < last; ++i) to[i] += g[i];
      } else {
        for (int64_t i = first; i < last; ++i) to[i] = g[i];
      }
    });
  }
}

template <class T>
Passes<T> residual_sum() {
  return {
      [](const Layer& l, const Tensors<T>& t) { sum(l.n * size(l.in), t.x[0], t.x[1], t.y); },
      [](const Layer& l, const Tensors<T>& t) { pass_on(l.n * size(l.in), t.grad_y, t.add_x, t.grad_x); },
      [](const Layer& l, const Tensors<T>& t) { sum(l.n * size(l.in), t.x_dot[0], t.x_dot[1], t.y_dot); },
      [](const Layer& l, const Tensors<T>& t) {
        pass_on(l.n * size(l.in), t.grad_y_dot, t.add_x, t.grad_x_dot);
      },
  };
}

}  // namespace

template <>
Passes<float> channels_last<float>() {
  return linear_map<ToChannelsLast, float>();
}
template <>
Passes<double> channels_last<double>() {
  return linear_map<ToChannelsLast, double>();
}
template <>
Passes<float> flatten<float>() {
  return linear_map<ToChannelsFirst, float>();
}
template <>
Passes<double> flatten<double>() {
  return linear_map<ToChannelsFirst, double>();
}
template <>
Passes<float> add<float>() {
  return residual_sum<float>();
}
template <>
Passes<double> add<double>() {
  return residual_sum<double>();
}

}  // namespace maml::MAML_ISA
