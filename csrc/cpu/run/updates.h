// The operations of the algorithm on packed parameter vectors (meta_gradient.h). V is T, or a vector of T
// with one task in each lane; the rates are the same for all tasks.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/run/optimizer_steps.h"
#include "cpu/run/transforms.h"
#include "plan/problem.h"

namespace maml::MAML_ISA {

template <class V, class T>
struct Updates : OptimizerSteps<V, T> {
  const T* query_weights;  // [steps + 1]

  void transform(const std::vector<UpdateSlice>& slices, int f, bool transposed, const V* x, V* y) const {
    for (const UpdateSlice& s : slices) transform_gradient(s, f, transposed, this->rates, x + s.at, y + s.at);
  }
  void factor_gradients(const std::vector<UpdateSlice>& slices, int f, const V* x, const V* out,
                        V* result) const {
    for (const UpdateSlice& s : slices) add_factor_gradient(s, f, x + s.at, out + s.at, result);
  }
  void descend(const std::vector<RateSlice>& slices, const V* phi, const V* g, V* next) const {
    each_rate(slices, [&](const RateSlice& s, auto rate) {
      share_elements(s.size, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) next[s.at + i] = phi[s.at + i] - rate(i) * g[s.at + i];
      });
    });
  }
  void direction(const std::vector<RateSlice>& slices, const V* v, V* out) const {
    each_rate(slices, [&](const RateSlice& s, auto rate) {
      share_elements(s.size, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) out[s.at + i] = rate(i) * v[s.at + i];
      });
    });
  }
  void rate_gradient(const std::vector<RateSlice>& slices, const V* all_g, const V* all_v, V* result) const {
    for (const RateSlice& s : slices) {
      if (s.grad_at == kNowhere) continue;
      const V *g = all_g + s.at, *v = all_v + s.at;
      V* grad_rate = result + s.grad_at;
      if (s.elementwise) {
        for (int64_t i = 0; i < s.size; ++i) grad_rate[i] -= g[i] * v[i];
      } else {
        constexpr int64_t W = sizeof(V) / sizeof(T);
        const T *own_g = reinterpret_cast<const T*>(g), *own_v = reinterpret_cast<const T*>(v);
        double sum[W] = {};
        for (int64_t i = 0; i < s.size; ++i) {
          for (int64_t lane = 0; lane < W; ++lane) {
            sum[lane] += static_cast<double>(own_g[i * W + lane]) * static_cast<double>(own_v[i * W + lane]);
          }
        }
        T* own_rate = reinterpret_cast<T*>(grad_rate);
        for (int64_t lane = 0; lane < W; ++lane) own_rate[lane] -= static_cast<T>(sum[lane]);
      }
    }
  }
  /// v -= product and out = rate v in one loop over the adapted parameters, which are in the slices; the
  /// other parameters come after them.
  void retreat(int64_t size, const V* product, V* v, const std::vector<RateSlice>& slices, V* out) const {
    int64_t adapted = 0;
    if (out) {
      each_rate(slices, [&](const RateSlice& s, auto rate) {
        share_elements(s.size, [&](int64_t first, int64_t last) {
          for (int64_t i = s.at + first; i < s.at + last; ++i) {
            v[i] -= product[i];
            out[i] = rate(i - s.at) * v[i];
          }
        });
        adapted = std::max(adapted, s.at + s.size);
      });
    }
    share_elements(size - adapted, [&](int64_t first, int64_t last) {
      for (int64_t i = adapted + first; i < adapted + last; ++i) v[i] -= product[i];
    });
  }
  void pull(int64_t size, double strength, const V* phi, const V* theta, V* g) const {
    const T s = static_cast<T>(strength);
    share_elements(size, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) g[i] += s * (phi[i] - theta[i]);
    });
  }
  /// Each task by itself, as one that is solved does not change any more.
  bool conjugate_step(const ConjugateStep& step, const V* product, V* p, V* r, V* x, V* norm) const {
    constexpr int64_t W = sizeof(V) / sizeof(T);
    bool all = true;
    for (int64_t lane = 0; lane < W; ++lane) {
      auto own = [lane](V* v) { return reinterpret_cast<T*>(v) + lane; };
      const T* of_lane = reinterpret_cast<const T*>(product) + lane;
      all = conjugate_step_of(step, W, of_lane, own(p), own(r), own(x), own(norm)) && all;
    }
    return all;
  }
  void add_weighted(int k, int64_t size, const V* x, V* y) const {
    const T w = query_weights[k];
    share_elements(size, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) y[i] += w * x[i];
    });
  }
  void copy(int64_t size, const V* from, V* to) const { std::copy_n(from, size, to); }
  void zero(int64_t size, V* to) const { std::fill_n(to, size, V{}); }

  template <class F>
  bool beside(F) const {
    return false;
  }
  void join() const {}

 private:
  /// One task, whose elements are W apart.
  static bool conjugate_step_of(const ConjugateStep& step, int64_t W, const T* product, T* p, T* r, T* x,
                                T* norm) {
    const int64_t adapted = step.adapted * W, trainable = step.trainable * W;
    const T scale = static_cast<T>(1 / step.proximal);
    double squares = 0, curvature = 0;
    for (int64_t i = 0; i < adapted; i += W) {
      squares += static_cast<double>(r[i]) * static_cast<double>(r[i]);
      curvature += static_cast<double>(p[i]) * static_cast<double>(p[i] + scale * product[i]);
    }
    if (step.first) norm[0] = static_cast<T>(std::sqrt(squares)), norm[W] = 0;
    if (std::sqrt(squares) <= step.tolerance * static_cast<double>(norm[0])) return true;
    const T alpha = static_cast<T>(squares / curvature);
    double next = 0;
    for (int64_t i = 0; i < adapted; i += W) {
      x[i] += alpha * p[i];
      r[i] -= alpha * (p[i] + scale * product[i]);
      next += static_cast<double>(r[i]) * static_cast<double>(r[i]);
    }
    for (int64_t i = adapted; i < trainable; i += W) x[i] -= alpha * scale * product[i];
    const T beta = static_cast<T>(next / squares);
    for (int64_t i = 0; i < adapted; i += W) p[i] = r[i] + beta * p[i];
    norm[W] = static_cast<T>(std::sqrt(next) / static_cast<double>(norm[0]));
    return false;
  }

  /// Calls f(slice, function i -> rate of its element i).
  template <class F>
  void each_rate(const std::vector<RateSlice>& slices, F f) const {
    for (const RateSlice& s : slices) {
      if (s.elementwise) {
        const T* rate = this->rates + s.rate_at;
        f(s, [rate](int64_t i) { return rate[i]; });
      } else {
        const T rate = s.rate_at == kNowhere ? static_cast<T>(s.constant) : this->rates[s.rate_at];
        f(s, [rate](int64_t) { return rate; });
      }
    }
  }
};

}  // namespace maml::MAML_ISA
