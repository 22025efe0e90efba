// Kernels on strided operands (layers/loops.h). The host divides the axes of the loops in two: those that the
// result of a kernel has, and those along which its stride is 0. A thread takes a step of the first and goes
// over all steps of the second, in row-major order, so that it alone writes an element: there are no atomics,
// and every sum has one order. Or several threads share a step (shares.h). A kernel takes both nests by
// value; it never reads Layer::loops.
//
// Limits: a value of one task has fewer than 2^31 elements, and so has a sum, so that steps are numbered in
// 32 bits: a division of 64 bits is a function call on a GPU.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/elementwise.h"
#include "cuda/run/updates.h"
#include "layers/loops.h"

namespace maml::cuda {

/// Elements of M operands.
template <int M>
struct Offsets {
  int64_t of[M];
};

/// Some axes of the loops, the last one fastest, with the strides of M operands. There is at least one axis,
/// and neighbours along which the operands move as along a single axis are one.
template <int M>
struct Nest {
  int axes = 0, steps = 1, size[kMostAxes] = {};
  int64_t stride[kMostAxes][M] = {};

  void append(int64_t extent, const int64_t (&strides)[M]) {
    if (extent > std::numeric_limits<int>::max() / steps) {
      throw std::invalid_argument("a layer over loops takes fewer than 2^31 steps a task, got " +
                                  std::to_string(extent * steps));
    }
    steps *= static_cast<int>(extent);
    bool merges = axes > 0;
    for (int m = 0; merges && m < M; ++m) merges = stride[axes - 1][m] == extent * strides[m];
    if (!merges) ++axes;
    size[axes - 1] = static_cast<int>(merges ? extent * size[axes - 1] : extent);
    for (int m = 0; m < M; ++m) stride[axes - 1][m] = strides[m];
  }
};

/// The loops in two nests: the axes along which one operand has a stride, and those along which it has none.
template <int M>
struct Split {
  Offsets<M> first;  // of the operands
  Nest<M> outer, inner;
};

/// Splits the loops by the axes that the operand `by` has.
template <int M>
Split<M> split(const Loops& loops, int64_t n, const View& by, const View* const (&operands)[M]) {
  Split<M> s;
  for (int m = 0; m < M; ++m) s.first.of[m] = operands[m]->offset;
  for (int a = 0; a < loops.axes; ++a) {
    if (extent(loops, a, n) == 1) continue;
    int64_t strides[M];
    for (int m = 0; m < M; ++m) strides[m] = operands[m]->stride[a];
    (by.stride[a] != 0 ? s.outer : s.inner).append(extent(loops, a, n), strides);
  }
  for (Nest<M>* nest : {&s.outer, &s.inner}) {
    if (nest->axes == 0) nest->append(1, {});
  }
  return s;
}

/// Where the operands are at a step of the first `axes` axes.
template <int M>
__device__ __forceinline__ Offsets<M> advance(Offsets<M> at, const Nest<M>& nest, int axes, unsigned step) {
  for (int a = axes - 1; a >= 0; --a) {
    const unsigned size = static_cast<unsigned>(nest.size[a]), rest = step / size, i = step - rest * size;
    for (int m = 0; m < M; ++m) at.of[m] += i * nest.stride[a][m];
    step = rest;
  }
  return at;
}
template <int M>
__device__ __forceinline__ Offsets<M> outer_step(const Split<M>& loops, int64_t step) {
  return advance(loops.first, loops.outer, loops.outer.axes, static_cast<unsigned>(step));
}

/// f(offsets) at every step of a nest, in order, for operands that start at `from`.
template <int M, class F>
__device__ __forceinline__ void each_step(const Nest<M>& nest, const Offsets<M>& from, F f) {
  const int last = nest.axes - 1;
  const int length = nest.size[last], rows = nest.steps / length;
  for (int row = 0; row < rows; ++row) {
    Offsets<M> at = advance(from, nest, last, static_cast<unsigned>(row));
    for (int i = 0; i < length; ++i) {
      f(at);
      for (int m = 0; m < M; ++m) at.of[m] += nest.stride[last][m];
    }
  }
}

/// A sum in the order of its terms. Blocks of terms are summed in T, and the blocks in double, so that a long
/// sum rounds no more than a short one.
template <class T>
class Sum {
 public:
  __device__ __forceinline__ void operator+=(T term) {
    block_ += term;
    if (++count_ % kBlock != 0) return;
    total_ += static_cast<double>(block_);
    block_ = -T(0);
  }
  __device__ __forceinline__ double total() const { return total_ + static_cast<double>(block_); }
  __device__ __forceinline__ T value() const { return static_cast<T>(total()); }

 private:
  static constexpr int kBlock = 256;
  double total_ = -0.0;  // so that the sum of a single -0 is -0
  T block_ = -T(0);
  unsigned count_ = 0;
};

/// How many blocks a multiprocessor must hold: without a number, nvcc spills registers to hold more.
inline constexpr int kResidentSteps = 2;

/// A thread a step: the work of a step is often a loop.
inline Grid step_grid(int64_t steps) { return {blocks_for(steps, kElementThreads)}; }

template <class T>
__global__ void __launch_bounds__(kVectorThreads) clear_kernel(int64_t count, T* out, Deferred deferred) {
  const Memory memory = deferred.ready();
  zero(grid_team(), count, resolve(out, memory, blockIdx.z));
}
/// Sets all elements of an operand to 0.
template <class T>
void clear(const Launcher& launch, const View& view, int64_t n, T* out) {
  const int64_t count = elements(view, n);
  launch("clear", clear_kernel<T>, {vector_blocks(count)}, kVectorThreads, 0, count, out, launch.memory);
}
/// The same where a pass writes, and does not come to all elements: it takes `steps` steps along the axes
/// that the operand has, each to another element.
template <class T>
void clear_unless_reached(const Launcher& launch, const View& view, int64_t n, int64_t steps, bool add,
                          T* out) {
  if (!add && steps != elements(view, n)) clear(launch, view, n, out);
}

}  // namespace maml::cuda
