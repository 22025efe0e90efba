// Small networks of linear layers: as many tasks as a vector has lanes are computed at the same time, one in
// each lane. Every element of every tensor is a vector, so that products need no broadcasts, transposes or
// padding, and strides cost nothing. A task has the same bits as when it is computed alone: sums run in the
// order of product.h.
#pragma once

#include <bit>

#include "cpu/layers.h"
#include "cpu/product/blocks.h"
#include "cpu/product/product.h"
#include "cpu/run/updates.h"

namespace maml::MAML_ISA {

/// c[i, j] (+)= bias[j] + sum over terms and q of a[i, q] b[q, j], all with strides.
template <class V>
struct LaneProduct {
  struct Term {
    const V *a, *b;
  };
  int64_t m, n, k;
  Term term[2];
  int terms;
  int64_t a_row, a_k, b_k, b_column, c_row;
  const V* bias;
  V* c;
  bool add;

  /// Sums start from the value in c or from the bias and go over q in ascending order. Beyond kLongest,
  /// further sums start from zero and are added, as in gather_product.
  void run() const {
    register_blocks<false>(0, std::min(k, kLongest), add);
    run_in_blocks(kLongest);
  }
  /// Sums of kLongest q each start from zero and are added up, as in outer_product.
  void run_in_blocks(int64_t from = 0) const {
    for (int64_t q = from; q < k; q += kLongest)
      register_blocks<true>(q, std::min(k, q + kLongest), add || q > 0);
  }

 private:
  /// The sums of a block, a row of b and an element of a together fill the registers.
  static constexpr int kRows = MAML_REGISTERS >= 32 ? 5 : 4, kColumns = MAML_REGISTERS >= 32 ? 5 : 3;

  template <bool Blocks>
  void register_blocks(int64_t q0, int64_t q1, bool adds) const {
    in_like_blocks<kColumns>(0, n, [&]<int C>(int64_t j) {
      in_like_blocks<kRows>(0, m, [&]<int R>(int64_t i) { block<R, C, Blocks>(i, j, q0, q1, adds); });
    });
  }
  template <int R, int C, bool Blocks>
  void block(int64_t i, int64_t j, int64_t q0, int64_t q1, bool adds) const {
    V sum[R][C] = {};
    if constexpr (!Blocks) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int s = 0; s < C; ++s) sum[r][s] = adds ? c[(i + r) * c_row + j + s] : bias ? bias[j + s] : V{};
      }
    }
    for (int t = 0; t < terms; ++t) {
      const V* a = term[t].a + i * a_row + q0 * a_k;
      const V* b = term[t].b + j * b_column + q0 * b_k;
      for (int64_t q = q0; q < q1; ++q, a += a_k, b += b_k) {
        V y[C];
#pragma GCC unroll 8
        for (int s = 0; s < C; ++s) y[s] = b[s * b_column];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const V x = a[r * a_row];
#pragma GCC unroll 8
          for (int s = 0; s < C; ++s) sum[r][s] += x * y[s];
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int s = 0; s < C; ++s) {
        V& to = c[(i + r) * c_row + j + s];
        to = Blocks && adds ? sum[r][s] + to : sum[r][s];
      }
    }
  }
};

/// The targets of each task in one set, in the user's memory, for all samples (there are no tiles here).
template <class T>
struct LaneTargets {
  Target<T> of[kLanes<T>];
};

/// A backend of TaskRunner over vectors. An elementwise layer is that of one task on an array W times as
/// long; a loss is computed for one task after the other.
template <class T>
struct TasksInLanes : Updates<Vector<T>, T> {
  using V = Vector<T>;
  static constexpr int64_t W = kLanes<T>;
  T* scratch;  // 3 * the prediction's elements

  TasksInLanes(const T* rates, const T* query_weights, T* scratch_)
      : Updates<V, T>{{rates}, query_weights}, scratch(scratch_) {}

  static Target<V> of_set(const Target<V>& target, int64_t set) {
    return {static_cast<const LaneTargets<T>*>(target.y) + set};
  }

  void forward(const Layer& l, const Tensors<V>& t) const {
    if (l.kind != Kind::conv2d) return passes_of<T>(l.kind).forward(longer(l), elements(t));
    product(l, {{t.x[0], t.w[0]}, {}}, 1, t.w[1], t.y);
  }
  void backward(const Layer& l, const Tensors<V>& t) const {
    if (l.kind != Kind::conv2d) return passes_of<T>(l.kind).backward(longer(l), elements(t));
    gradients(l, {{t.x[0], t.grad_y}, {}}, 1, {{t.grad_y, t.w[0]}, {}}, 1, t.grad_y, t, t.grad_w,
              t.grad_x[0]);
  }
  void forward_tangent(const Layer& l, const Tensors<V>& t) const {
    if (l.kind != Kind::conv2d) return passes_of<T>(l.kind).forward_tangent(longer(l), elements(t));
    typename LaneProduct<V>::Term terms[2];
    int count = 0;
    if (t.x_dot[0]) terms[count++] = {t.x_dot[0], t.w[0]};
    if (t.w_dot[0]) terms[count++] = {t.x[0], t.w_dot[0]};
    product(l, {terms[0], terms[1]}, count, t.w_dot[1], t.y_dot);
  }
  void backward_tangent(const Layer& l, const Tensors<V>& t) const {
    if (l.kind != Kind::conv2d) return passes_of<T>(l.kind).backward_tangent(longer(l), elements(t));
    gradients(l, {{t.x[0], t.grad_y_dot}, {t.x_dot[0], t.grad_y}}, t.x_dot[0] && t.grad_y ? 2 : 1,
              {{t.grad_y_dot, t.w[0]}, {t.grad_y, t.w_dot[0]}}, t.w_dot[0] && t.grad_y ? 2 : 1, t.grad_y_dot,
              t, t.grad_w_dot, t.grad_x_dot[0]);
  }

