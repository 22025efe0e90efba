// The inner optimizers on packed parameter vectors (meta_gradient.h, optimizers.h). V is T, or a vector of T
// with one task in each lane; the hyperparameters are the same for all tasks.
//
// Loops go over elements, and inside over lanes, on numbers of T, so that the compiler makes vectors of
// either. Sums over elements are in double and in their order.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/run/share.h"
#include "cpu/simd.h"
#include "optimizers.h"

namespace maml::MAML_ISA {

/// Calls f<R, S>() for the rule R with S states.
template <class F>
void with_form(const RuleForm& form, F f) {
  const int states = states_of(form);
  switch (form.rule) {
    case Rule::sgd:
      return states > 0 ? f.template operator()<Rule::sgd, 1>() : f.template operator()<Rule::sgd, 0>();
    case Rule::adam:
      return f.template operator()<Rule::adam, 2>();
    case Rule::adamw:
      return f.template operator()<Rule::adamw, 2>();
    case Rule::adamax:
      return f.template operator()<Rule::adamax, 2>();
    case Rule::rmsprop:
      return states == 1   ? f.template operator()<Rule::rmsprop, 1>()
             : states == 2 ? f.template operator()<Rule::rmsprop, 2>()
                           : f.template operator()<Rule::rmsprop, 3>();
    case Rule::adagrad:
      return f.template operator()<Rule::adagrad, 1>();
  }
}

template <class V, class T>
struct OptimizerSteps {
  const T* rates;  // packed

  static constexpr int64_t W = sizeof(V) / sizeof(T);
  using Slices = std::vector<UpdateSlice>;

  void start(const Slices& slices, V* state) const {
    for (const UpdateSlice& s : slices) {
      for (int j = 0; j < states_of(s.form); ++j) {
        T* to = numbers(state + j * s.stride + s.at);
        for (int64_t i = 0; i < s.size; ++i) {
          std::fill_n(to + i * W, W, static_cast<T>(value(s.start[j], i)));
        }
      }
    }
  }

  void clip(const Slices& slices, const V* g, V* clip) const {
    double sum[W];
    inner_products(slices, g, g, sum);
    for (int64_t lane = 0; lane < W; ++lane) {
      const ClipFactor found = clip_factor(slices[0].clip.norm, std::sqrt(sum[lane]));
      numbers(clip)[lane] = static_cast<T>(found.factor);
      numbers(clip + 1)[lane] = static_cast<T>(found.slope);
    }
  }

