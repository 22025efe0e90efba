// One call on the CPU: parameters into the layout of the layers, tasks over the threads, results added up in
// order of tasks and handed back in the user's layout.
//
// A task is one thread's from beginning to end, and its sums do not know of any other task; the sum over
// tasks runs in double, task by task, in waves of kWave. So the bits depend neither on the number of threads
// nor on who shares a batch.
#include <omp.h>

#include <algorithm>
#include <utility>

#include "../meta_gradient.h"
#include "backend.h"
#include "layers.h"
#include "simd.h"

namespace maml::cpu {

#if defined(MAML_BASELINE)
int64_t workspace_size(const Problem& p, int64_t tasks, int64_t at_once) {
  const int64_t wave = std::min(tasks, kWave);
  const int64_t totals = 2 * p.result_size;  // doubles, in elements of at least half their size
  return totals + p.packing.total + p.rates_size + wave * p.result_size +
         std::min(at_once, tasks) * (p.task_size() + 3 * p.packing.total);
}
#endif

}  // namespace maml::cpu

namespace maml::MAML_ISA {

Footprint footprint(const Layer& layer) {
  switch (layer.kind) {
    case Kind::conv2d:
      return conv2d_footprint(layer);
    case Kind::batch_norm:
      return batch_norm_footprint(layer);
    case Kind::max_pool:
      return max_pool_footprint(layer);
    default:
      return {};
  }
}

namespace {

template <class T>
struct Cpu {
  const T* rates;  // packed

  static const Passes<T>& passes(Kind kind) {
    static const Passes<T> table[] = {channels_last<T>(), flatten<T>(),   conv2d<T>(),
                                      batch_norm<T>(),    pointwise<T>(), max_pool<T>(),
                                      avg_pool<T>(),      mean_pool<T>(), add<T>()};
    return table[static_cast<int>(kind)];
  }
  void forward(const Layer& l, const Tensors<T>& t) const { passes(l.kind).forward(l, t); }
  void backward(const Layer& l, const Tensors<T>& t) const { passes(l.kind).backward(l, t); }
  void forward_tangent(const Layer& l, const Tensors<T>& t) const { passes(l.kind).forward_tangent(l, t); }
  void backward_tangent(const Layer& l, const Tensors<T>& t) const { passes(l.kind).backward_tangent(l, t); }

  void loss(const LossPart& part, const T* z, const void* target, T* value, T* grad_z, T* saved) const {
    const T loss = MAML_ISA::loss<T>().value(part, z, target, grad_z, saved);
    if (value) *value = part.add ? *value + loss : loss;
  }
  void loss_tangent(const LossPart& part, const T* z_dot, const T* saved, T* grad_z_dot) const {
    MAML_ISA::loss<T>().tangent(part, z_dot, saved, grad_z_dot);
  }

  void descend(const std::vector<RateSlice>& slices, const T* phi, const T* g, T* next) const {
    each_rate(slices, [&](const RateSlice& s, auto rate) {
      for (int64_t i = 0; i < s.size; ++i) next[s.at + i] = phi[s.at + i] - rate(i) * g[s.at + i];
    });
  }
  void direction(const std::vector<RateSlice>& slices, const T* v, T* out) const {
    each_rate(slices, [&](const RateSlice& s, auto rate) {
      for (int64_t i = 0; i < s.size; ++i) out[s.at + i] = rate(i) * v[s.at + i];
    });
  }
  void rate_gradient(const std::vector<RateSlice>& slices, const T* all_g, const T* all_v, T* result) const {
    for (const RateSlice& s : slices) {
      if (s.grad_at == kNowhere) continue;
      const T *g = all_g + s.at, *v = all_v + s.at;
      T* grad_rate = result + s.grad_at;
      if (s.elementwise) {
        for (int64_t i = 0; i < s.size; ++i) grad_rate[i] -= g[i] * v[i];
      } else {
        double sum = 0;
        for (int64_t i = 0; i < s.size; ++i) sum += static_cast<double>(g[i]) * static_cast<double>(v[i]);
        *grad_rate -= static_cast<T>(sum);
      }
    }
  }
  void subtract(int64_t size, const T* x, T* y) const {
    for (int64_t i = 0; i < size; ++i) y[i] -= x[i];
  }
  void copy(int64_t size, const T* from, T* to) const { std::copy_n(from, size, to); }
  void zero(int64_t size, T* to) const { std::fill_n(to, size, T(0)); }

