// recurrence: a layer of an LSTM, GRU or RNN over time (the formulas of a step are in layers/cells.h). Rows
// are the samples at one step of time, m = t n + s. With da, du the cotangents of a and u (du = da but for
// the GRU):
//
//   forward            a = x W_ih + b_ih of all rows as one product; then step by step u = h W_hh + b_hh and
//                      the cell
//   backward           backwards in time the cell, and grad_h = du W_hh' + its own part; then of all rows
//                      grad_x = da W_ih', grad_W_ih = x' da, grad_W_hh = h' du, and sums for the biases
//   forward_tangent    Ra = Rx W_ih + x RW_ih + Rb_ih, Ru likewise, step by step
//   backward_tangent   R{grad_h} = Rdu W_hh' + du RW_hh' + ..., and products of two terms in place of one
//
// Saved are [row, saved, hidden] from `forward` (a is in the same place before), then the cotangents of the
// states [row, states, hidden] from `backward`; saved_dot has the tangents of the first. The cotangents da,
// du are computed again by `backward_tangent`, which takes less time than to keep them.
//
// Threads share the products and the samples of a step. The twin on the GPU is cuda/recurrence.cu.
#include <algorithm>

#include "cpu/implement.h"
#include "cpu/strided.h"
#include "cpu/vector_math.h"

namespace maml::MAML_ISA {
namespace {

template <class T, Cell C>
class OverTime {
  using Declared = CellDeclaration<C>;
  using Number = InLoop<T>;
  static constexpr int kGates = Declared::gates, kStates = Declared::states, kSaved = Declared::saved;
  /// A cotangent of both sides of a cell.
  struct Sides {
    T *a = nullptr, *u = nullptr;
  };

 public:
  OverTime(const Layer& l, const Tensors<T>& t)
      : loops_(l.loops), r_(l.loops[0], l.n), t_(t), n_(r_.n), hidden_(r_.hidden), rest_(t.scratch) {
    x_row_ = take_rows(rows());
    y_row_ = take_rows(rows());
    saved_row_ = take_rows(rows());
    side_row_ = take_rows(rows());
    for (int64_t m = 0; m < rows(); ++m) {
      const int64_t step = m / n_, s = m % n_;
      const View& x = loops_[0].x[0];
      x_row_[m] = static_cast<int32_t>(x.offset + s * x.size + step * x.stride[1]);
      y_row_[m] = static_cast<int32_t>(s * r_.of_sample + step * hidden_);
      saved_row_[m] = static_cast<int32_t>(m * kSaved * hidden_);
      side_row_[m] = static_cast<int32_t>(m * width());
    }
    for (int k = 0; k < kStates; ++k) {
      start_row_[k] = take_rows(n_);
      if (!t.x[1 + k]) continue;
      const View& state = loops_[1 + k].x[0];
      for (int64_t s = 0; s < n_; ++s) {
        start_row_[k][s] = static_cast<int32_t>(state.offset + s * state.stride[0]);
      }
    }
    state_row_ = take_rows(n_);
    for (int64_t s = 0; s < n_; ++s) state_row_[s] = static_cast<int32_t>(s * hidden_);
    zeros_ = take(hidden_);
    std::fill_n(zeros_, hidden_, T(0));
  }

  static Footprint footprint(const Layer& l) {
    const RecurrenceSizes r(l.loops[0], l.n);
    const int64_t rows = r.n * r.length, width = kGates * r.hidden;
    const int64_t offsets = 4 * rows + (1 + kStates) * r.n, sides = (Declared::sided ? 4 : 2) * rows * width;
    const int64_t weights = 2 * width * std::max(r.hidden, r.in), states = kStates * r.n * r.hidden;
    return {rows * (kSaved + kStates) * r.hidden,
            offsets + r.hidden + std::max(r.n * width, sides + 2 * weights + states),
            rows * kSaved * r.hidden};
  }

