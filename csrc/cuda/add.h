// The residual sum y = a + b, where an absent input is zero. Its cotangent goes to both inputs. A team shares
// the elements; there are no barriers. The twin on the CPU is cpu/add.cpp.
#pragma once

#include "cuda/elementwise.h"

namespace maml::cuda {

/// y = a + b; one of them may be null.
template <class T>
__device__ __forceinline__ void sum_of(AnyTeam auto team, int64_t count, const T* a, const T* b, T* y) {
  map_elements(team, count, [](T a, T b) { return a + b; }, y, a, b);
}

/// Each grad_x that is not null (+)= g. Both are handled by the same thread: in x + x they are the same
/// memory.
template <class T>
__device__ __forceinline__ void pass_on(AnyTeam auto team, int64_t count, const T* g, const bool* add,
                                        T* const* grad_x) {
  const Put put[2] = {{add[0]}, {add[1]}};
  const bool same = grad_x[0] == grad_x[1];
  map_elements(
      team, count,
      [&](T g, T before0, T before1) {
        const T first = put[0](before0, g);
        return Numbers<T, 2>{first, put[1](same ? first : before1, g)};
      },
      Outputs<T, 2>{{grad_x[0], grad_x[1]}}, g, put[0].before(grad_x[0]), put[1].before(grad_x[1]));
}

template <class T>
__device__ __forceinline__ void add_forward(AnyTeam auto team, const Layer& l, const Tensors<T>& t) {
  sum_of(team, input_elements(l), t.x[0], t.x[1], t.y);
}
template <class T>
__device__ __forceinline__ void add_backward(AnyTeam auto team, const Layer& l, const Tensors<T>& t) {
  pass_on(team, input_elements(l), t.grad_y, t.add_x, t.grad_x);
}
template <class T>
__device__ __forceinline__ void add_forward_tangent(AnyTeam auto team, const Layer& l, const Tensors<T>& t) {
  sum_of(team, input_elements(l), t.x_dot[0], t.x_dot[1], t.y_dot);
}
template <class T>
__device__ __forceinline__ void add_backward_tangent(AnyTeam auto team, const Layer& l, const Tensors<T>& t) {
  pass_on(team, input_elements(l), t.grad_y_dot, t.add_x, t.grad_x_dot);
}

}  // namespace maml::cuda