 private:
  /// f(slice, i -> rate of its element i)
  template <class F>
  void each_rate(const std::vector<RateSlice>& slices, F f) const {
    for (const RateSlice& s : slices) {
      if (s.elementwise) {
        const T* rate = rates + s.rate_at;
        f(s, [rate](int64_t i) { return rate[i]; });
      } else {
        const T rate = s.rate_at == kNowhere ? static_cast<T>(s.constant) : rates[s.rate_at];
        f(s, [rate](int64_t) { return rate; });
      }
    }
  }
};

/// The user's [rows, columns, taps] of a weight and the layers' [taps, columns, rows]; other parameters are
/// the same.
template <class From, class To>
void pack(const Parameter& p, const From* user, To* packed) {
  const int64_t columns = p.size / (p.rows * p.taps);
  for (int64_t o = 0; o < p.rows; ++o) {
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t t = 0; t < p.taps; ++t) packed[(t * columns + i) * p.rows + o] = static_cast<To>(*user++);
    }
  }
}
template <class From, class To>
void unpack(const Parameter& p, const From* packed, To* user) {
  const int64_t columns = p.size / (p.rows * p.taps);
  for (int64_t o = 0; o < p.rows; ++o) {
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t t = 0; t < p.taps; ++t) *user++ = static_cast<To>(packed[(t * columns + i) * p.rows + o]);
    }
  }
}

/// Less than so many multiply-adds (some 50 us) are done before a second thread has woken up.
constexpr int64_t kWorkOfOneThread = 1'000'000;

template <class T>
class Run {
 public:
  Run(const Problem& problem, const Call<T>& call) : p_(problem), call_(call) {
    T* at = call.workspace;
    auto take = [&](int64_t size) { return std::exchange(at, at + size); };
    totals_ = reinterpret_cast<double*>(take(2 * p_.result_size));
    theta_ = take(p_.packing.total);
    rates_ = take(p_.rates_size);
    results_ = take(std::min(call.tasks, cpu::kWave) * p_.result_size);
    const bool small = call.tasks * p_.work < kWorkOfOneThread;
    threads_ = small ? 1 : static_cast<int>(std::min<int64_t>(call.at_once, call.tasks));
    thread_size_ = p_.task_size() + 3 * p_.packing.total;
    thread_memory_ = at;
  }

  void operator()() {
    if (shared_parameters()) pack_all(call_.parameters, {}, 0, theta_);
    pack_rates();
    const bool adds_up = call_.gradient != nullptr;
    if (adds_up) std::fill_n(totals_, p_.result_size, 0.0);
    for (int64_t wave = 0; wave < call_.tasks; wave += cpu::kWave) {
      const int64_t end = std::min(call_.tasks, wave + cpu::kWave);
      if (threads_ > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(threads_)
        for (int64_t t = wave; t < end; ++t) run_task(t, t - wave, omp_get_thread_num());
      } else {
        for (int64_t t = wave; t < end; ++t) run_task(t, t - wave, 0);
      }
      if (adds_up) add_up(wave, end);
    }
    if (adds_up) hand_back_gradient();
    if (call_.loss) {
      double loss = 0;
      for (int64_t t = 0; t < call_.tasks; ++t) loss += weight(t) * static_cast<double>(call_.task_losses[t]);
      *call_.loss = static_cast<T>(loss);
    }
  }

 private:
  bool shared_parameters() const { return call_.parameter_strides.empty(); }

  double weight(int64_t t) const {
    if (call_.task_weights) return static_cast<double>(call_.task_weights[t]);
    return p_.operation == Operation::adapt_backward ? 1.0 : 1.0 / static_cast<double>(call_.tasks);
  }

  void pack_all(const std::vector<const T*>& user, const std::vector<int64_t>& strides, int64_t task,
                T* packed) const {
    for (size_t i = 0; i < user.size(); ++i) {
      const Parameter& parameter = p_.graph.parameters[i];
      T* to = packed + p_.packing.at[i];
      if (user[i]) {
        pack(parameter, user[i] + (strides.empty() ? 0 : task * strides[i]), to);
      } else {
        std::fill_n(to, parameter.size, T(0));
      }
    }
  }

  void pack_rates() const {
    for (size_t i = 0; i < p_.rate_tensors.size(); ++i) {
      const RateTensor& rate = p_.rate_tensors[i];
      T* to = rates_ + p_.rate_at[i];
      if (rate.parameter < 0) {
        std::copy_n(call_.rates[i], rate.size, to);
        continue;
      }
      const Parameter& parameter = p_.graph.parameters[rate.parameter];
      for (int64_t s = 0; s < rate.size; s += parameter.size) pack(parameter, call_.rates[i] + s, to + s);
    }
  }