  void loss(const LossPart& part, const V* z, const Target<V>& target, V* value, V* grad_z, V* saved) const {
    const int64_t size = part.n * part.c;
    T *own = scratch, *grad = scratch + size;
    for (int64_t lane = 0; lane < W; ++lane) {
      take(size, z, lane, own);
      T* keep = saved ? reinterpret_cast<T*>(saved) + lane * size : nullptr;
      const T loss =
          loss_passes<T>(part.kind).value(part, own, of_lane(target, lane), grad_z ? grad : nullptr, keep);
      if (value) (*value)[lane] = loss;
      if (grad_z) give(size, grad, lane, grad_z);
    }
  }
  void loss_tangent(const LossPart& part, const V* z, const Target<V>& target, const V* z_dot, const V* saved,
                    V* grad_z_dot) const {
    const int64_t size = part.n * part.c;
    T *own = scratch, *dot = scratch + size, *grad = scratch + 2 * size;
    for (int64_t lane = 0; lane < W; ++lane) {
      take(size, z, lane, own);
      take(size, z_dot, lane, dot);
      const T* kept = reinterpret_cast<const T*>(saved) + lane * size;
      loss_passes<T>(part.kind).tangent(part, own, of_lane(target, lane), dot, kept, grad);
      give(size, grad, lane, grad_z_dot);
    }
  }
  void metric(const LossPart& part, const V* z, const Target<V>& target, const V* z_dot, V* grad_z) const {
    const int64_t size = part.n * part.c;
    T *own = scratch, *dot = scratch + size, *grad = scratch + 2 * size;
    for (int64_t lane = 0; lane < W; ++lane) {
      take(size, z, lane, own);
      take(size, z_dot, lane, dot);
      loss_passes<T>(part.kind).metric(part, own, of_lane(target, lane), dot, grad);
      give(size, grad, lane, grad_z);
    }
  }

  /// Writes the tasks' arrays [W, size] from an array in lanes; `size` is a multiple of W.
  static void separate(int64_t size, const V* x, T* own) {
    for (int64_t i = 0; i < size; i += W) {
      transpose_block<T>(W, W, reinterpret_cast<const T*>(x + i), W, own + i, size);
    }
  }
  /// sum[i] = the sum of weight times element i over the first `count` tasks, in order, for a multiple of W
  /// of i.
  static void add_up(int64_t size, const V* x, int64_t count, const double* weight, double* sum) {
    alignas(64) T own[W][W];
    for (int64_t i = 0; i < size; i += W) {
      transpose_block<T>(W, W, reinterpret_cast<const T*>(x + i), W, own[0], W);
      for (int64_t j = 0; j < W; ++j) sum[i + j] = weight[0] * static_cast<double>(own[0][j]);
      for (int64_t lane = 1; lane < count; ++lane) {
        for (int64_t j = 0; j < W; ++j) sum[i + j] += weight[lane] * static_cast<double>(own[lane][j]);
      }
    }
  }

  /// take() copies one task's part of an array in lanes; give() writes it back.
  static void take(int64_t size, const V* x, int64_t lane, T* own) {
    const T* from = reinterpret_cast<const T*>(x) + lane;
    for (int64_t i = 0; i < size; ++i) own[i] = from[i * W];
  }
  static void give(int64_t size, const T* own, int64_t lane, V* x) {
    T* to = reinterpret_cast<T*>(x) + lane;
    for (int64_t i = 0; i < size; ++i) to[i * W] = own[i];
  }

 private:
  using Terms = typename LaneProduct<V>::Term[2];

  static const Target<T>& of_lane(const Target<V>& target, int64_t lane) {
    return static_cast<const LaneTargets<T>*>(target.y)->of[lane];
  }

  /// The layer with the lanes as further features, which no sum over samples mixes.
  static Layer longer(Layer l) {
    l.in.c *= W;
    l.out.c *= W;
    return l;
  }
  static Tensors<T> elements(const Tensors<V>& t) { return std::bit_cast<Tensors<T>>(t); }

  /// y [n, out] = bias + the sum of terms (x [n, in], w [in, out]).
  static void product(const Layer& l, const Terms& terms, int count, const V* bias, V* y) {
    const int64_t in = l.in.c, out = l.out.c;
    LaneProduct<V>{l.n, out, in, {terms[0], terms[1]}, count, in, 1, out, 1, out, bias, y, false}.run();
  }
  /// The gradient of the weight from terms (x, g), of the bias from g, of x from terms (g, w).
  static void gradients(const Layer& l, const Terms& x_g, int x_gs, const Terms& g_w, int g_ws, const V* g,
                        const Tensors<V>& t, V* const* grad_w, V* grad_x) {
    const int64_t in = l.in.c, out = l.out.c, n = l.n;
    if (grad_w[0]) {
      LaneProduct<V>{in, out, n, {x_g[0], x_g[1]}, x_gs, 1, in, out, 1, out, nullptr, grad_w[0], t.add_w[0]}
          .run_in_blocks();
    }
    if (grad_w[1]) {
      const V one = broadcast(T(1));
      LaneProduct<V>{1, out, n, {{&one, g}, {}}, 1, 0, 0, out, 1, out, nullptr, grad_w[1], t.add_w[1]}
          .run_in_blocks();
    }
    if (grad_x) {
      LaneProduct<V>{n, in, out, {g_w[0], g_w[1]}, g_ws, out, 1, 1, out, in, nullptr, grad_x, t.add_x[0]}
          .run();
    }
  }
};

}  // namespace maml::MAML_ISA