  void forward() {
    const Term<T> of_x{t_.x[0], t_.w[0]};
    gather(rows(), &of_x, 1, x_row_, r_.in, width(), t_.w[2], false, t_.saved, saved_row_);
    T* u = take(n_ * width());
    for (int64_t step = 0; step < r_.length; ++step) {
      const Term<T> of_h{step ? t_.y : t_.x[1], t_.w[1]};
      gather(n_, &of_h, of_h.a ? 1 : 0, before_rows(step), hidden_, width(), t_.w[3], false, u, side_row_);
      each_sample(step, [&](int64_t s, int64_t m) {
        const T* of_u = u + s * width();
        T *saved = t_.saved + saved_row_[m], *y = t_.y + y_row_[m];
        const States before = states_before(step, s, t_.x, t_.y, t_.saved);
#pragma omp simd
        for (int64_t j = 0; j < hidden_; ++j) {
          Number a[kGates], own[kGates], state[kStates], result[kSaved];
          read(saved, j, a), read(of_u, j, own), before.read(j, state);
          y[j] = plain(Declared::forward(a, own, state, result));
          write(result, saved, j);
        }
      });
    }
    copy_last_cell(t_.saved, t_.y);
  }

  void backward() { back(t_.grad_y, t_.grad_x, t_.grad_w, true); }

  void forward_tangent() {
    Term<T> terms[2];
    int count = of_both(t_.x_dot[0], t_.w[0], t_.x[0], t_.w_dot[0], terms);
    gather(rows(), terms, count, x_row_, r_.in, width(), t_.w_dot[2], false, t_.saved_dot, saved_row_);
    T* u_dot = take(n_ * width());
    for (int64_t step = 0; step < r_.length; ++step) {
      count = of_both(step ? t_.y_dot : t_.x_dot[1], t_.w[1], step ? t_.y : t_.x[1], t_.w_dot[1], terms);
      gather(n_, terms, count, before_rows(step), hidden_, width(), t_.w_dot[3], false, u_dot, side_row_);
      each_sample(step, [&](int64_t s, int64_t m) {
        const T *of_u = u_dot + s * width(), *saved = t_.saved + saved_row_[m];
        T *saved_dot = t_.saved_dot + saved_row_[m], *y_dot = t_.y_dot + y_row_[m];
        const States before = states_before(step, s, t_.x, t_.y, t_.saved);
        const States before_dot = states_before(step, s, t_.x_dot, t_.y_dot, t_.saved_dot);
#pragma omp simd
        for (int64_t j = 0; j < hidden_; ++j) {
          T a_dot[kGates], own_dot[kGates], state[kStates], state_dot[kStates], value[kSaved], result[kSaved];
          read(saved_dot, j, a_dot), read(of_u, j, own_dot), read(saved, j, value);
          before.read(j, state), before_dot.read(j, state_dot);
          y_dot[j] = Declared::tangent(value, state, a_dot, own_dot, state_dot, result);
          write(result, saved_dot, j);
        }
      });
    }
    copy_last_cell(t_.saved_dot, t_.y_dot);
  }

  void backward_tangent() {
    if (!t_.grad_y || !t_.y_dot) return back(t_.grad_y_dot, t_.grad_x_dot, t_.grad_w_dot, false);
    const Sides grad = take_sides(), grad_dot = take_sides();
    T* carry_dot[kStates];
    start_carry(t_.grad_y_dot, carry_dot);
    const T *transposed = take_transposed(t_.w[1], hidden_),
            *transposed_dot = take_transposed(t_.w_dot[1], hidden_);
    for (int64_t step = r_.length - 1; step >= 0; --step) {
      each_sample(step, [&](int64_t s, int64_t m) {
        const T *saved = t_.saved + saved_row_[m], *saved_dot = t_.saved_dot + saved_row_[m];
        const T *kept = cotangents(m), *grad_y_dot = t_.grad_y_dot + y_row_[m];
        const States before = states_before(step, s, t_.x, t_.y, t_.saved);
        const States before_dot = states_before(step, s, t_.x_dot, t_.y_dot, t_.saved_dot);
        const Sides to = at_row(grad, m), to_dot = at_row(grad_dot, m);
        const Carry carry(carry_dot, s * hidden_);
#pragma omp simd
        for (int64_t j = 0; j < hidden_; ++j) {
          T value[kSaved], value_dot[kSaved], state[kStates], state_dot[kStates], g[kStates], g_dot[kStates];
          T of_a[kGates], of_u[kGates], of_a_dot[kGates], of_u_dot[kGates], result[kStates];
          read(saved, j, value), read(saved_dot, j, value_dot), read(kept, j, g);
          before.read(j, state), before_dot.read(j, state_dot), carry.read(j, g_dot);
          g_dot[0] += grad_y_dot[j];
          Declared::backward_tangent(value, value_dot, state, state_dot, g, g_dot, of_a, of_u, of_a_dot,
                                     of_u_dot, result);
          write_sides(of_a, of_u, to, j), write_sides(of_a_dot, of_u_dot, to_dot, j);
          carry.write(result, j);
        }
      });
      if (step == 0 && !t_.grad_x_dot[1]) break;
      Term<T> terms[2];
      const int count = of_both(grad_dot.u, transposed, grad.u, transposed_dot, terms);
      gather(n_, terms, count, side_row_ + step * n_, width(), hidden_, nullptr, true, carry_dot[0],
             state_row_);
    }
    finish(grad_dot, grad, carry_dot, t_.grad_x_dot, t_.grad_w_dot);
  }

