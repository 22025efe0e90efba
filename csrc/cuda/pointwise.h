// y = f(x), element by element, for every f of Function. With g = grad_y:
//   grad_x = f'(x) g,   y_dot = f'(x) x_dot,   grad_x_dot = f'(x) g_dot + f''(x) g x_dot.
// A team shares the elements, in vectors of 16 bytes (vectors.h); there are no barriers. Each pass exists
// twice: for an f known at compile time, and for the layer's own f (with the switch outside the loop). The
// twin on the CPU is cpu/pointwise.cpp.
#pragma once

#include "cuda/elementwise.h"
#include "layers/functions.h"

namespace maml::cuda {

template <Function F, class T>
__device__ __forceinline__ void pointwise_forward(AnyTeam auto team, const Layer& l, const Tensors<T>& t) {
  map_elements(team, input_elements(l), [&](T x) { return evaluate<F, T>(l, x).f; }, t.y, t.x[0]);
}

template <Function F, class T>
__device__ __forceinline__ void pointwise_backward(AnyTeam auto team, const Layer& l, const Tensors<T>& t) {
  if (!t.grad_x[0]) return;
  const Put put{t.add_x[0]};
  map_elements(
      team, input_elements(l), [&](T x, T g, T before) { return put(before, evaluate<F, T>(l, x).df * g); },
      t.grad_x[0], t.x[0], t.grad_y, put.before(t.grad_x[0]));
}

template <Function F, class T>
__device__ __forceinline__ void pointwise_forward_tangent(AnyTeam auto team, const Layer& l,
                                                          const Tensors<T>& t) {
  map_elements(
      team, input_elements(l), [&](T x, T x_dot) { return evaluate<F, T>(l, x).df * x_dot; }, t.y_dot, t.x[0],
      t.x_dot[0]);
}

/// x_dot and grad_y may be absent, then together.
template <Function F, class T>
__device__ __forceinline__ void pointwise_backward_tangent(AnyTeam auto team, const Layer& l,
                                                           const Tensors<T>& t) {
  if (!t.grad_x_dot[0]) return;
  const Put put{t.add_x[0]};
  const bool moves = t.x_dot[0] != nullptr;
  map_elements(
      team, input_elements(l),
      [&](T x, T g_dot, T g, T x_dot, T before) {
        const Derivatives<T> d = evaluate<F, T>(l, x);
        T value = d.df * g_dot;
        if (moves) value += d.ddf * g * x_dot;
        return put(before, value);
      },
      t.grad_x_dot[0], t.x[0], t.grad_y_dot, t.grad_y, t.x_dot[0], put.before(t.grad_x_dot[0]));
}

/// body.template operator()<F>() for the layer's function, which the megakernel has.
template <class Body>
__device__ void with_megakernel_function(Function f, Body body) {
  with_activation(f, [&]<Function F>() {
    if constexpr (FunctionDeclaration<F>::in_megakernel) body.template operator()<F>();
  });
}

template <class T>
__device__ void pointwise_forward(AnyTeam auto team, const Layer& l, const Tensors<T>& t) {
  with_megakernel_function(l.function, [&]<Function F>() { pointwise_forward<F>(team, l, t); });
}

template <class T>
__device__ void pointwise_backward(AnyTeam auto team, const Layer& l, const Tensors<T>& t) {
  with_megakernel_function(l.function, [&]<Function F>() { pointwise_backward<F>(team, l, t); });
}

template <class T>
__device__ void pointwise_forward_tangent(AnyTeam auto team, const Layer& l, const Tensors<T>& t) {
  with_megakernel_function(l.function, [&]<Function F>() { pointwise_forward_tangent<F>(team, l, t); });
}

template <class T>
__device__ void pointwise_backward_tangent(AnyTeam auto team, const Layer& l, const Tensors<T>& t) {
  with_megakernel_function(l.function, [&]<Function F>() { pointwise_backward_tangent<F>(team, l, t); });
}

}  // namespace maml::cuda
