// The operand of a product that is seen with strides: its outer index and k each run over some axes, and the
// offset of an element is the sum of its place along all of them. A group of axes is numbered as one index,
// the last axis fastest.
#pragma once

#include "cuda/product/gather.h"
#include "cuda/strided.h"

namespace maml::cuda {

/// A group of axes, with one operand's stride for each. A negative stride counts from the other end, so that
/// no offset is negative: `first` is where index 0 is.
struct Axes {
  int axes = 1, size = 1, first = 0;
  int stride[kMostAxes] = {};
  Divisor by[kMostAxes];

  Axes() = default;
  template <int M>
  Axes(const Nest<M>& nest, int operand) : axes(nest.axes), size(nest.steps) {
    for (int a = 0; a < axes; ++a) {
      by[a] = Divisor(nest.size[a]);
      stride[a] = static_cast<int>(nest.stride[a][operand]);
      if (stride[a] < 0) first -= (nest.size[a] - 1) * stride[a];
    }
  }

  /// The offset of an index; kNoOffset beyond the last one.
  __device__ __forceinline__ int offset(int i) const {
    if (i >= size) return kNoOffset;
    int sum = first;
#pragma unroll 1  // mostly one axis or two
    for (int a = axes - 1; a > 0; --a) {
      const int rest = by[a].quotient(i);
      sum += by[a].remainder(i, rest) * stride[a];
      i = rest;
    }
    return sum + i * stride[0];
  }
};

/// A[m, k] or B[k, n]. AlongK: copied in vectors along k, else along the outer index.
template <bool AlongK>
struct Strided {
  static constexpr bool kAlongK = AlongK;
  using Outer = int;
  using Inner = int;
  const Axes &along_outer, &along_k;
  int start;  // of the block's batch
  __device__ __forceinline__ int outer(int i) const {
    return i < along_outer.size ? start + along_outer.offset(i) : kNoOffset;
  }
  __device__ __forceinline__ int inner(int k) const { return along_k.offset(k); }
  __device__ __forceinline__ Element element(int a, int b) const { return {a + b, (a | b) >= 0}; }
};

}  // namespace maml::cuda
