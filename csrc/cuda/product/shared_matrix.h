// Matrices in shared memory of any size up to 128 columns, and the product of one warp on them.
//
// A row is a number of 16-byte vectors: a power of two up to 8, or a multiple of 8. Vector v of row r stands
// at v ^ s(r), within groups of 8, where the bits of s are (r_1 ^ r_2, r_3, r_4) and r_i is bit i of r. With
// it, both ways to read an operand are free of bank conflicts where a row has at least 8 vectors (eight
// lanes, one phase of a 16-byte access, cover the 32 banks; tested by test_bank_conflicts.cpp):
//
//   along k       an index is a row: a lane reads V consecutive k of each of its rows
//   along index   a k is a row: a lane reads its consecutive indices of each of V rows
//
// So one copy of a weight [in, out] serves the forward pass (k is `in`, the row) and the cotangents (k is
// `out`), and one copy of activations [samples, features] serves forward products and weight gradients.
//
// A unit is 16 x 32 elements of C[i, j] = sum_k A[i, k] B[j, k], computed by one warp. The lane keeps 16
// sums:
//
//   SimtUnit<T>        multiply-adds of T in ascending k; rows 4 (lane / 8) + [0, 4), columns 4 (lane % 8) +
//   [0, 4) MatrixUnit<Words>  matrix instructions, with the operands and roundings of arithmetic.h. With g =
//   lane / 4
//                      and t = lane % 4, a lane feeds k = 4 t .. 4 t + 3 of each 16, of rows 2 g, 2 g + 1 and
//                      columns 4 g .. 4 g + 3. Its sums are rows 2 g, 2 g + 1, columns 8 t .. 8 t + 7
//
// Elements outside a matrix count as zeros. The columns that fill up a row must be zeros.
//
// Shared memory traffic of MatrixUnit, for each 16 of k: 2 + 4 reads of 16 bytes a lane, 3 KB, for 8 tf32
// instructions: 24 clocks at 128 bytes a clock, of 8192 multiply-adds. So tf32 is bound by shared memory, at
// 341 multiply-adds a clock and multiprocessor. bf16x3 issues 12 instructions for the same bytes. SimtUnit
// reads 4 + 4 vectors for 4 k: 4 KB, of which the rows of A are broadcast, for 2048 multiply-adds, which take
// 16 clocks.
#pragma once

#include <bit>

#include "cuda/product/arithmetic.h"

namespace maml::cuda {

template <class T>
struct SharedMatrix {
  static constexpr int V = kVector<T>;
  T* start;
  int rows, vectors;  // vectors: of a row

  static constexpr int vectors_of(int columns) {
    const int vectors = (columns + V - 1) / V;
    return vectors > 8 ? (vectors + 7) / 8 * 8
                       : static_cast<int>(std::bit_ceil(static_cast<unsigned>(vectors)));
  }
  static constexpr int size(int rows, int columns) { return rows * vectors_of(columns) * V; }
  static constexpr int swizzle(int row) { return ((row ^ row << 1) & 4) | (row >> 2 & 2) | (row >> 4 & 1); }
  /// The offset of vector v of a row.
  static constexpr int offset(int vectors, int row, int v) {
    return V * (row * vectors + (v ^ (swizzle(row) & (vectors < 8 ? vectors - 1 : 7))));
  }