 private:
  /// The states before a step, of one sample.
  struct States {
    const T* of[kStates];
    template <class N>
    void read(int64_t j, N (&state)[kStates]) const {
#pragma GCC unroll 2
      for (int k = 0; k < kStates; ++k) state[k] = of[k][j];
    }
  };
  /// The cotangents of the states between two steps, of one sample.
  struct Carry {
    T* of[kStates];
    Carry(T* const (&all)[kStates], int64_t at) {
      for (int k = 0; k < kStates; ++k) of[k] = all[k] + at;
    }
    void read(int64_t j, T (&g)[kStates]) const {
#pragma GCC unroll 2
      for (int k = 0; k < kStates; ++k) g[k] = of[k][j];
    }
    void write(const T (&g)[kStates], int64_t j) const {
#pragma GCC unroll 2
      for (int k = 0; k < kStates; ++k) of[k][j] = g[k];
    }
  };

  template <class N, int Count>
  void read(const T* row, int64_t j, N (&to)[Count]) const {
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) to[i] = row[i * hidden_ + j];
  }
  template <class N, int Count>
  void write(const N (&from)[Count], T* row, int64_t j) const {
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) row[i * hidden_ + j] = plain(from[i]);
  }
  void write_sides(const T (&a)[kGates], const T (&u)[kGates], const Sides& to, int64_t j) const {
    write(a, to.a, j);
    if constexpr (Declared::sided) write(u, to.u, j);
  }

  int64_t rows() const { return n_ * r_.length; }
  int64_t width() const { return kGates * hidden_; }
  T* take(int64_t count) { return std::exchange(rest_, rest_ + count); }
  int32_t* take_rows(int64_t count) { return reinterpret_cast<int32_t*>(take(count)); }
  Sides take_sides() {
    T* a = take(rows() * width());
    return {a, Declared::sided ? take(rows() * width()) : a};
  }
  Sides at_row(const Sides& all, int64_t m) const { return {all.a + side_row_[m], all.u + side_row_[m]}; }
  /// The transpose of a weight with `depth` rows; null for null.
  const T* take_transposed(const T* w, int64_t depth) {
    if (!w) return nullptr;
    T* to = take(depth * width());
    transpose(1, depth, width(), w, to);
    return to;
  }
  /// The cotangents of the states that `backward` saves.
  T* cotangents(int64_t m) const { return t_.saved + (rows() * kSaved + m * kStates) * hidden_; }

