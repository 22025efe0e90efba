// y = [x, max(w, a)]: appends a parameter's elements to the features of every sample; x [n, in], w [p],
// y [n, in + p].
//   grad_x = the first part of grad_y;  grad_w = the sum over samples of the rest, where w >= a
// The tangents follow the same rule. A team shares the elements of y and of grad_x. One warp computes an
// element of grad_w: each lane sums every 32nd sample in order, in double, and a fixed tree sums over the
// lanes. There are no barriers; all threads of a warp must call. The twin on the CPU is cpu/append.cpp.
#pragma once

#include "cuda/elementwise.h"
#include "cuda/rows.h"

namespace maml::cuda {

/// y from x and the appended elements behind(j); a null x counts as zero.
template <class T, class F>
__device__ __forceinline__ void join(Team team, const Layer& l, const T* x, F behind, T* y) {
  const int64_t in = l.in.c, out = l.out.c, count = l.n * out, step = team.step();
  for (int64_t at = team.first(); at < count; at += step) {
    const int64_t i = at / out, j = at - i * out;
    y[at] = j >= in ? behind(j - in) : x ? x[i * in + j] : T(0);
  }
}

/// Distributes the cotangent g to the two parts.
template <class T>
__device__ __forceinline__ void split(Team team, const Layer& l, const Tensors<T>& t, const T* g, T* grad_x,
                                      T* grad_w) {
  const int64_t in = l.in.c, out = l.out.c, count = l.n * in, step = team.step();
  for (int64_t at = team.first(); grad_x && at < count; at += step) {
    const int64_t i = at / in;
    put(grad_x, at, g[i * out + at - i * in], t.add_x[0]);
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t j = team.first() / kWarp; grad_w && j < out - in; j += step / kWarp) {
    double sum = 0;
    for (int64_t i = lane; i < l.n; i += kWarp) sum += static_cast<double>(g[i * out + in + j]);
    sum = row_sum(sum, kWarp);
    const T value = t.w[0][j] >= static_cast<T>(l.a) ? static_cast<T>(sum) : T(0);
    if (lane == 0) put(grad_w, j, value, t.add_w[0]);
  }
}

template <class T>
__device__ void append_forward(Team team, const Layer& l, const Tensors<T>& t) {
  const T floor = static_cast<T>(l.a);
  join(team, l, t.x[0], [&](int64_t j) { return t.w[0][j] < floor ? floor : t.w[0][j]; }, t.y);
}
template <class T>
__device__ void append_backward(Team team, const Layer& l, const Tensors<T>& t) {
  split(team, l, t, t.grad_y, t.grad_x[0], t.grad_w[0]);
}
template <class T>
__device__ void append_forward_tangent(Team team, const Layer& l, const Tensors<T>& t) {
  const T floor = static_cast<T>(l.a);
  auto behind = [&](int64_t j) { return t.w_dot[0] && t.w[0][j] >= floor ? t.w_dot[0][j] : T(0); };
  join(team, l, t.x_dot[0], behind, t.y_dot);
}
template <class T>
__device__ void append_backward_tangent(Team team, const Layer& l, const Tensors<T>& t) {
  split(team, l, t, t.grad_y_dot, t.grad_x_dot[0], t.grad_w_dot[0]);
}

}  // namespace maml::cuda
