// Products of small matrices that stand in shared memory with padded rows.
//
// A row is `stride` elements: an odd number of 16-byte vectors of V elements, with at least one element
// behind its `width` values. What is behind the values is zero, except for a one directly behind the inputs
// of a layer with a bias, whose weight has the bias as one more row. A weight has rows [in + 1, rounded up to
// V], the last of them zero. So
//
//   forward          y = [x 1] [w; b]         rows of x by vectors of columns of w
//   input gradient   g w^T                    rows of g by rows of w
//   weight gradient  [x 1]^T g                columns of x by columns of g; the last row is the bias's
//
// have no remainders and no separate bias. Each thread computes a tile of outputs. All loads but those of a
// single column are 16 bytes a lane. Consecutive lanes take consecutive vectors of a row, or consecutive
// rows; since the stride is odd, eight rows cover the 32 banks. A bank conflict, of two lanes, is left where
// eight lanes go on from a row's last vector to the next row's first (test_bank_conflicts.cpp). Sums run in
// ascending order of the inner index.
#pragma once

#include "cuda/product/arithmetic.h"
#include "layers/layer.h"

namespace maml::cuda {

/// The elements of a padded row with `width` values.
template <class T>
constexpr int padded_stride(int width) {
  return ((width / kVector<T> + 1) | 1) * kVector<T>;
}
/// The vectors that `width` values fill.
template <class T>
constexpr int vectors(int width) {
  return (width + kVector<T> - 1) / kVector<T>;
}

/// Division by a small positive number, exact below 2^20.
struct Divider {
  float inverse = 1;
  static Divider by(int number) { return {1.0f / static_cast<float>(number)}; }
  __device__ __forceinline__ int operator()(int number) const {
    return static_cast<int>((static_cast<float>(number) + 0.5f) * inverse);
  }
};

template <class T>
__device__ __forceinline__ Vector<T> load(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}
template <class T>
__device__ __forceinline__ void store(T* to, const T (&values)[kVector<T>]) {
  Vector<T> v;
#pragma unroll
  for (int c = 0; c < kVector<T>; ++c) v.element[c] = values[c];
  *reinterpret_cast<Vector<T>*>(to) = v;
}

/// sum[r][c] += sum over k of x[r][k] w[k][c], for k of `depth` vectors; C columns: a vector, or one.
template <class T, int R, int C>
__device__ __forceinline__ void add_forward_product(const T* const (&x)[R], const T* w, int stride, int depth,
                                                    T (&sum)[R][C]) {
  constexpr int V = kVector<T>;
#pragma unroll 2
  for (int q = 0; q < depth; ++q) {
    Vector<T> a[R];
#pragma unroll
    for (int r = 0; r < R; ++r) a[r] = load(x[r] + q * V);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const T* row = w + (q * V + e) * stride;
      T b[C];
      if constexpr (C == 1) {
        b[0] = *row;
      } else {
        const Vector<T> v = load(row);
#pragma unroll
        for (int c = 0; c < C; ++c) b[c] = v.element[c];
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int c = 0; c < C; ++c) sum[r][c] += a[r].element[e] * b[c];
      }
    }
  }
}

/// sum[r][c] += sum over k of g[r][k] w[c][k], for k of `depth` vectors.
template <class T, int R, int C>
__device__ __forceinline__ void add_input_product(const T* const (&g)[R], const T* const (&w)[C], int depth,
                                                  T (&sum)[R][C]) {
  constexpr int V = kVector<T>;
#pragma unroll 1  // two of them would need more than 128 registers
  for (int q = 0; q < depth; ++q) {
    Vector<T> a[R], b[C];
#pragma unroll
    for (int r = 0; r < R; ++r) a[r] = load(g[r] + q * V);
#pragma unroll
    for (int c = 0; c < C; ++c) b[c] = load(w[c] + q * V);
#pragma unroll
    for (int e = 0; e < V; ++e) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int c = 0; c < C; ++c) sum[r][c] += a[r].element[e] * b[c].element[e];
      }
    }
  }
}

/// sum[r][c] += sum over n samples of x[sample][r] g[sample][c].
template <class T>
__device__ __forceinline__ void add_weight_product(const T* x, int x_stride, const T* g, int g_stride, int n,
                                                   T (&sum)[kVector<T>][kVector<T>]) {
  constexpr int V = kVector<T>;
#pragma unroll 2
  for (int s = 0; s < n; ++s) {
    const Vector<T> a = load(x + s * x_stride), b = load(g + s * g_stride);
#pragma unroll
    for (int r = 0; r < V; ++r) {
#pragma unroll
      for (int c = 0; c < V; ++c) sum[r][c] += a.element[r] * b.element[c];
    }
  }
}

}  // namespace maml::cuda
