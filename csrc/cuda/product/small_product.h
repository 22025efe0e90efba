// The linear layer of the megakernel: products of matrices that already stand in shared memory and are too
// small for tiles.
//
//   forward    y = b + x w                          y_dot = b_dot + x_dot w + x w_dot
//   backward   grad_w = x^T g, grad_b = sum g, grad_x = g w^T; the tangent of each is a sum of two products
//
// Each thread computes blocks of 2 x 2 outputs, one after the other, directly from shared memory. Rows and
// columns are dealt out to the blocks one by one, so that consecutive lanes read consecutive columns (no bank
// conflict), or in the input gradient consecutive rows of w. Those are `out` elements apart: a conflict of up
// to gcd(out, 32) lanes, which only padded rows would avoid (product/padded.h). Sums run in ascending order
// of the inner index, first term first. The products of one pass are independent: their blocks form one list,
// and no thread waits between products.
#pragma once

#include "cuda/run/launch.h"
#include "layers/layer.h"

namespace maml::cuda {

/// c[i, j] (+)= bias[j] + sum over terms and k of a[i, k] b[k, j], all with strides. A term whose `a` is
/// null is absent.
template <class T>
struct SmallProduct {
  struct Term {
    const T *a, *b;
  };
  int m, n, k;
  Term terms[2];
  int a_row, a_k, b_k, b_column, c_row;
  const T* bias;
  T* c;
  bool add;

  __device__ __forceinline__ int blocks() const { return c ? (m + 1) / 2 * ((n + 1) / 2) : 0; }

  __device__ __forceinline__ void compute(int block) const {
    const int rows = (m + 1) / 2, columns = (n + 1) / 2, i0 = block / columns, j0 = block - i0 * columns;
    const int i1 = i0 + rows < m ? i0 + rows : i0, j1 = j0 + columns < n ? j0 + columns : j0;
    T sum00 = 0, sum01 = 0, sum10 = 0, sum11 = 0;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      if (!terms[t].a) continue;
      const T *x0 = terms[t].a + i0 * a_row, *x1 = terms[t].a + i1 * a_row;
      const T *y0 = terms[t].b + j0 * b_column, *y1 = terms[t].b + j1 * b_column;
#pragma unroll 4
      for (int q = 0; q < k; ++q) {
        const T p0 = x0[q * a_k], p1 = x1[q * a_k], q0 = y0[q * b_k], q1 = y1[q * b_k];
        sum00 += p0 * q0;
        sum01 += p0 * q1;
        sum10 += p1 * q0;
        sum11 += p1 * q1;
      }
    }
    put(i0, j0, sum00);
    if (j1 > j0) put(i0, j1, sum01);
    if (i1 > i0) put(i1, j0, sum10);
    if (i1 > i0 && j1 > j0) put(i1, j1, sum11);
  }

 private:
  __device__ __forceinline__ void put(int i, int j, T sum) const {
    T& to = c[i * c_row + j];
    const T value = bias ? sum + bias[j] : sum;
    to = add ? to + value : value;
  }
};

template <class T>
__device__ __forceinline__ void run_all(Team team, const SmallProduct<T>& product) {
  for (int i = static_cast<int>(team.first()); i < product.blocks(); i += static_cast<int>(team.step())) {
    product.compute(i);
  }
}

/// y [n, out] = bias + the sum of up to two terms (x [n, in], w [in, out]).
template <class T>
__device__ __forceinline__ SmallProduct<T> linear_product(const Layer& l,
                                                          typename SmallProduct<T>::Term first,
                                                          typename SmallProduct<T>::Term second,
                                                          const T* bias, T* y) {
  const int in = static_cast<int>(l.in.c), out = static_cast<int>(l.out.c);
  return {static_cast<int>(l.n), out, in, {first, second}, in, 1, out, 1, out, bias, y, false};
}

/// The gradients of a linear layer, one or two terms each: pairs (x, g) give grad_w, pairs (g, w) give
/// grad_x.
template <class T>
__device__ __forceinline__ void linear_gradients(Team team, const Layer& l,
                                                 const typename SmallProduct<T>::Term (&x_g)[2],
                                                 const typename SmallProduct<T>::Term (&g_w)[2], const T* g,
                                                 const Tensors<T>& t, T* grad_w, T* grad_b, T* grad_x) {
  const int n = static_cast<int>(l.n), in = static_cast<int>(l.in.c), out = static_cast<int>(l.out.c);
  const SmallProduct<T> weight{in, out, n, {x_g[0], x_g[1]}, 1, in, out, 1, out, nullptr, grad_w, t.add_w[0]};
  const SmallProduct<T> input{n, in, out, {g_w[0], g_w[1]}, out, 1, 1, out, in, nullptr, grad_x, t.add_x[0]};
  const int weights = weight.blocks(), inputs = input.blocks(), biases = grad_b ? out : 0;
  for (int i = static_cast<int>(team.first()); i < weights + inputs + biases;
       i += static_cast<int>(team.step())) {
    if (i < inputs) {
      input.compute(i);
    } else if (i < inputs + weights) {
      weight.compute(i - inputs);
    } else {
      const int j = i - inputs - weights;
      T sum = 0;
      for (int s = 0; s < n; ++s) sum += g[s * out + j];
      grad_b[j] = t.add_w[1] ? grad_b[j] + sum : sum;
    }
  }
}

template <class T>
__device__ void linear_forward(Team team, const Layer& l, const Tensors<T>& t) {
  run_all(team, linear_product<T>(l, {t.x[0], t.w[0]}, {}, t.w[1], t.y));
}

template <class T>
__device__ void linear_backward(Team team, const Layer& l, const Tensors<T>& t) {
  linear_gradients<T>(team, l, {{t.x[0], t.grad_y}, {}}, {{t.grad_y, t.w[0]}, {}}, t.grad_y, t, t.grad_w[0],
                      t.grad_w[1], t.grad_x[0]);
}

template <class T>
__device__ void linear_forward_tangent(Team team, const Layer& l, const Tensors<T>& t) {
  using Term = typename SmallProduct<T>::Term;
  const Term moving_input = t.x_dot[0] ? Term{t.x_dot[0], t.w[0]} : Term{};
  const Term moving_weight = t.w_dot[0] ? Term{t.x[0], t.w_dot[0]} : Term{};
  run_all(team, linear_product<T>(l, moving_input, moving_weight, t.w_dot[1], t.y_dot));
}

template <class T>
__device__ void linear_backward_tangent(Team team, const Layer& l, const Tensors<T>& t) {
  using Term = typename SmallProduct<T>::Term;
  const Term moving_input = t.x_dot[0] && t.grad_y ? Term{t.x_dot[0], t.grad_y} : Term{};
  const Term moving_weight = t.w_dot[0] && t.grad_y ? Term{t.grad_y, t.w_dot[0]} : Term{};
  linear_gradients<T>(team, l, {{t.x[0], t.grad_y_dot}, moving_input},
                      {{t.grad_y_dot, t.w[0]}, moving_weight}, t.grad_y_dot, t, t.grad_w_dot[0],
                      t.grad_w_dot[1], t.grad_x_dot[0]);
}

}  // namespace maml::cuda
