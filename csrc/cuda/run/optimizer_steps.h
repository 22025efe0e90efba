// The inner optimizers on packed parameter vectors (meta_gradient.h, optimizers.h):
//
//   start            the states before the first step
//   clip             the factor of g by its norm over all adapted parameters, and that of its derivative
//   update           next, next_state from phi, g, state
//   hyper_gradients  adds to the gradients of hyperparameters
//   update_adjoint   v, sigma: from the cotangents after a step to those before it; out = -gamma
//   clip_dot         the sum of g times out
//   clip_adjoint     out: from that of the clipped g to that of g
//   start_gradients  adds to the gradients of initial states
//
// Threads: of update, update_adjoint and clip_adjoint, row y of blocks takes the elements of slice y;
// everything that sums over elements is one block of kReductionThreads, slice after slice, because slices may
// share a hyperparameter. Numerics: each thread sums its elements in order, in double, then a tree sums over
// the block.
//
// The arguments are an instruction's tensors: x[0] = phi, grad_y = g, w[0] = state, w[1] = clip, w[2] = v,
// w[3] = sigma; y = next or what is written otherwise, grad_w[0] = next_state or next_sigma, saved = out.
#pragma once

#include "cuda/run/program.h"
#include "cuda/run/updates.h"
#include "optimizers.h"

namespace maml::cuda {

/// Calls f<R, S>() for the rule R with S states.
template <class F>
__device__ __forceinline__ void with_form(const RuleForm& form, F f) {
  switch (form.rule) {
    case Rule::sgd:
      if (form.has_buffer) return f.template operator()<Rule::sgd, 1>();
      return f.template operator()<Rule::sgd, 0>();
    case Rule::adam:
      return f.template operator()<Rule::adam, 2>();
    case Rule::adamw:
      return f.template operator()<Rule::adamw, 2>();
    case Rule::adamax:
      return f.template operator()<Rule::adamax, 2>();
    case Rule::rmsprop:
      if (form.centered) return f.template operator()<Rule::rmsprop, 3>();
      if (form.has_buffer) return f.template operator()<Rule::rmsprop, 2>();
      return f.template operator()<Rule::rmsprop, 1>();
    case Rule::adagrad:
      return f.template operator()<Rule::adagrad, 1>();
  }
}

template <class T>
__device__ __forceinline__ double value_of(const Source& source, const T* rates, int64_t i) {
  if (source.at == kNowhere) return source.constant;
  return static_cast<double>(rates[source.at + (source.elementwise ? i : 0)]);
}

template <Rule R, class T>
__device__ __forceinline__ Coefficients<T> coefficients(const UpdateSlice& s, int64_t step, const T* rates,
                                                        int64_t i) {
  double h[kHyperparameters];
#pragma unroll
  for (int j = 0; j < kHyperparameters; ++j) h[j] = value_of(s.hyper[j], rates, i);
  return Coefficients<T>::template of<R>(h, step, s.form.taken);
}

/// Calls f(element, coefficients) for the team's share of a parameter.
template <Rule R, class T, class F>
__device__ __forceinline__ void each_element(Team team, const UpdateSlice& s, int64_t step, const T* rates,
                                             F f) {
  Coefficients<T> c = coefficients<R>(s, step, rates, 0);
  for (int64_t i = team.first(); i < s.size; i += team.step()) {
    if (s.elementwise) c = coefficients<R>(s, step, rates, i);
    f(i, c);
  }
}

/// What is read of a parameter with S states before a step.
template <class T, int S>
struct ReadElement {
  const UpdateSlice& s;
  const Tensors<T>& t;
  T factor, most;