  const int32_t* before_rows(int64_t step) const { return step ? y_row_ + (step - 1) * n_ : start_row_[0]; }
  /// The states before a step from tensors that are like the inputs, the output and what is saved.
  States states_before(int64_t step, int64_t s, const T* const* x, const T* y, const T* saved) const {
    States states;
    const int64_t m = (step - 1) * n_ + s;
    states.of[0] = step ? y + y_row_[m] : x[1] ? x[1] + start_row_[0][s] : zeros_;
    if constexpr (kStates == 2) {
      states.of[1] = step ? saved + saved_row_[m] + kCell * hidden_ : x[2] ? x[2] + start_row_[1][s] : zeros_;
    }
    return states;
  }
  void copy_last_cell(const T* saved, T* y) const {
    if constexpr (kStates == 2) {
      for (int64_t s = 0; s < n_; ++s) {
        const int64_t m = rows() - n_ + s;
        std::copy_n(saved + saved_row_[m] + kCell * hidden_, hidden_, y + y_row_[m] + hidden_);
      }
    }
  }
  /// The cotangents of the states after the last step, without that of the last output.
  void start_carry(const T* grad_y, T* (&carry)[kStates]) {
    for (int k = 0; k < kStates; ++k) carry[k] = take(n_ * hidden_);
    std::fill_n(carry[0], n_ * hidden_, T(0));
    if constexpr (kStates == 2) {
      for (int64_t s = 0; s < n_; ++s) {
        std::copy_n(grad_y + y_row_[rows() - n_ + s] + hidden_, hidden_, carry[1] + s * hidden_);
      }
    }
  }