  void clip_adjoint(const Slices& slices, const V* g, V* clip, V* out) const {
    double sum[W];
    inner_products(slices, g, out, sum);
    T factor[W], along[W];
    for (int64_t lane = 0; lane < W; ++lane) {
      factor[lane] = numbers(clip)[lane];
      along[lane] = static_cast<T>(static_cast<double>(numbers(clip + 1)[lane]) * sum[lane]);
    }
    for (const UpdateSlice& s : slices) {
      const T* own = numbers(g + s.at);
      T* to = numbers(out + s.at);
      share_elements(s.size, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          for (int64_t l = 0; l < W; ++l)
            to[i * W + l] = factor[l] * to[i * W + l] - along[l] * own[i * W + l];
        }
      });
    }
  }

  void update(const Slices& slices, const BeforeStep<V>& before, V* next, V* next_state) const {
    for (const UpdateSlice& s : slices) {
      with_form(s.form, [&]<Rule R, int S>() {
        const Read<S> read(s, before);
        T *phi = numbers(next + s.at), *states[kMostStates];
        for (int j = 0; next_state && j < S; ++j) states[j] = numbers(next_state + j * s.stride + s.at);
        share_elements(s.size, [&](int64_t first, int64_t last) {
          if (next_state) {
            each<R>(s, before.step, first, last, [=](int64_t e, int64_t lane, const Coefficients<T>& c) {
              Element<T> x = read.at(e, lane);
              Optimizer<R>::step(read.form, c, x);
              phi[e] = x.phi;
              for (int j = 0; j < S; ++j) states[j][e] = x.state[j];
            });
          } else {
            each<R>(s, before.step, first, last, [=](int64_t e, int64_t lane, const Coefficients<T>& c) {
              Element<T> x = read.at(e, lane);
              Optimizer<R>::step(read.form, c, x);
              phi[e] = x.phi;
            });
          }
        });
      });
    }
  }

  /// `out` may be null.
  void update_adjoint(const Slices& slices, const BeforeStep<V>& before, V* v, V* sigma, V* out) const {
    for (const UpdateSlice& s : slices) {
      with_form(s.form, [&]<Rule R, int S>() {
        const Read<S> read(s, before);
        T *own_v = numbers(v + s.at), *own_sigma[kMostStates], *to = out ? numbers(out + s.at) : nullptr;
        for (int j = 0; j < S; ++j) own_sigma[j] = numbers(sigma + j * s.stride + s.at);
        auto adjoint = [=](int64_t e, int64_t lane, const Coefficients<T>& c) {
          ElementAdjoint<T> d = read.template adjoint<R>(e, lane, c, own_v, own_sigma);
          own_v[e] = d.phi;
          for (int j = 0; j < S; ++j) own_sigma[j][e] = d.state[j];
          return d.g;
        };
        share_elements(s.size, [&](int64_t first, int64_t last) {
          if (to) {
            each<R>(s, before.step, first, last,
                    [=](int64_t e, int64_t lane, const Coefficients<T>& c) { to[e] = -adjoint(e, lane, c); });
          } else {
            each<R>(s, before.step, first, last,
                    [=](int64_t e, int64_t lane, const Coefficients<T>& c) { adjoint(e, lane, c); });
          }
        });
      });
    }
  }

  void hyper_gradients(const Slices& slices, const BeforeStep<V>& before, const V* v, const V* sigma,
                       V* result) const {
    for (const UpdateSlice& s : slices) {
      if (s.learns) with_form(s.form, [&]<Rule R, int S>() { gradients<R, S>(s, before, v, sigma, result); });
    }
  }

  void start_gradients(const Slices& slices, const V* sigma, V* result) const {
    for (const UpdateSlice& s : slices) {
      for (int j = 0; j < states_of(s.form); ++j) {
        const Source& start = s.start[j];
        if (start.grad_at == kNowhere) continue;
        const T* own = numbers(sigma + j * s.stride + s.at);
        Sum sum(start, result);
        sum.add(0, s.size, own);
        sum.store();
      }
    }
  }

 private:
  static const T* numbers(const V* x) { return reinterpret_cast<const T*>(x); }
  static T* numbers(V* x) { return reinterpret_cast<T*>(x); }

  /// What is read of a parameter with S states before a step. Element e has the lanes with it.
  template <int S>
  struct Read {
    RuleForm form;
    T most;  // of clipping by value
    const T *phi, *g, *factor, *state[kMostStates];

    Read(const UpdateSlice& s, const BeforeStep<V>& b)
        : form(s.form),
          most(static_cast<T>(s.clip.value)),
          phi(numbers(b.phi + s.at)),
          g(numbers(b.g + s.at)),
          factor(b.clip ? numbers(b.clip) : nullptr) {
      for (int j = 0; j < S; ++j) state[j] = numbers(b.state + j * s.stride + s.at);
    }
    T scaled(int64_t e, int64_t lane) const { return factor ? factor[lane] * g[e] : g[e]; }
    Element<T> at(int64_t e, int64_t lane) const {
      Element<T> x{phi[e], clamped(scaled(e, lane), most), {}};
      for (int j = 0; j < S; ++j) x.state[j] = state[j][e];
      return x;
    }
    /// From the cotangents after the step.
    template <Rule R>
    ElementAdjoint<T> adjoint(int64_t e, int64_t lane, const Coefficients<T>& c, const T* v,
                              const T* const* sigma) const {
      ElementAdjoint<T> d{};
      d.phi = v[e];
      for (int j = 0; j < S; ++j) d.state[j] = sigma[j][e];
      Optimizer<R>::adjoint(form, c, at(e, lane), d);
      if (!is_inside(scaled(e, lane), most)) d.g = T(0);
      return d;
    }
  };

  /// Adds the gradients of elements to that of a hyperparameter or an initial state.
  struct Sum {
    const Source& source;
    T* to;
    double of_lane[W] = {};

    Sum(const Source& s, V* result) : source(s), to(numbers(result + s.grad_at)) {}
    void add(int64_t first, int64_t last, const T* x) {
      for (int64_t i = 0; i < last - first; ++i) {
        for (int64_t lane = 0; lane < W; ++lane) {
          if (source.elementwise) {
            to[(first + i) * W + lane] += x[i * W + lane];
          } else {
            of_lane[lane] += static_cast<double>(x[i * W + lane]);
          }
        }
      }
    }
    void store() {
      if (source.elementwise) return;
      for (int64_t lane = 0; lane < W; ++lane) to[lane] += static_cast<T>(of_lane[lane]);
    }
  };

  template <Rule R, int S>
  void gradients(const UpdateSlice& s, const BeforeStep<V>& before, const V* v, const V* sigma,
                 V* result) const {
    constexpr int64_t kBlock = 64;  // elements
    const Read<S> read(s, before);
    const T *own_v = numbers(v + s.at), *own_sigma[kMostStates];
    for (int j = 0; j < S; ++j) own_sigma[j] = numbers(sigma + j * s.stride + s.at);
    std::vector<Sum> sums;
    std::vector<int> learned;
    for (int h = 0; h < kHyperparameters; ++h) {
      if (s.hyper[h].grad_at == kNowhere) continue;
      learned.push_back(h);
      sums.emplace_back(s.hyper[h], result);
    }
    T block[kHyperparameters][kBlock * W];
    for (int64_t first = 0; first < s.size; first += kBlock) {
      const int64_t last = std::min(s.size, first + kBlock);
      each<R>(s, before.step, first, last, [&](int64_t e, int64_t lane, const Coefficients<T>& c) {
        const ElementAdjoint<T> d = read.template adjoint<R>(e, lane, c, own_v, own_sigma);
        for (int h = 0; h < kHyperparameters; ++h) block[h][e - first * W] = d.hyper[h];
      });
      for (size_t h = 0; h < learned.size(); ++h) sums[h].add(first, last, block[learned[h]]);
    }
    for (Sum& sum : sums) sum.store();
  }

  static void inner_products(const Slices& slices, const V* x, const V* y, double* sum) {
    std::fill_n(sum, W, 0.0);
    for (const UpdateSlice& s : slices) {
      const T *own_x = numbers(x + s.at), *own_y = numbers(y + s.at);
      for (int64_t i = 0; i < s.size; ++i) {
        for (int64_t l = 0; l < W; ++l) {
          sum[l] += static_cast<double>(own_x[i * W + l]) * static_cast<double>(own_y[i * W + l]);
        }
      }
    }
  }

  double value(const Source& source, int64_t i) const {
    if (source.at == kNowhere) return source.constant;
    return static_cast<double>(rates[source.at + (source.elementwise ? i : 0)]);
  }
  template <Rule R>
  Coefficients<T> coefficients(const UpdateSlice& s, int64_t step, int64_t i) const {
    double h[kHyperparameters];
    for (int j = 0; j < kHyperparameters; ++j) h[j] = value(s.hyper[j], i);
    return Coefficients<T>::template of<R>(h, step, s.form.taken);
  }

  /// Calls f(element, lane, coefficients) for elements [first, last) of a parameter, whose calls have nothing
  /// to do with each other.
  template <Rule R, class F>
  void each(const UpdateSlice& s, int64_t step, int64_t first, int64_t last, F f) const {
    if (first >= last) return;
    Coefficients<T> c = coefficients<R>(s, step, first);
    if (s.elementwise) {
      for (int64_t i = first; i < last; ++i) {
        c = coefficients<R>(s, step, i);
        for (int64_t lane = 0; lane < W; ++lane) f(i * W + lane, lane, c);
      }
      return;
    }
    if constexpr (W == 1) {
#pragma GCC ivdep
      for (int64_t i = first; i < last; ++i) f(i, 0, c);
    } else {
      for (int64_t i = first; i < last; ++i) {
#pragma GCC ivdep
        for (int64_t lane = 0; lane < W; ++lane) f(i * W + lane, lane, c);
      }
    }
  }
};

}  // namespace maml::MAML_ISA