  __device__ __forceinline__ SharedMatrix(T* start_, int rows_, int columns)
      : start(start_), rows(rows_), vectors(vectors_of(columns)) {}
  __device__ __forceinline__ Vector<T>& vector(int row, int v) const {
    return *reinterpret_cast<Vector<T>*>(start + offset(vectors, row, v));
  }
  __device__ __forceinline__ T& at(int row, int column) const {
    return vector(row, column / V).element[column % V];
  }
  __device__ __forceinline__ bool inside(int row, int v) const { return row < rows && v < vectors; }
};

/// f[x][e] = the element of index `index` + x and depth k + e; k is a multiple of V.
template <bool AlongK, int X, class T>
__device__ __forceinline__ void load_operand(const SharedMatrix<T>& m, int index, int k,
                                             T (&f)[X][kVector<T>]) {
  constexpr int V = kVector<T>;
  if constexpr (AlongK) {
#pragma unroll
    for (int x = 0; x < X; ++x) {
      Vector<T> v{};
      if (m.inside(index + x, k / V)) v = m.vector(index + x, k / V);
#pragma unroll
      for (int e = 0; e < V; ++e) f[x][e] = v.element[e];
    }
  } else {
    constexpr int W = X < V ? X : V;  // elements of one access
    struct alignas(W * sizeof(T)) Part {
      T element[W];
    };
#pragma unroll
    for (int e = 0; e < V; ++e) {
#pragma unroll
      for (int x = 0; x < X; x += W) {
        Part p{};
        if (m.inside(k + e, (index + x) / V)) p = *reinterpret_cast<const Part*>(&m.at(k + e, index + x));
#pragma unroll
        for (int i = 0; i < W; ++i) f[x + i][e] = p.element[i];
      }
    }
  }
}

template <class T_>
struct SimtUnit {
  using T = T_;
  struct Sums {
    static constexpr int kRows = 4, kColumns = 4;
    T sum[kRows][kColumns] = {};
    __device__ __forceinline__ T& at(int r, int c) { return sum[r][c]; }
    static __device__ __forceinline__ int row(int lane, int r) { return lane / 8 * 4 + r; }
    static __device__ __forceinline__ int column(int lane, int c) { return lane % 8 * 4 + c; }
  };

  /// Adds the product of rows [i, i + 16) of A and [j, j + 32) of B, over k of [0, depth).
  template <bool AlongKOfA, bool AlongKOfB>
  static __device__ __forceinline__ void multiply(const SharedMatrix<T>& a, const SharedMatrix<T>& b, int i,
                                                  int j, int depth, int lane, Sums& sums) {
    constexpr int V = kVector<T>;
#pragma unroll 2
    for (int k = 0; k < depth; k += V) {
      T fa[4][V], fb[4][V];
      load_operand<AlongKOfA>(a, i + Sums::row(lane, 0), k, fa);
      load_operand<AlongKOfB>(b, j + Sums::column(lane, 0), k, fb);
#pragma unroll
      for (int e = 0; e < V; ++e) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sums.at(r, c) += fa[r][e] * fb[c][e];
        }
      }
    }
  }
};

template <class Words>
struct MatrixUnit {
  using T = float;
  struct Sums {
    static constexpr int kRows = 2, kColumns = 8;
    float tile[4][4] = {};  // of columns 4 g + x of the instruction, x = 0 .. 3
    __device__ __forceinline__ float& at(int r, int c) { return tile[c % 4][2 * r + c / 4]; }
    static __device__ __forceinline__ int row(int lane, int r) { return lane / 4 * 2 + r; }
    static __device__ __forceinline__ int column(int lane, int c) { return lane % 4 * 8 + c; }
  };

  template <bool AlongKOfA, bool AlongKOfB>
  static __device__ __forceinline__ void multiply(const SharedMatrix<T>& a, const SharedMatrix<T>& b, int i,
                                                  int j, int depth, int lane, Sums& sums) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k = 0; k < depth; k += kSlab<T>) {
      float fa[2][4], fb[4][4];
      load_operand<AlongKOfA>(a, i + 2 * g, k + 4 * t, fa);
      load_operand<AlongKOfB>(b, j + 4 * g, k + 4 * t, fb);
      const Words wa[2] = {Words(fa[0]), Words(fa[1])};
      const Words wb[4] = {Words(fb[0]), Words(fb[1]), Words(fb[2]), Words(fb[3])};
#pragma unroll
      for (int part = 0; part < Words::kParts; ++part) {
#pragma unroll
        for (int x = 0; x < 4; ++x) Words::multiply(part, sums.tile[x], wa[0], wa[1], wb[x]);
      }
    }
  }
};

}  // namespace maml::cuda