  __device__ ReadElement(const UpdateSlice& s_, const Tensors<T>& t_)
      : s(s_), t(t_), factor(t_.w[1] ? t_.w[1][0] : T(1)), most(static_cast<T>(s_.clip.value)) {}
  __device__ T scaled(int64_t i) const { return factor * t.grad_y[s.at + i]; }
  __device__ Element<T> at(int64_t i) const {
    Element<T> e{t.x[0][s.at + i], clamped(scaled(i), most), {}};
#pragma unroll
    for (int j = 0; j < S; ++j) e.state[j] = t.w[0][j * s.stride + s.at + i];
    return e;
  }
  /// From the cotangents after the step; sigma null: zero.
  template <Rule R>
  __device__ ElementAdjoint<T> adjoint(int64_t i, const Coefficients<T>& c, const T* v,
                                       const T* sigma) const {
    ElementAdjoint<T> d{};
    d.phi = v[s.at + i];
#pragma unroll
    for (int j = 0; j < S; ++j) d.state[j] = sigma ? sigma[j * s.stride + s.at + i] : T(0);
    Optimizer<R>::adjoint(s.form, c, at(i), d);
    d.g = where_inside(scaled(i), most, d.g);
    return d;
  }
};

template <class T>
__device__ void start(Team team, const UpdateSlice& s, const T* rates, T* state) {
  for (int j = 0; j < states_of(s.form); ++j) {
    for (int64_t i = team.first(); i < s.size; i += team.step()) {
      state[j * s.stride + s.at + i] = static_cast<T>(value_of(s.start[j], rates, i));
    }
  }
}

template <class T>
__device__ void update(Team team, const UpdateSlice& s, int64_t step, const T* rates, const Tensors<T>& t) {
  with_form(s.form, [&]<Rule R, int S>() {
    const ReadElement<T, S> read(s, t);
    each_element<R>(team, s, step, rates, [&](int64_t i, const Coefficients<T>& c) {
      Element<T> e = read.at(i);
      Optimizer<R>::step(s.form, c, e);
      t.y[s.at + i] = e.phi;
#pragma unroll
      for (int j = 0; j < S; ++j) {
        if (t.grad_w[0]) t.grad_w[0][j * s.stride + s.at + i] = e.state[j];
      }
    });
  });
}

template <class T>
__device__ void update_adjoint(Team team, const UpdateSlice& s, int64_t step, const T* rates,
                               const Tensors<T>& t) {
  with_form(s.form, [&]<Rule R, int S>() {
    const ReadElement<T, S> read(s, t);
    each_element<R>(team, s, step, rates, [&](int64_t i, const Coefficients<T>& c) {
      const ElementAdjoint<T> d = read.template adjoint<R>(i, c, t.y, t.w[3]);
      t.y[s.at + i] = d.phi;
#pragma unroll
      for (int j = 0; j < S; ++j) {
        if (t.grad_w[0]) t.grad_w[0][j * s.stride + s.at + i] = d.state[j];
      }
      if (t.saved) t.saved[s.at + i] = -d.g;
    });
  });
}

template <class T>
__device__ void clip_adjoint(Team team, const UpdateSlice& s, const T* g, const T* clip, T* out) {
  const T factor = clip[0],
          along = static_cast<T>(static_cast<double>(clip[1]) * static_cast<double>(clip[2]));
  map_elements(
      team, s.size, [=](T out, T g) { return factor * out - along * g; }, out + s.at,
      static_cast<const T*>(out + s.at), g + s.at);
}

/// The sum over the block, in thread 0. `sums`: shared memory, one element for each thread.
__device__ __forceinline__ double sum_of_block(double own, double* sums) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  sums[thread] = own;
  for (int half = kReductionThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  return sums[0];
}

template <class T>
__device__ double inner_product(const UpdateSlice* slices, int count, const T* x, const T* y, double* sums) {
  double sum = 0;
  for (int k = 0; k < count; ++k) {
    const UpdateSlice& s = slices[k];
    for (int64_t i = threadIdx.x; i < s.size; i += kReductionThreads) {
      sum += static_cast<double>(x[s.at + i]) * static_cast<double>(y[s.at + i]);
    }
  }
  return sum_of_block(sum, sums);
}

template <class T>
__device__ void clip(const UpdateSlice* slices, int count, const T* g, T* clip, double* sums) {
  const double square = inner_product(slices, count, g, g, sums);
  if (threadIdx.x > 0) return;
  const ClipFactor found = clip_factor(slices[0].clip.norm, sqrt(square));
  clip[0] = static_cast<T>(found.factor), clip[1] = static_cast<T>(found.slope);
}

/// Adds to the gradient of a hyperparameter or an initial state: that of each element, or their sum.
template <class T>
__device__ __forceinline__ void add_gradient(const Source& source, T* result, double own, double* sums) {
  if (source.grad_at == kNowhere || source.elementwise) return;
  const double sum = sum_of_block(own, sums);
  if (threadIdx.x == 0) result[source.grad_at] += static_cast<T>(sum);
}

/// t.y: the result.
template <class T>
__device__ void hyper_gradients(const UpdateSlice* slices, int count, int64_t step, const T* rates,
                                const Tensors<T>& t, double* sums) {
  const Team team{0, 1};  // this block alone
  for (int k = 0; k < count; ++k) {
    const UpdateSlice& s = slices[k];
    if (!s.learns) continue;
    double own[kHyperparameters] = {};
    with_form(s.form, [&]<Rule R, int S>() {
      const ReadElement<T, S> read(s, t);
      each_element<R>(team, s, step, rates, [&](int64_t i, const Coefficients<T>& c) {
        const ElementAdjoint<T> d = read.template adjoint<R>(i, c, t.w[2], t.w[3]);
#pragma unroll
        for (int h = 0; h < kHyperparameters; ++h) {
          const Source& source = s.hyper[h];
          own[h] += static_cast<double>(d.hyper[h]);
          if (source.elementwise && source.grad_at != kNowhere) t.y[source.grad_at + i] += d.hyper[h];
        }
      });
    });
#pragma unroll
    for (int h = 0; h < kHyperparameters; ++h) add_gradient(s.hyper[h], t.y, own[h], sums);
  }
}

template <class T>
__device__ void start_gradients(const UpdateSlice* slices, int count, const T* sigma, T* result,
                                double* sums) {
  for (int k = 0; k < count; ++k) {
    const UpdateSlice& s = slices[k];
    for (int j = 0; j < states_of(s.form); ++j) {
      const Source& source = s.start[j];
      if (source.grad_at == kNowhere) continue;
      double own = 0;
      for (int64_t i = threadIdx.x; i < s.size; i += kReductionThreads) {
        const T d = sigma[j * s.stride + s.at + i];
        if (source.elementwise) result[source.grad_at + i] += d;
        own += static_cast<double>(d);
      }
      add_gradient(source, result, own, sums);
    }
  }
}

/// Of the tensors of an optimizer's instruction, those that it has.
template <class T>
__device__ __forceinline__ Tensors<T> resolve_step(const Tensors<T>& s, const Memory& memory, int64_t task) {
  Tensors<T> t;
  t.x[0] = resolve(s.x[0], memory, task), t.grad_y = resolve(s.grad_y, memory, task);
#pragma unroll
  for (int j = 0; j < 4; ++j) t.w[j] = resolve(s.w[j], memory, task);
  t.y = resolve(s.y, memory, task), t.grad_w[0] = resolve(s.grad_w[0], memory, task);
  t.saved = resolve(s.saved, memory, task);
  return t;
}

/// start, update, update_adjoint and clip_adjoint.
template <Op O, class T>
__global__ void __launch_bounds__(kVectorThreads)
    optimizer_kernel(const UpdateSlice* slices, int64_t step, const T* rates, Tensors<T> symbolic,
                     Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  const Tensors<T> t = resolve_step(symbolic, memory, task);
  const UpdateSlice& s = slices[blockIdx.y];
  rates = resolve(rates, memory, task);
  if constexpr (O == Op::start) start(grid_team(), s, rates, t.y);
  if constexpr (O == Op::update) update(grid_team(), s, step, rates, t);
  if constexpr (O == Op::update_adjoint) update_adjoint(grid_team(), s, step, rates, t);
  if constexpr (O == Op::clip_adjoint) clip_adjoint(grid_team(), s, t.grad_y, t.w[1], t.y);
}

/// clip, clip_dot, hyper_gradients and start_gradients.
template <Op O, class T>
__global__ void __launch_bounds__(kReductionThreads, 1)
    optimizer_sum_kernel(const UpdateSlice* slices, int count, int64_t step, const T* rates,
                         Tensors<T> symbolic, Deferred deferred) {
  __shared__ double sums[kReductionThreads];
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  const Tensors<T> t = resolve_step(symbolic, memory, task);
  rates = resolve(rates, memory, task);
  if constexpr (O == Op::clip) clip(slices, count, t.grad_y, t.y, sums);
  if constexpr (O == Op::clip_dot) {
    const double sum = inner_product(slices, count, t.grad_y, t.x[0], sums);
    if (threadIdx.x == 0) *t.y = static_cast<T>(sum);
  }
  if constexpr (O == Op::hyper_gradients) hyper_gradients(slices, count, step, rates, t, sums);
  if constexpr (O == Op::start_gradients) start_gradients(slices, count, t.w[3], t.y, sums);
}

/// Whether an instruction is one of those here.
constexpr bool is_of_optimizer(Op op) { return op >= Op::start && op <= Op::start_gradients; }

/// Launches it, for parameters of at most `largest` elements.
template <class T>
void launch_optimizer(const Launcher& launch, const Instruction<T>& i, const DevicePlan& plan, const T* rates,
                      int64_t largest) {
  const UpdateSlice* slices = plan.updates + i.slices;
  const int count = plan.slices_a_step;
  auto each = [&]<Op O>(const char* name) {
    launch(name, optimizer_kernel<O, T>, {vector_blocks(largest), count}, kVectorThreads, 0, slices, i.size,
           rates, i.tensors, launch.memory);
  };
  auto sum = [&]<Op O>(const char* name) {
    launch(name, optimizer_sum_kernel<O, T>, {}, kReductionThreads, 0, slices, count, i.size, rates,
           i.tensors, launch.memory);
  };
  switch (i.op) {
    case Op::start:
      return each.template operator()<Op::start>("start of the optimizer");
    case Op::clip:
      return sum.template operator()<Op::clip>("norm of the gradient");
    case Op::update:
      return each.template operator()<Op::update>("update");
    case Op::hyper_gradients:
      return sum.template operator()<Op::hyper_gradients>("gradients of hyperparameters");
    case Op::update_adjoint:
      return each.template operator()<Op::update_adjoint>("adjoint of the update");
    case Op::clip_dot:
      return sum.template operator()<Op::clip_dot>("inner product with the gradient");
    case Op::clip_adjoint:
      return each.template operator()<Op::clip_adjoint>("adjoint of clipping");
    case Op::start_gradients:
      return sum.template operator()<Op::start_gradients>("gradients of initial states");
    default:
      return;
  }
}

}  // namespace maml::cuda
