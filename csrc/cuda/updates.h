// The vector work of the inner and the outer loop (meta_gradient.h), over packed parameters:
//   descend        next = phi - rate g
//   direction      out = rate v
//   rate_gradient  grad_rate -= g v, summed in double, in a fixed tree, where one rate serves a whole
//   parameter subtract, copy, zero
// A slice is one parameter and its rate. Every function is for a team; the caller puts the barrier behind it.
#pragma once

#include "description.h"

namespace maml::cuda {

inline constexpr int kVectorThreads = kEmulated ? 32 : 256;

/// Blocks for a loop over `items`: few enough that each thread of a large vector has several, so that
/// starting a block pays, whatever the number of tasks.
inline int64_t vector_blocks(int64_t items) {
  return std::clamp<int64_t>(blocks_for(items, int64_t{4} * kVectorThreads), 1, 64);
}

template <class T>
__device__ __forceinline__ T rate_of(const RateSlice& s, const T* rates, int64_t i) {
  if (s.rate_at == kNowhere) return static_cast<T>(s.constant);
  return rates[s.rate_at + (s.elementwise ? i : 0)];
}

template <class T>
__device__ void descend(Team team, const RateSlice& s, const T* rates, const T* phi, const T* g, T* next) {
  for (int64_t i = team.first(); i < s.size; i += team.step()) {
    next[s.at + i] = phi[s.at + i] - rate_of(s, rates, i) * g[s.at + i];
  }
}

template <class T>
__device__ void direction(Team team, const RateSlice& s, const T* rates, const T* v, T* out) {
  for (int64_t i = team.first(); i < s.size; i += team.step())
    out[s.at + i] = rate_of(s, rates, i) * v[s.at + i];
}

/// Of one rate an element: no two elements share a rate.
template <class T>
__device__ void elementwise_rate_gradient(Team team, const RateSlice& s, const T* g, const T* v, T* result) {
  for (int64_t i = team.first(); i < s.size; i += team.step()) {
    result[s.grad_at + i] -= g[s.at + i] * v[s.at + i];
  }
}

inline constexpr int kReductionThreads = kEmulated ? 32 : 256;

/// Of the rates that serve a whole parameter, slice by slice, since several may share a rate: one block of
/// kReductionThreads. Each thread sums its elements in order, then halves of the block are added up.
template <class T>
__device__ void shared_rate_gradients(const RateSlice* slices, int count, const T* g, const T* v, T* result) {
  __shared__ double sums[kReductionThreads];
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
__device__ void subtract(Team team, int64_t size, const T* x, T* y) {
  for (int64_t i = team.first(); i < size; i += team.step()) y[i] -= x[i];
}
template <class T>
__device__ void copy(Team team, int64_t size, const T* from, T* to) {
  for (int64_t i = team.first(); i < size; i += team.step()) to[i] = from[i];
}
template <class T>
__device__ void zero(Team team, int64_t size, T* to) {
  for (int64_t i = team.first(); i < size; i += team.step()) to[i] = T(0);
}

}  // namespace maml::cuda
