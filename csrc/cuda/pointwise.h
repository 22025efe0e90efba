// y = f(x), element by element, for every f of Function. With g = grad_y:
//   grad_x = f'(x) g,   y_dot = f'(x) x_dot,   grad_x_dot = f'(x) g_dot + f''(x) g x_dot.
// A team shares the elements; there are no barriers. Each pass exists twice: for an f known at compile time,
// and for the layer's own f (with the switch outside the loop). The twin on the CPU is cpu/pointwise.cpp.
#pragma once

#include "cuda/elementwise.h"
#include "layers/functions.h"

namespace maml::cuda {

template <Function F, class T>
__device__ __forceinline__ void pointwise_forward(Team team, const Layer& l, const Tensors<T>& t) {
  const int64_t count = input_elements(l), step = team.step();
  const T* x = t.x[0];
  for (int64_t i = team.first(); i < count; i += step) t.y[i] = evaluate<F, T>(l, x[i]).f;
}

template <Function F, class T>
__device__ __forceinline__ void pointwise_backward(Team team, const Layer& l, const Tensors<T>& t) {
  const int64_t count = t.grad_x[0] ? input_elements(l) : 0, step = team.step();
  const T *x = t.x[0], *g = t.grad_y;
  for (int64_t i = team.first(); i < count; i += step) {
    put(t.grad_x[0], i, evaluate<F, T>(l, x[i]).df * g[i], t.add_x[0]);
  }
}

template <Function F, class T>
__device__ __forceinline__ void pointwise_forward_tangent(Team team, const Layer& l, const Tensors<T>& t) {
  const int64_t count = input_elements(l), step = team.step();
  const T *x = t.x[0], *x_dot = t.x_dot[0];
  for (int64_t i = team.first(); i < count; i += step) t.y_dot[i] = evaluate<F, T>(l, x[i]).df * x_dot[i];
}

/// x_dot and grad_y may be absent, then together.
template <Function F, class T>
__device__ __forceinline__ void pointwise_backward_tangent(Team team, const Layer& l, const Tensors<T>& t) {
  const int64_t count = t.grad_x_dot[0] ? input_elements(l) : 0, step = team.step();
  const T *x = t.x[0], *g = t.grad_y, *x_dot = t.x_dot[0], *g_dot = t.grad_y_dot;
  for (int64_t i = team.first(); i < count; i += step) {
    const Derivatives<T> d = evaluate<F, T>(l, x[i]);
    T value = d.df * g_dot[i];
    if (x_dot) value += d.ddf * g[i] * x_dot[i];
    put(t.grad_x_dot[0], i, value, t.add_x[0]);
  }
}

/// body.template operator()<F>() for the layer's function, which the megakernel has.
template <class Body>
__device__ void with_megakernel_function(Function f, Body body) {
  with_activation(f, [&]<Function F>() {
    if constexpr (FunctionDeclaration<F>::in_megakernel) body.template operator()<F>();
  });
}

template <class T>
__device__ void pointwise_forward(Team team, const Layer& l, const Tensors<T>& t) {
  with_megakernel_function(l.function, [&]<Function F>() { pointwise_forward<F>(team, l, t); });
}

template <class T>
__device__ void pointwise_backward(Team team, const Layer& l, const Tensors<T>& t) {
  with_megakernel_function(l.function, [&]<Function F>() { pointwise_backward<F>(team, l, t); });
}

template <class T>
__device__ void pointwise_forward_tangent(Team team, const Layer& l, const Tensors<T>& t) {
  with_megakernel_function(l.function, [&]<Function F>() { pointwise_forward_tangent<F>(team, l, t); });
}

template <class T>
__device__ void pointwise_backward_tangent(Team team, const Layer& l, const Tensors<T>& t) {
  with_megakernel_function(l.function, [&]<Function F>() { pointwise_backward_tangent<F>(team, l, t); });
}

}  // namespace maml::cuda
