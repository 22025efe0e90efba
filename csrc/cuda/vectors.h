// Vectors of a few neighbouring elements, so that one instruction moves 16 bytes, and loops over whole
// tensors with several such loads in flight.
//
// A tensor is accessed in vectors where its address is a multiple of 16 bytes. Elsewhere (a user's tensor
// that is a slice, a row of 5 channels) the same threads compute the same elements in the same order with
// accesses of single elements. So no bit of a result depends on an address.
//
// Why all loads of a step come before its stores: the compiler cannot move a load over a store to a pointer
// that may be the same, so that a loop of load, compute, store has one load in flight. By Little's law, 3
// TB/s and some 700 ns need 16 KB in flight on each multiprocessor: 1024 threads with one vector each, or 256
// with four.
#pragma once

#include <algorithm>

#include "cuda/product/tile_layout.h"
#include "cuda/run/launch.h"

namespace maml::cuda {

/// N numbers with arithmetic for each. A number in place of a vector stands for N equal ones.
template <class T, int N>
struct alignas(std::min<size_t>(16, N * sizeof(T))) Numbers {
  T at[N];

  Numbers() = default;  // trivial, for shared memory
  __device__ __forceinline__ Numbers(T first, T second) : at{first, second} {}
  __device__ __forceinline__ Numbers(T value) {
#pragma unroll
    for (int i = 0; i < N; ++i) at[i] = value;
  }

  friend __device__ __forceinline__ Numbers operator+(const Numbers& a, const Numbers& b) {
    return each(a, b, [](T x, T y) { return x + y; });
  }
  friend __device__ __forceinline__ Numbers operator-(const Numbers& a, const Numbers& b) {
    return each(a, b, [](T x, T y) { return x - y; });
  }
  friend __device__ __forceinline__ Numbers operator*(const Numbers& a, const Numbers& b) {
    return each(a, b, [](T x, T y) { return x * y; });
  }
  friend __device__ __forceinline__ Numbers operator/(const Numbers& a, const Numbers& b) {
    return each(a, b, [](T x, T y) { return x / y; });
  }
  __device__ __forceinline__ Numbers operator-() const {
    return each(*this, *this, [](T x, T) { return -x; });
  }
  __device__ __forceinline__ Numbers& operator+=(const Numbers& b) { return *this = *this + b; }

  template <class F>
  static __device__ __forceinline__ Numbers each(const Numbers& a, const Numbers& b, F f) {
    Numbers result;
#pragma unroll
    for (int i = 0; i < N; ++i) result.at[i] = f(a.at[i], b.at[i]);
    return result;
  }
};

/// f of each number.
template <class T, int N, class F>
__device__ __forceinline__ auto lanewise(const Numbers<T, N>& v, F f) {
  Numbers<decltype(f(v.at[0])), N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.at[i] = f(v.at[i]);
  return result;
}

template <class To, class T, int N>
__device__ __forceinline__ Numbers<To, N> converted(const Numbers<T, N>& v) {
  return lanewise(v, [](T x) { return static_cast<To>(x); });
}

/// Which elements of a vector in memory exist: the first `count`; `whole`: all N, at an aligned address.
struct Lanes {
  int count;
  bool whole;
};

/// The vector at p. Elements that do not exist repeat the last one that does.
template <int N, class T>
__device__ __forceinline__ Numbers<T, N> load(const T* p, Lanes lanes) {
  if (lanes.whole) return *reinterpret_cast<const Numbers<T, N>*>(p);
  Numbers<T, N> v;
#pragma unroll
  for (int i = 0; i < N; ++i) v.at[i] = p[std::min(i, lanes.count - 1)];
  return v;
}

template <class T, int N>
__device__ __forceinline__ void store(T* p, const Numbers<T, N>& v, Lanes lanes) {
  if (lanes.whole) {
    *reinterpret_cast<Numbers<T, N>*>(p) = v;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < lanes.count) p[i] = v.at[i];
  }
}

/// Whether all addresses are multiples of 16 bytes; null is one.
template <class... P>
__device__ __forceinline__ bool aligned(const P*... addresses) {
  return ((uint64_t{0} | ... | reinterpret_cast<uint64_t>(addresses)) & 15) == 0;
}

/// Adds to what is there, or replaces it.
struct Put {
  bool add;
  template <class T>
  __device__ __forceinline__ T operator()(T before, T value) const {
    return add ? before + value : value;
  }
  /// What to read of the tensor that is written: nothing where it is replaced.
  template <class T>
  __device__ __forceinline__ const T* before(const T* to) const {
    return add ? to : nullptr;
  }
};

}  // namespace maml::cuda
