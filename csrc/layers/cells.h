// The cells of a recurrence (recurrence.h), for one unit at one step of time, in the formulas of
// torch.nn.LSTM, GRU and RNN. A cell reads, for each of its gates, a = x W_ih + b_ih and u = h W_hh + b_hh,
// and its states h (and c) before the step. A gate of a cell is a block of columns in both weights, in
// torch's order.
//
//   rnn_tanh, rnn_relu   h' = f(a + u)
//   lstm                 i, f, o = sigmoid(a + u), g = tanh(a + u), c' = f c + i g, h' = o tanh(c')
//   gru                  r, z = sigmoid(a + u), n = tanh(a + r u), h' = n + z (h - n)
//
// A cell has
//   gates, states   their number
//   sided           whether the cotangents of a and u differ
//   forward         h' and what it saves, s. Of a cell with two states, the new c is s[kCell].
//   tangent         R{h'} and R{s}
//   backward        the cotangents of a, u and the states before. Given are those of the states after the
//                   step, of c without what comes through h', which is added.
//   backward_tangent   their tangents, and the cotangents of a and u once more. `g` are the cotangents of the
//                   states that `backward` has left, g_dot their tangents.
#pragma once

#include "layers/functions.h"

namespace maml {

enum class Cell : int { rnn_tanh, rnn_relu, lstm, gru, count };

inline const char* name_of(Cell cell) {
  static const char* const kNames[] = {"rnn_tanh", "rnn_relu", "lstm", "gru"};
  return kNames[static_cast<int>(cell)];
}

constexpr int kCell = 4;  // of what an LSTM saves, the new c

// Internal linkage: each instruction set of the CPU backend compiles its own copy.
namespace {

template <Cell C>
struct CellDeclaration;

/// y (1 - y), the slope of a sigmoid that is y
template <class T>
MAML_HOST_DEVICE static inline T slope_of_sigmoid(T y) {
  return y * (1 - y);
}
/// 1 - y y, the slope of a tanh that is y
template <class T>
MAML_HOST_DEVICE static inline T slope_of_tanh(T y) {
  return 1 - y * y;
}

template <>
struct CellDeclaration<Cell::rnn_tanh> {
  static constexpr int gates = 1, states = 1, saved = 1;
  static constexpr bool sided = false;

  template <class T>
  MAML_HOST_DEVICE static T forward(const T (&a)[1], const T (&u)[1], const T (&)[1], T (&s)[1]) {
    return s[0] = tanh(a[0] + u[0]);
  }
  template <class T>
  MAML_HOST_DEVICE static T tangent(const T (&s)[1], const T (&)[1], const T (&a_dot)[1], const T (&u_dot)[1],
                                    const T (&)[1], T (&s_dot)[1]) {
    return s_dot[0] = slope_of_tanh(s[0]) * (a_dot[0] + u_dot[0]);
  }
  template <class T>
  MAML_HOST_DEVICE static void backward(const T (&s)[1], const T (&)[1], T (&g)[1], T (&grad_a)[1], T (&)[1],
                                        T (&grad_before)[1]) {
    grad_a[0] = g[0] * slope_of_tanh(s[0]);
    grad_before[0] = 0;
  }
  template <class T>
  MAML_HOST_DEVICE static void backward_tangent(const T (&s)[1], const T (&s_dot)[1], const T (&)[1],
                                                const T (&)[1], const T (&g)[1], T (&g_dot)[1],
                                                T (&grad_a)[1], T (&)[1], T (&grad_a_dot)[1], T (&)[1],
                                                T (&grad_before_dot)[1]) {
    grad_a[0] = g[0] * slope_of_tanh(s[0]);
    grad_a_dot[0] = g_dot[0] * slope_of_tanh(s[0]) - 2 * g[0] * s[0] * s_dot[0];
    grad_before_dot[0] = 0;
  }
};

template <>
struct CellDeclaration<Cell::rnn_relu> {
  static constexpr int gates = 1, states = 1, saved = 1;
  static constexpr bool sided = false;

  template <class T>
  MAML_HOST_DEVICE static T forward(const T (&a)[1], const T (&u)[1], const T (&)[1], T (&s)[1]) {
    const T x = a[0] + u[0];
    return s[0] = x > 0 || x != x ? x : T(0);
  }
  template <class T>
  MAML_HOST_DEVICE static T tangent(const T (&s)[1], const T (&)[1], const T (&a_dot)[1], const T (&u_dot)[1],
                                    const T (&)[1], T (&s_dot)[1]) {
    return s_dot[0] = s[0] > 0 ? a_dot[0] + u_dot[0] : T(0);
  }
  template <class T>
  MAML_HOST_DEVICE static void backward(const T (&s)[1], const T (&)[1], T (&g)[1], T (&grad_a)[1], T (&)[1],
                                        T (&grad_before)[1]) {
    grad_a[0] = s[0] > 0 ? g[0] : T(0);
    grad_before[0] = 0;
  }
  template <class T>
  MAML_HOST_DEVICE static void backward_tangent(const T (&s)[1], const T (&)[1], const T (&)[1],
                                                const T (&)[1], const T (&g)[1], T (&g_dot)[1],
                                                T (&grad_a)[1], T (&)[1], T (&grad_a_dot)[1], T (&)[1],
                                                T (&grad_before_dot)[1]) {
    grad_a[0] = s[0] > 0 ? g[0] : T(0);
    grad_a_dot[0] = s[0] > 0 ? g_dot[0] : T(0);
    grad_before_dot[0] = 0;
  }
};

/// s: i, f, g, o, c', tanh(c')
template <>
struct CellDeclaration<Cell::lstm> {
  static constexpr int gates = 4, states = 2, saved = 6;
  static constexpr bool sided = false;

