// The inner optimizers on packed parameter vectors (meta_gradient.h, optimizers.h). V is T, or a vector of T
// with one task in each lane; the hyperparameters are the same for all tasks.
//
// Loops go over the numbers of a parameter, a vector Wide of them at a time: W tasks of one element, or
// kLanes elements of one task, whose last vector reaches into the gap behind the parameter (plan/packing.h).
// So the rules need no branch, and a task has the same bits in a lane as alone. Only where a hyperparameter
// is one for each element, a task alone goes number by number. Sums over elements are in double and in their
// order.
//
// The loops wait for memory, so they leave out what is known: states that begin as one number for all
// (start() writes only the others), the parameter in the adjoint where there is no weight decay, and
// cotangents of states that are zero or not wanted.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
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
  using Wide = Vector<T>;
  using Slices = std::vector<UpdateSlice>;

  void start(const Slices& slices, V* state) const {
    for (const UpdateSlice& s : slices) {
      for (int j = 0; j < states_of(s.form); ++j) {
        if (s.start[j].at == kNowhere) continue;
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
        const States<V> to(s, next_state);
        T* phi = numbers(next + s.at);
        share_elements(s.size, [&](int64_t first, int64_t last) {
          each<R>(s, before.step, first, last, [=]<class N>(int64_t i, const Coefficients<T>& c) {
            Element<N> x = read.template at<N>(i);
            Optimizer<R>::step(read.form, c, x);
            put(phi + i, x.phi);
            for (int j = 0; j < S; ++j) to.put(j, i, x.state[j]);
          });
        });
      });
    }
  }

  /// `sigma`, `next_sigma` and `out` may be null.
  void update_adjoint(const Slices& slices, const BeforeStep<V>& before, V* v, const V* sigma, V* next_sigma,
                      V* out) const {
    for (const UpdateSlice& s : slices) {
      with_form(s.form, [&]<Rule R, int S>() {
        const Read<S> read(s, before);
        const States<const V> own_sigma(s, sigma);
        const States<V> to_sigma(s, next_sigma);
        T *own_v = numbers(v + s.at), *to = out ? numbers(out + s.at) : nullptr;
        share_elements(s.size, [&](int64_t first, int64_t last) {
          each<R>(s, before.step, first, last, [=]<class N>(int64_t i, const Coefficients<T>& c) {
            const ElementAdjoint<N> d = read.template adjoint<R, N>(i, c, own_v, own_sigma);
            if (read.decays) put(own_v + i, d.phi);
            for (int j = 0; j < S; ++j) to_sigma.put(j, i, d.state[j]);
            if (to) put(to + i, -d.g);
          });
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

  /// A number, or the vector from there on.
  template <class N>
  static N get(const T* from) {
    if constexpr (std::is_same_v<N, T>) {
      return *from;
    } else {
      return load(from);
    }
  }
  static void put(T* to, T x) { *to = x; }
  static void put(T* to, Wide x) { store(to, x); }

  /// The states of a parameter, or their cotangents, in packed vectors P; null: zero, or not wanted.
  template <class P>
  struct States {
    using Number = std::conditional_t<std::is_const_v<P>, const T, T>;
    Number* of[kMostStates] = {};

    States(const UpdateSlice& s, P* packed) {
      for (int j = 0; packed && j < states_of(s.form); ++j) of[j] = numbers(packed + j * s.stride + s.at);
    }
    template <class N>
    N get(int j, int64_t i) const {
      return of[j] ? OptimizerSteps::get<N>(of[j] + i) : N{};
    }
    template <class N>
    void put(int j, int64_t i, N x) const {
      if (of[j]) OptimizerSteps::put(of[j] + i, x);
    }
  };

  /// What is read of a parameter with S states before a step: number i of the parameter, or the vector there.
  template <int S>
  struct Read {
    RuleForm form;
    bool clips;         // by value
    bool decays;        // whether there is weight decay
    Wide most, factor;  // of clipping by value and by norm
    const T *phi, *g;
    States<const V> state;
    bool begins[kMostStates];  // with the number `start`, in place of what is at `state`
    T start[kMostStates];

    Read(const UpdateSlice& s, const BeforeStep<V>& b)
        : form(s.form),
          clips(s.clip.value < std::numeric_limits<double>::infinity()),
          decays(s.hyper[kWeightDecay].at != kNowhere || s.hyper[kWeightDecay].constant != 0),
          most(broadcast(static_cast<T>(s.clip.value))),
          factor(broadcast(T(1))),
          phi(numbers(b.phi + s.at)),
          g(numbers(b.g + s.at)),
          state(s, b.state) {
      if (b.clip) factor = W == 1 ? broadcast(*numbers(b.clip)) : load(numbers(b.clip));
      for (int j = 0; j < S; ++j) {
        begins[j] = b.step == 0 && s.start[j].at == kNowhere;
        start[j] = static_cast<T>(s.start[j].constant);
      }
    }
    template <class N>
    static N as(const Wide& x) {
      if constexpr (std::is_same_v<N, T>) {
        return x[0];
      } else {
        return x;
      }
    }
    template <class N>
    N scaled(int64_t i) const {
      return as<N>(factor) * get<N>(g + i);
    }
    template <class N>
    Element<N> at(int64_t i, bool with_phi = true) const {
      Element<N> x{with_phi ? get<N>(phi + i) : N{}, scaled<N>(i), {}};
      if (clips) x.g = clamped<N>(x.g, as<N>(most));
      for (int j = 0; j < S; ++j) x.state[j] = begins[j] ? start[j] + N{} : state.template get<N>(j, i);
      return x;
    }
    /// From the cotangents after the step.
    template <Rule R, class N>
    ElementAdjoint<N> adjoint(int64_t i, const Coefficients<T>& c, const T* v,
                              const States<const V>& sigma) const {
      ElementAdjoint<N> d{};
      d.phi = get<N>(v + i);
      for (int j = 0; j < S; ++j) d.state[j] = sigma.template get<N>(j, i);
      Optimizer<R>::adjoint(form, c, at<N>(i, decays), d);
      if (clips) d.g = where_inside<N>(scaled<N>(i), as<N>(most), d.g);
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
    const States<const V> own_sigma(s, sigma);
    const T* own_v = numbers(v + s.at);
    std::vector<Sum> sums;
    std::vector<int> learned;
    for (int h = 0; h < kHyperparameters; ++h) {
      if (s.hyper[h].grad_at == kNowhere) continue;
      learned.push_back(h);
      sums.emplace_back(s.hyper[h], result);
    }
    alignas(64) T block[kHyperparameters][kBlock * W];
    for (int64_t first = 0; first < s.size; first += kBlock) {
      const int64_t last = std::min(s.size, first + kBlock);
      each<R>(s, before.step, first, last, [&]<class N>(int64_t i, const Coefficients<T>& c) {
        const ElementAdjoint<N> d = read.template adjoint<R, N>(i, c, own_v, own_sigma);
        for (int h = 0; h < kHyperparameters; ++h) put(block[h] + i - first * W, d.hyper[h]);
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

  /// Calls f<N>(i, coefficients) for all numbers i of elements [first, last) of a parameter, N of which it
  /// takes at once: a number T or a vector Wide.
  template <Rule R, class F>
  [[gnu::flatten]] void each(const UpdateSlice& s, int64_t step, int64_t first, int64_t last, F f) const {
    if (s.elementwise) {
      using N = std::conditional_t<W == 1, T, Wide>;
      for (int64_t i = first; i < last; ++i) f.template operator()<N>(i * W, coefficients<R>(s, step, i));
      return;
    }
    const Coefficients<T> c = coefficients<R>(s, step, 0);
    for (int64_t i = first * W; i < last * W; i += kLanes<T>) f.template operator()<Wide>(i, c);
  }
};

}  // namespace maml::MAML_ISA
