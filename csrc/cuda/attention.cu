// y = softmax(scale q k' + bias) v, for all tasks (the formulas are in layers/attention.h). Plain kernels:
//
//   products   q k', g v', p v, ds k, ds' q, p' g and their tangents, a thread an element (contraction.h)
//   rows       the softmax of a row of scores, its tangent, the cotangents of the scores and their tangents,
//              a thread a row
//
// A pass has matrices as large as the scores in scratch, which all layers share; between passes nothing is
// kept. The twin on the CPU is cpu/attention.cpp.
#include <limits>

#include "cuda/contraction.h"

namespace maml::cuda {
namespace {

/// The matrices of a pass, each [batch, queries, keys]; null where a pass does not have it. Before the rows
/// they are products: q k', its tangent, g v' and its tangent.
template <class T>
struct Matrices {
  T *p, *p_dot, *ds, *ds_dot;
};

/// The rows of matrices and of the bias.
struct ScoreRows {
  Split<2> loops;
  int64_t keys, bias_stride;
};

template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    rows_kernel(const __grid_constant__ ScoreRows rows, Matrices<T> symbolic, const T* symbolic_bias,
                const T* symbolic_bias_dot, T scale, bool empty_is_zero, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  const int64_t task = blockIdx.z, keys = rows.keys;
  const T* of_bias = resolve(symbolic_bias, memory, task);
  const T* of_bias_dot = resolve(symbolic_bias_dot, memory, task);
  for (int64_t row = team.first(); row < rows.loops.outer.steps; row += team.step()) {
    const Offsets<2> at = outer_step(rows.loops, row);
    const auto row_of = [&](T* matrix) {
      return matrix ? resolve(matrix, memory, task) + at.of[0] : nullptr;
    };
    T *p = row_of(symbolic.p), *p_dot = row_of(symbolic.p_dot);
    T *ds = row_of(symbolic.ds), *ds_dot = row_of(symbolic.ds_dot);
    const auto score = [&](T product, const T* bias, int64_t j) {
      return bias ? scale * product + bias[at.of[1] + j * rows.bias_stride] : scale * product;
    };
    T largest = score(p[0], of_bias, 0);
    for (int64_t j = 0; j < keys; ++j) {
      p[j] = score(p[j], of_bias, j);
      if (p[j] > largest) largest = p[j];
    }
    if (empty_is_zero && largest == -std::numeric_limits<T>::infinity()) largest = 0;
    Sum<T> sum;
    for (int64_t j = 0; j < keys; ++j) {
      p[j] = std::exp(p[j] - largest);
      sum += p[j];
    }
    const T factor = empty_is_zero && sum.value() == 0 ? T(0) : 1 / sum.value();
    for (int64_t j = 0; j < keys; ++j) p[j] *= factor;
    if (p_dot) {
      Sum<T> mean;
      for (int64_t j = 0; j < keys; ++j) {
        p_dot[j] = score(p_dot[j], of_bias_dot, j);
        mean += p[j] * p_dot[j];
      }
      for (int64_t j = 0; j < keys; ++j) p_dot[j] = p[j] * (p_dot[j] - mean.value());
    }
    Sum<T> mean, mean_dot;
    for (int64_t j = 0; j < keys; ++j) {
      if (ds) mean += p[j] * ds[j];
      if (ds && p_dot) mean_dot += p_dot[j] * ds[j];
      if (ds_dot) mean_dot += p[j] * ds_dot[j];
    }
    for (int64_t j = 0; j < keys; ++j) {
      if (ds_dot) ds_dot[j] = p[j] * (ds_dot[j] - mean_dot.value());
      if (ds_dot && ds && p_dot) ds_dot[j] += p_dot[j] * (ds[j] - mean.value());
      if (ds) ds[j] = p[j] * (ds[j] - mean.value());
    }
  }
}

enum : int { kQ, kK, kV, kBias };

/// The passes of a layer on the tensors of a call.
template <class T>
class Attention {
 public:
  Attention(const Launcher& launch, const Layer& l, const Tensors<T>& t)
      : launch_(launch),
        l_(l),
        t_(t),
        scale_(static_cast<T>(l.a)),
        of_scores_(*l.loops),
        of_values_(*l.loops) {
    const int queries = l.loops->axes - 4;
    of_scores_.size[queries + 3] = 1;
    of_values_.size[queries + 2] = 1;
    int64_t size = 1;
    for (int a = queries + 1; a >= 0; --a) {
      matrix_.samples |= l.loops->size[a] == kSamples;
      matrix_.stride[a] = size;
      size *= extent(*l.loops, a, l.n);
    }
    matrix_.size = matrix_.samples ? size / l.n : size;
    count_ = size;
  }