  template <class T>
  MAML_HOST_DEVICE static T forward(const T (&a)[4], const T (&u)[4], const T (&before)[2], T (&s)[6]) {
    s[0] = logistic(a[0] + u[0]);
    s[1] = logistic(a[1] + u[1]);
    s[2] = tanh(a[2] + u[2]);
    s[3] = logistic(a[3] + u[3]);
    s[4] = s[1] * before[1] + s[0] * s[2];
    s[5] = tanh(s[4]);
    return s[3] * s[5];
  }
  template <class T>
  MAML_HOST_DEVICE static T tangent(const T (&s)[6], const T (&before)[2], const T (&a_dot)[4],
                                    const T (&u_dot)[4], const T (&before_dot)[2], T (&s_dot)[6]) {
    s_dot[0] = slope_of_sigmoid(s[0]) * (a_dot[0] + u_dot[0]);
    s_dot[1] = slope_of_sigmoid(s[1]) * (a_dot[1] + u_dot[1]);
    s_dot[2] = slope_of_tanh(s[2]) * (a_dot[2] + u_dot[2]);
    s_dot[3] = slope_of_sigmoid(s[3]) * (a_dot[3] + u_dot[3]);
    s_dot[4] = s_dot[1] * before[1] + s[1] * before_dot[1] + s_dot[0] * s[2] + s[0] * s_dot[2];
    s_dot[5] = slope_of_tanh(s[5]) * s_dot[4];
    return s_dot[3] * s[5] + s[3] * s_dot[5];
  }
  template <class T>
  MAML_HOST_DEVICE static void backward(const T (&s)[6], const T (&before)[2], T (&g)[2], T (&grad_a)[4],
                                        T (&)[4], T (&grad_before)[2]) {
    g[1] += g[0] * s[3] * slope_of_tanh(s[5]);
    grad_a[0] = g[1] * s[2] * slope_of_sigmoid(s[0]);
    grad_a[1] = g[1] * before[1] * slope_of_sigmoid(s[1]);
    grad_a[2] = g[1] * s[0] * slope_of_tanh(s[2]);
    grad_a[3] = g[0] * s[5] * slope_of_sigmoid(s[3]);
    grad_before[0] = 0;
    grad_before[1] = g[1] * s[1];
  }
  template <class T>
  MAML_HOST_DEVICE static void backward_tangent(const T (&s)[6], const T (&s_dot)[6], const T (&before)[2],
                                                const T (&before_dot)[2], const T (&g)[2], T (&g_dot)[2],
                                                T (&grad_a)[4], T (&)[4], T (&grad_a_dot)[4], T (&)[4],
                                                T (&grad_before_dot)[2]) {
    const T slope = slope_of_tanh(s[5]);
    g_dot[1] += g_dot[0] * s[3] * slope + g[0] * (s_dot[3] * slope - 2 * s[3] * s[5] * s_dot[5]);
    const T of_i = g[1] * s[2], of_f = g[1] * before[1], of_g = g[1] * s[0], of_o = g[0] * s[5];
    grad_a[0] = of_i * slope_of_sigmoid(s[0]);
    grad_a[1] = of_f * slope_of_sigmoid(s[1]);
    grad_a[2] = of_g * slope_of_tanh(s[2]);
    grad_a[3] = of_o * slope_of_sigmoid(s[3]);
    grad_a_dot[0] =
        (g_dot[1] * s[2] + g[1] * s_dot[2]) * slope_of_sigmoid(s[0]) + of_i * (1 - 2 * s[0]) * s_dot[0];
    grad_a_dot[1] = (g_dot[1] * before[1] + g[1] * before_dot[1]) * slope_of_sigmoid(s[1]) +
                    of_f * (1 - 2 * s[1]) * s_dot[1];
    grad_a_dot[2] = (g_dot[1] * s[0] + g[1] * s_dot[0]) * slope_of_tanh(s[2]) - 2 * of_g * s[2] * s_dot[2];
    grad_a_dot[3] =
        (g_dot[0] * s[5] + g[0] * s_dot[5]) * slope_of_sigmoid(s[3]) + of_o * (1 - 2 * s[3]) * s_dot[3];
    grad_before_dot[0] = 0;
    grad_before_dot[1] = g_dot[1] * s[1] + g[1] * s_dot[1];
  }
};

/// s: r, z, n, and u of n
template <>
struct CellDeclaration<Cell::gru> {
  static constexpr int gates = 3, states = 1, saved = 4;
  static constexpr bool sided = true;

