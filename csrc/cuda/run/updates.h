// The vector operations of the inner and the outer loop (meta_gradient.h), over packed parameters:
//   descend        next = phi - rate g
//   direction      out = rate v
//   retreat        v -= product, then out = rate v
//   pull           g += strength (phi - theta)
//   conjugate_step one step towards x of (I + H / proximal) x = b, from the product H p; sums in double, in a
//                  fixed tree
//   rate_gradient  grad_rate -= g v; where one rate serves a whole parameter, a sum in double, in a fixed
//   tree add_weighted   y += w x, with w one element of the call's weights copy, zero
// A slice is one parameter with its rate. Each function is run by a team; the caller adds the barrier after
// it.
//
// Why these are loops over all parameters, one for each inner step (descend) and one for each product with
// the Hessian (retreat), in launches of their own or of a stem's gradients (step_after.h), not epilogues of
// weight gradients. With P bytes of parameters in all tasks, a step and its product write g and the product
// (2 P), and these loops read and write 3 P + 4 P: together 9 P. Epilogues would read and write 2 P + 3 P and
// so save 4 P, for weights only. For the papers' networks with K = 5, 4 x 5 P is
//
//   mini-ImageNet, T = 4     P = 0.5 MB    10 MB a meta-step:   2 to 4 us, of a target of 900
//   Omniglot, T = 4          P = 1.8 MB    36 MB:               7 to 12 us, of about 300
//   Omniglot, T = 32         P = 14 MB    286 MB:              55 to 95 us, of a target of 750
//
// between the 5 TB/s of an H100's L2 cache (50 MB; most of the data have just been written) and the 3 TB/s of
// its memory. The gradients of biases, of BatchNorm's parameters and of the first convolution's weights come
// from three other kernels, each of which would need one too. And where k is split (5-shot,
// mini-ImageNet), a weight's gradient is complete only in the kernel that adds up the parts, whose traffic is
// about as large. Epilogues would also cost a second output path in every product kernel for each form of a
// rate; the update must not overtake the input gradient, which still reads the old weights; and learned rates
// need the gradients in memory anyway. So at most Omniglot at T = 32 could gain more than a few per cent.
// This has not been measured.
#pragma once

#include "cuda/elementwise.h"
#include "cuda/run/description.h"

namespace maml::cuda {

inline constexpr int kVectorThreads = kSmallTiles ? 32 : 256;

/// The number of blocks for a loop over `items`: one vector a thread (vectors.h), up to 64 blocks a task.
inline int64_t vector_blocks(int64_t items) {
  return std::clamp<int64_t>(blocks_for(items, int64_t{4} * kVectorThreads), 1, 64);
}

/// The rates of a slice: a tensor with one for each element, or one number.
template <class T>
struct SliceRates {
  const T* each;  // null: `all`
  T all;
  __device__ __forceinline__ SliceRates(const RateSlice& s, const T* rates)
      : each(s.elementwise && s.rate_at != kNowhere ? rates + s.rate_at : nullptr),
        all(s.rate_at == kNowhere ? static_cast<T>(s.constant)
            : s.elementwise       ? T(0)
                                  : rates[s.rate_at]) {}
  /// The rate of an element, of which `own` is the element of `each`.
  __device__ __forceinline__ T of(T own) const { return each ? own : all; }
};

template <class T>
__device__ void descend(AnyTeam auto team, const RateSlice& s, const T* rates, const T* phi, const T* g,
                        T* next) {
  const SliceRates<T> rate(s, rates);
  map_elements(
      team, s.size, [&](T phi, T g, T own) { return phi - rate.of(own) * g; }, next + s.at, phi + s.at,
      g + s.at, rate.each);
}

template <class T>
__device__ void direction(AnyTeam auto team, const RateSlice& s, const T* rates, const T* v, T* out) {
  const SliceRates<T> rate(s, rates);
  map_elements(team, s.size, [&](T v, T own) { return rate.of(own) * v; }, out + s.at, v + s.at, rate.each);
}

template <class T>
__device__ void subtract(AnyTeam auto team, int64_t size, const T* x, T* y) {
  map_elements(team, size, [](T y, T x) { return y - x; }, y, static_cast<const T*>(y), x);
}

/// `out` may be null.
template <class T>
__device__ void retreat(AnyTeam auto team, const RateSlice& s, const T* rates, const T* product, T* v,
                        T* out) {
  if (!out) return subtract(team, s.size, product + s.at, v + s.at);
  const SliceRates<T> rate(s, rates);
  map_elements(
      team, s.size,
      [&](T v, T product, T own) {
        const T moved = v - product;
        return Numbers<T, 2>{moved, rate.of(own) * moved};
      },
      Outputs<T, 2>{{v + s.at, out + s.at}}, static_cast<const T*>(v + s.at), product + s.at, rate.each);
}

/// For one rate per element, where no two elements share a rate.
template <class T>
__device__ void elementwise_rate_gradient(AnyTeam auto team, const RateSlice& s, const T* g, const T* v,
                                          T* result) {
  T* const to = result + s.grad_at;
  map_elements(
      team, s.size, [](T before, T g, T v) { return before - g * v; }, to, static_cast<const T*>(to),
      g + s.at, v + s.at);
}

inline constexpr int kReductionThreads = kSmallTiles ? 32 : 256;

/// For rates that serve a whole parameter. Run by one block of kReductionThreads, slice after slice, because
/// several slices may share a rate. Each thread sums its elements in order, then a tree sums over the block.
/// `sums`: shared memory, one element for each thread.
template <class T>
__device__ void shared_rate_gradients(const RateSlice* slices, int count, const T* g, const T* v, T* result,
                                      double* sums) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int k = 0; k < count; ++k) {
    const RateSlice& s = slices[k];
    if (s.grad_at == kNowhere || s.elementwise) continue;
    double sum = 0;
    for (int64_t i = thread; i < s.size; i += kReductionThreads) {
      sum += static_cast<double>(g[s.at + i]) * static_cast<double>(v[s.at + i]);
    }
    sums[thread] = sum;
    for (int half = kReductionThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (thread < half) sums[thread] += sums[thread + half];
    }
    if (thread == 0) result[s.grad_at] -= static_cast<T>(sums[0]);
    __syncthreads();
  }
}