  /// f(s, m) for every sample at one step.
  template <class F>
  void each_sample(int64_t step, F f) const {
    share_samples(n_, 2 * width(), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) f(s, step * n_ + s);
    });
  }

  /// The terms a b + c d without those that are zero; their number.
  static int of_both(const T* a, const T* b, const T* c, const T* d, Term<T> (&terms)[2]) {
    int count = 0;
    if (a && b) terms[count++] = {a, b};
    if (c && d) terms[count++] = {c, d};
    return count;
  }
  /// c = bias + the sum of a b over the terms, or added to c, for some rows.
  static void gather(int64_t rows, const Term<T>* terms, int count, const int32_t* a_row, int64_t depth,
                     int64_t width, const T* bias, bool add, T* c, const int32_t* c_row) {
    const int64_t start = 0;
    GatherProduct<T> p{};
    std::copy_n(terms, count, p.term);
    p.terms = count;
    p.runs = {1, depth, &start};
    p.row = a_row, p.m = rows, p.n = width, p.c = c, p.c_row = c_row, p.bias = bias, p.add = add;
    gather_product(p);
  }
  /// d (+)= the sum of a' g over the terms.
  void outer(int64_t rows, const Term<T>* terms, int count, const int32_t* a_row, int64_t depth, bool add,
             T* d) const {
    if (rows == 0 || count == 0) {
      if (!add) std::fill_n(d, depth * width(), T(0));
      return;
    }
    const int64_t start = 0;
    OuterProduct<T> p{};
    std::copy_n(terms, count, p.term);
    p.terms = count;
    p.runs = {1, depth, &start};
    p.row = a_row, p.m = rows, p.n = width(), p.d = d, p.add = add;
    outer_product(p);
  }

  /// Backwards in time for the cotangent g of the output. `keep`: save the cotangents of the states.
  void back(const T* g, T* const* grad_x, T* const* grad_w, bool keep) {
    const Sides grad = take_sides();
    T* carried[kStates];
    start_carry(g, carried);
    const T* transposed = take_transposed(t_.w[1], hidden_);
    for (int64_t step = r_.length - 1; step >= 0; --step) {
      each_sample(step, [&](int64_t s, int64_t m) {
        const T *saved = t_.saved + saved_row_[m], *grad_y = g + y_row_[m];
        const States before = states_before(step, s, t_.x, t_.y, t_.saved);
        const Sides to = at_row(grad, m);
        const Carry carry(carried, s * hidden_);
        T* kept = cotangents(m);
#pragma omp simd
        for (int64_t j = 0; j < hidden_; ++j) {
          T value[kSaved], state[kStates], of_states[kStates], of_a[kGates], of_u[kGates], result[kStates];
          read(saved, j, value), before.read(j, state), carry.read(j, of_states);
          of_states[0] += grad_y[j];
          Declared::backward(value, state, of_states, of_a, of_u, result);
          write_sides(of_a, of_u, to, j), carry.write(result, j);
          if (keep) write(of_states, kept, j);
        }
      });
      if (step == 0 && !grad_x[1]) break;
      const Term<T> term{grad.u + step * n_ * width(), transposed};
      gather(n_, &term, 1, side_row_, width(), hidden_, nullptr, true, carried[0], state_row_);
    }
    finish(grad, {}, carried, grad_x, grad_w);
  }

  /// The cotangents of inputs and parameters: `first` with the values of the others, `second` with their
  /// tangents. `carried`: those of the initial states.
  void finish(const Sides& first, const Sides& second, T* const (&carried)[kStates], T* const* grad_x,
              T* const* grad_w) {
    Term<T> terms[2];
    if (grad_w[0]) {
      const int count = of_both(t_.x[0], first.a, t_.x_dot[0], second.a, terms);
      outer(rows(), terms, count, x_row_, r_.in, t_.add_w[0], grad_w[0]);
    }
    if (grad_w[1]) {
      const int64_t later = n_ * width();  // the rows of all steps but the first
      int count = of_both(t_.y, first.u + later, t_.y_dot, second.u ? second.u + later : nullptr, terms);
      outer(rows() - n_, terms, count, y_row_, hidden_, t_.add_w[1], grad_w[1]);
      count = of_both(t_.x[1], first.u, t_.x_dot[1], second.u, terms);
      outer(n_, terms, count, start_row_[0], hidden_, true, grad_w[1]);
    }
    if (grad_w[2]) column_sums(rows(), width(), first.a, t_.add_w[2], grad_w[2]);
    if (grad_w[3]) column_sums(rows(), width(), first.u, t_.add_w[3], grad_w[3]);
    if (grad_x[0]) {
      const View& x = loops_[0].x[0];
      const bool add = t_.add_x[0] || !x.whole;
      if (!t_.add_x[0] && !x.whole) set_to_zero(x, n_, grad_x[0]);
      const T *w = take_transposed(t_.w[0], r_.in),
              *w_dot = second.a ? take_transposed(t_.w_dot[0], r_.in) : nullptr;
      const int count = of_both(first.a, w, second.a, w_dot, terms);
      gather(rows(), terms, count, side_row_, width(), r_.in, nullptr, add, grad_x[0], x_row_);
    }
    for (int k = 0; k < kStates; ++k) {
      if (!grad_x[1 + k]) continue;
      const Loops& state = loops_[1 + k];
      const View from{hidden_, true, true, 0, {hidden_, 1}};
      accumulate(state, n_, state.x[0], grad_x[1 + k], from, carried[k], t_.add_x[1 + k]);
    }
  }

  const Loops* loops_;
  const RecurrenceSizes r_;
  const Tensors<T>& t_;
  const int64_t n_, hidden_;
  T* rest_;  // of the scratch
  // Offsets of rows: in x, in y, in what is saved, in cotangents of a and u, in initial states, in states.
  int32_t *x_row_, *y_row_, *saved_row_, *side_row_, *start_row_[kStates], *state_row_;
  T* zeros_;
};

/// f on the recurrence of a layer.
template <class T, class F>
void run(const Layer& l, const Tensors<T>& t, F f) {
  with_cell(l.cell, [&]<Cell C> {
    OverTime<T, C> recurrence(l, t);
    f(recurrence);
  });
}

}  // namespace

template <>
struct OnCpu<Kind::recurrence> {
  static Footprint footprint(const Layer& l) {
    return with_cell(l.cell, [&]<Cell C> { return OverTime<float, C>::footprint(l); });
  }
  template <class T>
  static Passes<T> passes() {
    return {
        [](const Layer& l, const Tensors<T>& t) { run(l, t, [](auto& r) { r.forward(); }); },
        [](const Layer& l, const Tensors<T>& t) { run(l, t, [](auto& r) { r.backward(); }); },
        [](const Layer& l, const Tensors<T>& t) { run(l, t, [](auto& r) { r.forward_tangent(); }); },
        [](const Layer& l, const Tensors<T>& t) { run(l, t, [](auto& r) { r.backward_tangent(); }); },
    };
  }
};
template struct Implementation<Kind::recurrence>;

}  // namespace maml::MAML_ISA