  template <class T>
  MAML_HOST_DEVICE static T forward(const T (&a)[3], const T (&u)[3], const T (&before)[1], T (&s)[4]) {
    s[0] = logistic(a[0] + u[0]);
    s[1] = logistic(a[1] + u[1]);
    s[2] = tanh(a[2] + s[0] * u[2]);
    s[3] = u[2];
    return s[2] + s[1] * (before[0] - s[2]);
  }
  template <class T>
  MAML_HOST_DEVICE static T tangent(const T (&s)[4], const T (&before)[1], const T (&a_dot)[3],
                                    const T (&u_dot)[3], const T (&before_dot)[1], T (&s_dot)[4]) {
    s_dot[0] = slope_of_sigmoid(s[0]) * (a_dot[0] + u_dot[0]);
    s_dot[1] = slope_of_sigmoid(s[1]) * (a_dot[1] + u_dot[1]);
    s_dot[2] = slope_of_tanh(s[2]) * (a_dot[2] + s_dot[0] * s[3] + s[0] * u_dot[2]);
    s_dot[3] = u_dot[2];
    return s_dot[2] + s_dot[1] * (before[0] - s[2]) + s[1] * (before_dot[0] - s_dot[2]);
  }
  template <class T>
  MAML_HOST_DEVICE static void backward(const T (&s)[4], const T (&before)[1], T (&g)[1], T (&grad_a)[3],
                                        T (&grad_u)[3], T (&grad_before)[1]) {
    grad_a[2] = g[0] * (1 - s[1]) * slope_of_tanh(s[2]);
    grad_a[0] = grad_u[0] = grad_a[2] * s[3] * slope_of_sigmoid(s[0]);
    grad_a[1] = grad_u[1] = g[0] * (before[0] - s[2]) * slope_of_sigmoid(s[1]);
    grad_u[2] = grad_a[2] * s[0];
    grad_before[0] = g[0] * s[1];
  }
  template <class T>
  MAML_HOST_DEVICE static void backward_tangent(const T (&s)[4], const T (&s_dot)[4], const T (&before)[1],
                                                const T (&before_dot)[1], const T (&g)[1], T (&g_dot)[1],
                                                T (&grad_a)[3], T (&grad_u)[3], T (&grad_a_dot)[3],
                                                T (&grad_u_dot)[3], T (&grad_before_dot)[1]) {
    const T of_n = g[0] * (1 - s[1]), of_z = g[0] * (before[0] - s[2]);
    const T of_n_dot = g_dot[0] * (1 - s[1]) - g[0] * s_dot[1];
    const T of_z_dot = g_dot[0] * (before[0] - s[2]) + g[0] * (before_dot[0] - s_dot[2]);
    grad_a[2] = of_n * slope_of_tanh(s[2]);
    grad_a_dot[2] = of_n_dot * slope_of_tanh(s[2]) - 2 * of_n * s[2] * s_dot[2];
    const T of_r = grad_a[2] * s[3], of_r_dot = grad_a_dot[2] * s[3] + grad_a[2] * s_dot[3];
    grad_a[0] = grad_u[0] = of_r * slope_of_sigmoid(s[0]);
    grad_a_dot[0] = grad_u_dot[0] = of_r_dot * slope_of_sigmoid(s[0]) + of_r * (1 - 2 * s[0]) * s_dot[0];
    grad_a[1] = grad_u[1] = of_z * slope_of_sigmoid(s[1]);
    grad_a_dot[1] = grad_u_dot[1] = of_z_dot * slope_of_sigmoid(s[1]) + of_z * (1 - 2 * s[1]) * s_dot[1];
    grad_u[2] = grad_a[2] * s[0];
    grad_u_dot[2] = grad_a_dot[2] * s[0] + grad_a[2] * s_dot[0];
    grad_before_dot[0] = g_dot[0] * s[1] + g[0] * s_dot[1];
  }
};

/// f.template operator()<C>() for the cell of a layer.
template <class F>
auto with_cell(Cell cell, F f) {
  switch (cell) {
    case Cell::rnn_tanh:
      return f.template operator()<Cell::rnn_tanh>();
    case Cell::rnn_relu:
      return f.template operator()<Cell::rnn_relu>();
    case Cell::gru:
      return f.template operator()<Cell::gru>();
    default:
      return f.template operator()<Cell::lstm>();
  }
}

MAML_HOST_DEVICE inline int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
MAML_HOST_DEVICE inline int states_of(Cell cell) { return cell == Cell::lstm ? 2 : 1; }

}  // namespace
}  // namespace maml