  void run_task(int64_t t, int64_t slot, int thread) const {
    T* at = thread_memory_ + thread * thread_size_;
    auto take = [&](int64_t size) { return std::exchange(at, at + size); };
    T* own = take(p_.packing.total);
    T* given = take(p_.packing.total);
    T* out = take(p_.packing.total);
    Task<T> task{};
    task.theta = theta_;
    if (!shared_parameters()) {
      pack_all(call_.parameters, call_.parameter_strides, t, own);
      task.theta = own;
    }
    const bool labels = p_.graph.loss == Loss::cross_entropy;
    auto part = [&](const Stage& s, const T* x) { return x ? x + t * s.n * s.values[0].size : nullptr; };
    auto target = [&](const Stage& s, const void* y) -> const void* {
      if (!y) return nullptr;
      if (labels) return static_cast<const int64_t*>(y) + t * s.n;
      return static_cast<const T*>(y) + t * s.n * s.values[s.output].size;
    };
    const int64_t predictions = p_.query.n ? p_.query.n * p_.query.values[p_.query.output].size : 0;
    task.x_support = part(p_.support, call_.x_support);
    task.y_support = p_.support.n ? target(p_.support, call_.y_support) : nullptr;
    task.x_query = part(p_.query, call_.x_query);
    task.y_query = p_.query.n ? target(p_.query, call_.y_query) : nullptr;
    task.support_losses = call_.support_losses ? call_.support_losses + t * p_.steps : nullptr;
    task.query_loss = call_.task_losses ? call_.task_losses + t : nullptr;
    task.logits = call_.logits ? call_.logits + t * predictions : nullptr;
    task.result = call_.gradient ? results_ + slot * p_.result_size : out;
    task.adapted = out;
    if (p_.operation == Operation::predict_backward) {
      task.given = call_.given[0] + t * predictions;
    } else if (!call_.given.empty()) {
      pack_all(call_.given, call_.given_strides, t, given);
      task.given = given;
    }
    const Cpu<T> backend{rates_};
    TaskRunner<Cpu<T>, T>(backend, p_, task, at).run();
    for (size_t i = 0; i < call_.per_task.size(); ++i) {
      const Parameter& parameter = p_.graph.parameters[i];
      if (call_.per_task[i])
        unpack(parameter, out + p_.packing.at[i], call_.per_task[i] + t * parameter.size);
    }
  }

  void add_up(int64_t wave, int64_t end) const {
    for (int64_t t = wave; t < end; ++t) {
      const double w = weight(t);
      const T* result = results_ + (t - wave) * p_.result_size;
      for (int64_t i = 0; i < p_.result_size; ++i) totals_[i] += w * static_cast<double>(result[i]);
    }
  }

  /// The trainable parameters in the user's order, then the learned rates.
  void hand_back_gradient() const {
    T* to = call_.gradient;
    for (size_t i = 0; i < p_.graph.parameters.size(); ++i) {
      const Parameter& parameter = p_.graph.parameters[i];
      if (parameter.role == Role::frozen) continue;
      unpack(parameter, totals_ + p_.packing.at[i], to);
      to += parameter.size;
    }
    for (size_t i = 0; i < p_.rate_tensors.size(); ++i) {
      const RateTensor& rate = p_.rate_tensors[i];
      if (!rate.learned) continue;
      const double* from = totals_ + p_.rate_grad_at[i];
      if (rate.parameter < 0) {
        for (int64_t j = 0; j < rate.size; ++j) to[j] = static_cast<T>(from[j]);
      } else {
        const Parameter& parameter = p_.graph.parameters[rate.parameter];
        for (int64_t s = 0; s < rate.size; s += parameter.size) unpack(parameter, from + s, to + s);
      }
      to += rate.size;
    }
  }

  const Problem& p_;
  const Call<T>& call_;
  double* totals_;
  T *theta_, *rates_, *results_, *thread_memory_;
  int64_t thread_size_;
  int threads_;
};

}  // namespace

void run_float(const Problem& problem, const Call<float>& call) { Run<float>(problem, call)(); }
void run_double(const Problem& problem, const Call<double>& call) { Run<double>(problem, call)(); }

}  // namespace maml::MAML_ISA
