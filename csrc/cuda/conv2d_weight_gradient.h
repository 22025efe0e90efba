// grad_w = sum over output pixels of x^T grad_y, and its tangent, the products of x with grad_y_dot and of
// x_dot with grad_y; and grad_b = sum over pixels of grad_y. As one product (product.h):
//
//   C [m, n] = grad_w     m: (tap, c_in);  n: c_out;  k: output pixel (sample, i, j)
//   A [m, k]              x gathered at (pixel, tap), contiguous in m, zero in the padding
//   B [k, n]              grad_y, as it stands in memory
//
// C is small and k is long, so k is usually split (split.h). The blocks of the first row of tiles also sum
// the columns of the B tiles in shared memory: that is grad_b, in parts [tile of n, part, column]. These sums
// are of type T, whatever the arithmetic of the product.
//
// Numerics: sums in ascending k, first term first; then the value that the gradient held is added.
#pragma once

#include "cuda/conv2d.h"
#include "cuda/product/split.h"

namespace maml::cuda {

template <class T>
struct WeightGradient {
  TapsByPixels a;
  Rows b;
  Terms<T> terms;
  Split split;
  T *grad_w, *grad_b;
  T *parts, *bias_parts;
  bool vectors_w, add_w, add_b;
};

/// A thread's part of the column sums: column thread % N, and every (threads / N)-th vector of k.
template <class Product, class Tile>
struct ColumnSums {
  using T = typename Product::T;
  static constexpr int kParts = Tile::kThreads / Tile::kN, kBlocks = 4 * Tile::kSlices;
  static_assert(kParts > 0 && kBlocks % kParts == 0);
  T sum = 0;

  template <class Layout>
  __device__ __forceinline__ void add(const T* slabs, Layout) {
    constexpr int V = kVector<T>;
    const int column = static_cast<int>(threadIdx.x) % Tile::kN;
    const int base = column / (8 * V) * (8 * V), lane = column / V % 8, e = column % V;
#pragma unroll 1
    for (int block = static_cast<int>(threadIdx.x) / Tile::kN; block < kBlocks; block += kParts) {
      const T* const slab = slabs + block / 4 * Layout::kSize + e;
#pragma unroll
      for (int x = 0; x < V; ++x) sum += slab[Layout::vector(base, lane, x, block % 4)];
    }
  }
  /// The sum over all threads of a column, in order; the first N threads return the totals.
  __device__ __forceinline__ T total() {
    T* const shared = reinterpret_cast<T*>(dynamic_shared());
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();
    shared[thread] = sum;
    __syncthreads();
    if (thread < Tile::kN) {
      for (int part = 1; part < kParts; ++part) sum += shared[part * Tile::kN + thread];
    }
    return sum;
  }
};

template <class Arithmetic, class Tile>
using WeightProduct = Product<Arithmetic, Tile, TapsByPixels, Rows>;

/// The work of one of the product's blocks.
template <class Arithmetic, class Tile>
__device__ __forceinline__ void weight_gradient_block(const WeightGradient<typename Arithmetic::T>& p,
                                                      const Memory& memory, int64_t task, int block) {
  using T = typename Arithmetic::T;
  using Weight = WeightProduct<Arithmetic, Tile>;
  static_assert(kDepthGrain % Weight::kDepth == 0);
  const Share share(p.split, block, p.b.depth);
  const int m0 = share.m_tile * Tile::kM, n0 = share.n_tile * Tile::kN, n = p.b.n;
  const int column = static_cast<int>(threadIdx.x);  // of the tile, whose sum this thread has
  const bool sums_columns = share.m_tile == 0 && p.grad_b;
  auto bias_part = [&](int part) -> T& {
    return resolve(p.bias_parts, memory, task)[(share.n_tile * p.split.parts + part) * Tile::kN + column];
  };

  typename Weight::Accumulators sums;
  ColumnSums<Weight, Tile> columns;
  Weight::compute(p.a, p.b, p.terms, memory, task, m0, n0, share.begin, share.end, sums,
                  [&](bool second, const T* slabs, auto layout) {
                    if (sums_columns && !second) columns.add(slabs, layout);
                  });
  T total = sums_columns ? columns.total() : T(0);
  const bool has_column = sums_columns && column < Tile::kN && n0 + column < n;
  if (has_column && p.split.parts > 1) bias_part(share.part) = total;
  if (!add_parts<Weight>(p.split, share, resolve(p.parts, memory, task), memory.counters_of(task), sums))
    return;
  if (has_column) {
    if (p.split.parts > 1) {
      total = 0;
#pragma unroll 4
      for (int part = 0; part < p.split.parts; ++part) total += bias_part(part);
    }
    T* const to = resolve(p.grad_b, memory, task) + n0 + column;
    *to = p.add_b ? *to + total : total;
  }
  T* const grad_w = resolve(p.grad_w, memory, task);
  const auto at = Weight::position(m0, n0);
  if (!at.owner || !grad_w) return;
  write<Weight>(at, sums, n, p.vectors_w, p.add_w,
                [&](int m) { return m < p.a.gather.depth ? grad_w + static_cast<int64_t>(m) * n : nullptr; });
}

}  // namespace maml::cuda
