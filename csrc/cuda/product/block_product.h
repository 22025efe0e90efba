// A linear layer by one block, with operands in device memory, for the interpreter (run/interpreter.h):
// products of matrices that are too small for tiles. `small_product.h` does the same in shared memory.
//
//   forward    y = b + x w                          y_dot = b_dot + x_dot w + x w_dot
//   backward   grad_w = x^T g, grad_b = sum g, grad_x = g w^T; the tangent of each is a sum of two products
//
// Threads: some lanes of a warp compute kColumns neighbouring outputs of a row. They take every width-th term
// of the inner index; a fixed tree of shuffles sums over them. So a product with few outputs, such as the
// five classes of 5 samples with 800 features each, still keeps the whole block loading: an output alone
// would take 800 dependent steps. There are as many lanes for an output as leave each of them eight terms
// (row_width).
//
// Numerics: sums in T, in an order that depends on the shape only; the precision of matrix units is not used.
// Statistics of the output (moments.h) are taken where the layer has them. Limits: sizes in 32 bits.
#pragma once

#include "cuda/elementwise.h"
#include "cuda/product/statistics_entries.h"
#include "cuda/rows.h"

namespace maml::cuda {

/// c [m, n] (+)= bias [n] + the sum over terms and k of a[i, k] b[k, j], all with strides. A term whose `a`
/// is null is absent.
template <class T>
struct BlockProduct {
  static constexpr int kColumns = 5;  // few-shot tasks mostly have five classes

  struct Term {
    const T *a, *b;
  };
  int m, n, k;
  Term terms[2];
  int a_row, a_k, b_k, b_column, c_row;
  const T* bias;
  T* c;
  bool add;

  /// All threads of the block call.
  __device__ __forceinline__ void compute(Team team) const {
    const int groups = (n + kColumns - 1) / kColumns;
    each_row(team, static_cast<int64_t>(m) * groups, k, [&](int64_t item, int lane, int width, bool exists) {
      const int i = static_cast<int>(item) / groups, j0 = (static_cast<int>(item) - i * groups) * kColumns;
      T sums[kColumns] = {};
#pragma unroll
      for (const Term& term : terms) {
        if (!term.a || !exists) continue;
        const T *x = term.a + i * a_row, *y[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) y[j] = term.b + std::min(j0 + j, n - 1) * b_column;
#pragma unroll 4
        for (int q = lane; q < k; q += width) {
          const T factor = x[q * a_k];
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sums[j] += factor * y[j][q * b_k];
        }
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const T sum = row_sum(sums[j], width);
        if (!exists || lane != j % width || j0 + j >= n) continue;
        put(c, i * c_row + j0 + j, bias ? sum + bias[j0 + j] : sum, add);
      }
    });
  }
};

/// Writes the statistics of y [rows, c], or with `primal` those of primal and y, as the epilogue of a
/// convolution does (tile_statistics.h): one thread for each entry and channel.
template <class T>
__device__ __forceinline__ void statistics_of(Team team, int rows, int c, const T* y, const T* primal,
                                              T* entries) {
  const StatisticsEntries of = statistics_entries(rows, c);
  for (int item = static_cast<int>(team.first()); item < of.count * c;
       item += static_cast<int>(team.step())) {
    const int entry = item / c, channel = item - entry * c, first = entry * of.rows;
    const int last = std::min(rows, first + of.rows);
    const T of_row = 1 / static_cast<T>(last - first);
    T mean = 0, mean_primal = 0, products = 0;
    for (int row = first; row < last; ++row) {
      mean += y[row * c + channel];
      if (primal) mean_primal += primal[row * c + channel];
    }
    mean *= of_row, mean_primal *= of_row;
    for (int row = first; row < last; ++row) {
      const T d = y[row * c + channel] - mean;
      products += (primal ? primal[row * c + channel] - mean_primal : d) * d;
    }
    T* to = entries + entry * of.step * (primal ? 3 : 2) * c + channel;
    if (primal) *to = mean_primal, to += c;
    to[0] = mean, to[c] = products;
  }
}

template <class T>
class LinearInBlock {
  using Term = typename BlockProduct<T>::Term;