  void forward() {
    const Matrices<T> m = matrices(true, false, false, false);
    scores({t_.x[kQ], t_.x[kK]}, {}, m.p);
    rows(m);
    values({m.p, t_.x[kV]}, {}, t_.y);
  }
  void backward() {
    const bool of_scores = wants_scores(t_.grad_x);
    const Matrices<T> m = matrices(true, false, of_scores, false);
    scores({t_.x[kQ], t_.x[kK]}, {}, m.p);
    if (m.ds) weights_gradient({t_.grad_y, t_.x[kV]}, {}, m.ds);
    rows(m);
    gradients(t_.grad_x, m.p, nullptr, t_.grad_y, nullptr, m.ds, nullptr);
  }
  void forward_tangent() {
    const Matrices<T> m = matrices(true, true, false, false);
    scores({t_.x[kQ], t_.x[kK]}, {}, m.p);
    scores({t_.x_dot[kQ], t_.x[kK]}, {t_.x[kQ], t_.x_dot[kK]}, m.p_dot);
    rows(m);
    values({m.p_dot, t_.x[kV]}, {m.p, t_.x_dot[kV]}, t_.y_dot);
  }
  void backward_tangent() {
    const bool bends = t_.grad_y && t_.y_dot, of_scores = wants_scores(t_.grad_x_dot);
    const Matrices<T> m = matrices(true, bends, bends && of_scores, of_scores);
    const T* const g = bends ? t_.grad_y : nullptr;
    scores({t_.x[kQ], t_.x[kK]}, {}, m.p);
    if (bends) scores({t_.x_dot[kQ], t_.x[kK]}, {t_.x[kQ], t_.x_dot[kK]}, m.p_dot);
    if (m.ds) weights_gradient({g, t_.x[kV]}, {}, m.ds);
    if (m.ds_dot) weights_gradient({t_.grad_y_dot, t_.x[kV]}, {g, t_.x_dot[kV]}, m.ds_dot);
    rows(m);
    gradients(t_.grad_x_dot, m.p, m.p_dot, t_.grad_y_dot, g, m.ds_dot, m.ds);
  }

 private:
  static bool wants_scores(T* const* grad) { return grad[kQ] || grad[kK] || grad[kBias]; }

  Matrices<T> matrices(bool p, bool p_dot, bool ds, bool ds_dot) const {
    const auto at = [&](bool wanted, int place) { return wanted ? t_.scratch + place * count_ : nullptr; };
    return {at(p, 0), at(p_dot, 1), at(ds, 2), at(ds_dot, 3)};
  }
  /// Both terms, without those of which a factor is zero.
  static Terms<T> terms(Factors<T> first, Factors<T> second) {
    const auto known = [](const Factors<T>& f) { return f.a && f.b ? f : Factors<T>{}; };
    return {{known(first), known(second)}};
  }
  const View& x(int j) const { return l_.loops->x[j]; }

  void scores(Factors<T> first, Factors<T> second, T* to) const {
    product(launch_, "attention scores", of_scores_, l_.n, matrix_, x(kQ), x(kK), terms(first, second), T(1),
            false, to);
  }
  void weights_gradient(Factors<T> first, Factors<T> second, T* to) const {
    product(launch_, "attention weights gradient", of_values_, l_.n, matrix_, l_.loops->y, x(kV),
            terms(first, second), T(1), false, to);
  }
  void values(Factors<T> first, Factors<T> second, T* to) const {
    product(launch_, "attention values", of_values_, l_.n, l_.loops->y, matrix_, x(kV), terms(first, second),
            T(1), false, to);
  }
  void rows(const Matrices<T>& m) const {
    Loops before = *l_.loops;
    before.axes -= 3;
    const int keys = before.axes;
    const ScoreRows rows{split<2>(before, l_.n, matrix_, {&matrix_, &x(kBias)}), l_.loops->size[keys],
                         x(kBias).stride[keys]};
    launch_("attention rows", rows_kernel<T>, step_grid(rows.loops.outer.steps), kElementThreads, 0, rows, m,
            t_.x[kBias], t_.x_dot[kBias], scale_, l_.b != 0, launch_.memory);
  }
  /// The cotangents of the inputs: of p' g + p_dot' g_dot, and the like.
  void gradients(T* const* to, const T* p, const T* p_dot, const T* g, const T* g_dot, const T* ds,
                 const T* ds_dot) const {
    const auto add = [&](int j, const Loops& loops, const View& a, const View& b, T scale, Factors<T> first,
                         Factors<T> second) {
      if (!to[j]) return;
      product(launch_, "attention gradient", loops, l_.n, x(j), a, b, terms(first, second), scale,
              t_.add_x[j], to[j]);
    };
    const bool bends = ds_dot != nullptr;
    add(kQ, of_scores_, matrix_, x(kK), scale_, {ds, t_.x[kK]}, {ds_dot, bends ? t_.x_dot[kK] : nullptr});
    add(kK, of_scores_, matrix_, x(kQ), scale_, {ds, t_.x[kQ]}, {ds_dot, bends ? t_.x_dot[kQ] : nullptr});
    add(kV, of_values_, matrix_, l_.loops->y, T(1), {p, g}, {p_dot, g_dot});
    if (!to[kBias]) return;
    Loops scores = of_scores_;
    scores.axes -= 2;
    sum(launch_, "attention bias gradient", scores, l_.n, matrix_, x(kBias), T(1), ds, t_.add_x[kBias],
        to[kBias]);
  }

  const Launcher& launch_;
  const Layer& l_;
  const Tensors<T>& t_;
  const T scale_;
  Loops of_scores_, of_values_;  // without the axis of the width, and of the depth
  View matrix_;                  // one of the matrices
  int64_t count_;                // its elements
};

}  // namespace

template <>
struct OnGpu<Kind::attention> {
  static Footprint footprint(const Layer& l) {
    const AttentionSizes s(*l.loops);
    return {0, 4 * attention_batch(*l.loops, l.n) * s.queries * s.keys};
  }
  template <class T>
  static LaunchPasses<T> passes() {
    return {
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          Attention<T>(launch, l, t).forward();
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          Attention<T>(launch, l, t).backward();
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          Attention<T>(launch, l, t).forward_tangent();
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          Attention<T>(launch, l, t).backward_tangent();
        },
    };
  }
};
template struct Implementation<Kind::attention>;

}  // namespace maml::cuda