template <class T>
__device__ void pull(AnyTeam auto team, int64_t size, T strength, const T* phi, const T* theta, T* g) {
  map_elements(
      team, size, [=](T g, T phi, T theta) { return g + strength * (phi - theta); }, g,
      static_cast<const T*>(g), phi, theta);
}

/// The sum over a block of kReductionThreads of each thread's value, by a tree. `sums`: shared memory, one
/// element for each thread.
inline __device__ double sum_over_block(double value, double* sums) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  sums[thread] = value;
  for (int half = kReductionThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  __syncthreads();
  return sums[0];
}

/// By one block of kReductionThreads. A task that is solved does not change any more.
template <class T>
__device__ void conjugate_step(const ConjugateStep& step, const T* product, T* p, T* r, T* x, T* norm,
                               double* sums) {
  const int thread = static_cast<int>(threadIdx.x);
  const T scale = static_cast<T>(1 / step.proximal);
  double squares = 0, curvature = 0;
  for (int64_t i = thread; i < step.adapted; i += kReductionThreads) {
    squares += static_cast<double>(r[i]) * static_cast<double>(r[i]);
    curvature += static_cast<double>(p[i]) * static_cast<double>(p[i] + scale * product[i]);
  }
  squares = sum_over_block(squares, sums);
  curvature = sum_over_block(curvature, sums);
  if (step.first && thread == 0) norm[0] = static_cast<T>(std::sqrt(squares)), norm[1] = 0;
  __syncthreads();
  if (std::sqrt(squares) <= step.tolerance * static_cast<double>(norm[0])) return;
  const T alpha = static_cast<T>(squares / curvature);
  double next = 0;
  for (int64_t i = thread; i < step.adapted; i += kReductionThreads) {
    x[i] += alpha * p[i];
    r[i] -= alpha * (p[i] + scale * product[i]);
    next += static_cast<double>(r[i]) * static_cast<double>(r[i]);
  }
  for (int64_t i = step.adapted + thread; i < step.trainable; i += kReductionThreads) {
    x[i] -= alpha * scale * product[i];
  }
  next = sum_over_block(next, sums);
  const T beta = static_cast<T>(next / squares);
  for (int64_t i = thread; i < step.adapted; i += kReductionThreads) p[i] = r[i] + beta * p[i];
  if (thread == 0) norm[1] = static_cast<T>(std::sqrt(next) / static_cast<double>(norm[0]));
}

template <class T>
__device__ void add_weighted(AnyTeam auto team, int64_t size, const T* w, const T* x, T* y) {
  const T weight = *w;
  map_elements(team, size, [=](T y, T x) { return y + weight * x; }, y, static_cast<const T*>(y), x);
}
template <class T>
__device__ void copy(AnyTeam auto team, int64_t size, const T* from, T* to) {
  map_elements(team, size, [](T x) { return x; }, to, from);
}
template <class T>
__device__ void zero(AnyTeam auto team, int64_t size, T* to) {
  map_elements(team, size, [] { return T(0); }, to);
}

}  // namespace maml::cuda