 public:
  static __device__ void forward(Team team, const Layer& l, const Tensors<T>& t) {
    output(team, l, {t.x[0], t.w[0]}, {}, t.w[1], t.y);
    if (!t.statistics) return;
    __syncthreads();
    statistics_of<T>(team, int32(l.n), int32(l.out.c), t.y, nullptr, t.statistics);
  }
  static __device__ void backward(Team team, const Layer& l, const Tensors<T>& t) {
    gradients(team, l, {{t.x[0], t.grad_y}, {}}, {{t.grad_y, t.w[0]}, {}}, t.grad_y, t, t.grad_w[0],
              t.grad_w[1], t.grad_x[0]);
  }
  static __device__ void forward_tangent(Team team, const Layer& l, const Tensors<T>& t) {
    const Term moving_input = t.x_dot[0] ? Term{t.x_dot[0], t.w[0]} : Term{};
    const Term moving_weight = t.w_dot[0] ? Term{t.x[0], t.w_dot[0]} : Term{};
    output(team, l, moving_input, moving_weight, t.w_dot[1], t.y_dot);
    if (!t.statistics_dot) return;
    __syncthreads();
    statistics_of<T>(team, int32(l.n), int32(l.out.c), t.y_dot, t.y, t.statistics_dot);
  }
  static __device__ void backward_tangent(Team team, const Layer& l, const Tensors<T>& t) {
    const Term moving_input = t.x_dot[0] && t.grad_y ? Term{t.x_dot[0], t.grad_y} : Term{};
    const Term moving_weight = t.w_dot[0] && t.grad_y ? Term{t.grad_y, t.w_dot[0]} : Term{};
    gradients(team, l, {{t.x[0], t.grad_y_dot}, moving_input}, {{t.grad_y_dot, t.w[0]}, moving_weight},
              t.grad_y_dot, t, t.grad_w_dot[0], t.grad_w_dot[1], t.grad_x_dot[0]);
  }

 private:
  static __device__ __forceinline__ int int32(int64_t size) { return static_cast<int>(size); }

  static __device__ __forceinline__ void output(Team team, const Layer& l, Term first, Term second,
                                                const T* bias, T* y) {
    const int in = int32(l.in.c), out = int32(l.out.c);
    BlockProduct<T>{int32(l.n), out, in, {first, second}, in, 1, out, 1, out, bias, y, false}.compute(team);
  }

  /// Pairs (x, g) give grad_w, pairs (g, w) give grad_x.
  static __device__ __forceinline__ void gradients(Team team, const Layer& l, const Term (&x_g)[2],
                                                   const Term (&g_w)[2], const T* g, const Tensors<T>& t,
                                                   T* grad_w, T* grad_b, T* grad_x) {
    const int n = int32(l.n), in = int32(l.in.c), out = int32(l.out.c);
    if (grad_x) {
      BlockProduct<T>{n, in, out, {g_w[0], g_w[1]}, out, 1, 1, out, in, nullptr, grad_x, t.add_x[0]}.compute(
          team);
    }
    if (grad_w) {
      BlockProduct<T>{in, out, n, {x_g[0], x_g[1]}, 1, in, out, 1, out, nullptr, grad_w, t.add_w[0]}.compute(
          team);
    }
    if (!grad_b) return;
    each_row(team, out, n, [&](int64_t j, int lane, int width, bool exists) {
      T sum = 0;
      for (int i = exists ? lane : n; i < n; i += width) sum += g[i * out + j];
      sum = row_sum(sum, width);
      if (exists && lane == 0) put(grad_b, j, sum, t.add_w[1]);
    });
  }
};

}  // namespace maml::cuda
