// y = f(x), element by element, for every f of Function. With g = grad_y:
//   grad_x = f'(x) g,   y_dot = f'(x) x_dot,   grad_x_dot = f'(x) g_dot + f''(x) g x_dot.
// A result may overwrite its argument. So for an f without second derivative, x may already hold f(x), and
// cotangents and tangents may already hold the results. The twin on the GPU is cuda/pointwise.h.
#include "cpu/function_loop.h"
#include "cpu/implement.h"
#include "cpu/run/share.h"

namespace maml::MAML_ISA {
namespace {

/// to[i] (+)= value(N(), i) for every element, as in each_element. One loop for both cases is not vectorised.
template <Function F, class T, class Value>
void put(const T* x, int64_t first, int64_t last, T* to, bool add, Value value) {
  if (add) {
    each_element<F>(x, first, last, [=]<class N>(N number, int64_t i) { to[i] += value(number, i); });
  } else {
    each_element<F>(x, first, last, [=]<class N>(N number, int64_t i) { to[i] = value(number, i); });
  }
}

template <class T>
void forward(const Layer& layer, const Tensors<T>& t, int64_t first, int64_t last) {
  with_activation(layer.function, [&]<Function F>() {
    const Layer l = layer;
    const T* x = t.x[0];
    T* y = t.y;
    each_element<F>(x, first, last, [=]<class N>(N, int64_t i) { y[i] = plain(evaluate<F, N>(l, x[i]).f); });
  });
}

template <class T>
void backward(const Layer& layer, const Tensors<T>& t, int64_t first, int64_t last) {
  if (!t.grad_x[0]) return;
  const bool add = t.add_x[0];
  with_activation(layer.function, [&]<Function F>() {
    const Layer l = layer;
    const T *x = t.x[0], *g = t.grad_y;
    T* grad_x = t.grad_x[0];
    put<F>(x, first, last, grad_x, add,
           [=]<class N>(N, int64_t i) { return plain(evaluate<F, N>(l, x[i]).df) * g[i]; });
  });
}

template <class T>
void forward_tangent(const Layer& layer, const Tensors<T>& t, int64_t first, int64_t last) {
  with_activation(layer.function, [&]<Function F>() {
    const Layer l = layer;
    const T *x = t.x[0], *x_dot = t.x_dot[0];
    T* y_dot = t.y_dot;
    each_element<F>(x, first, last,
                    [=]<class N>(N, int64_t i) { y_dot[i] = plain(evaluate<F, N>(l, x[i]).df) * x_dot[i]; });
  });
}

template <class T>
void backward_tangent(const Layer& layer, const Tensors<T>& t, int64_t first, int64_t last) {
  if (!t.grad_x_dot[0]) return;
  const bool add = t.add_x[0];
  with_activation(layer.function, [&]<Function F>() {
    const Layer l = layer;
    const T *x = t.x[0], *g = t.grad_y, *x_dot = t.x_dot[0], *g_dot = t.grad_y_dot;
    T* grad_x_dot = t.grad_x_dot[0];
    if (!FunctionDeclaration<F>::bends || !x_dot) {  // no second derivative, or no tangent
      put<F>(x, first, last, grad_x_dot, add,
             [=]<class N>(N, int64_t i) { return plain(evaluate<F, N>(l, x[i]).df) * g_dot[i]; });
      return;
    }
    put<F>(x, first, last, grad_x_dot, add, [=]<class N>(N, int64_t i) {
      const Derivatives<N> d = evaluate<F, N>(l, x[i]);
      return plain(d.df) * g_dot[i] + plain(d.ddf) * g[i] * x_dot[i];
    });
  });
}

template <class T, auto Pass>
void shared(const Layer& layer, const Tensors<T>& t) {
  share_elements(layer.n * size(layer.in), [&](int64_t first, int64_t last) { Pass(layer, t, first, last); });
}

template <class T>
Passes<T> all_shared() {
  return {shared<T, forward<T>>, shared<T, backward<T>>, shared<T, forward_tangent<T>>,
          shared<T, backward_tangent<T>>};
}

}  // namespace

template <>
struct OnCpu<Kind::pointwise> {
  template <class T>
  static Passes<T> passes() {
    return all_shared<T>();
  }
};
template struct Implementation<Kind::pointwise>;

}  // namespace maml::MAML_ISA
