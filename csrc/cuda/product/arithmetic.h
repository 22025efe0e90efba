// The arithmetic of one warp: it multiplies one slab of k, which stands in shared memory, into an M x N tile
// of sums in registers. There are four arithmetics:
//
//   Simt<T>   ordinary multiply-adds of T; each sum runs in ascending k
//   Tf32      matrix instructions on operands rounded to 10 bits of fraction
//   Bf16      matrix instructions on operands rounded to 7 bits of fraction
//   Bf16x3    matrix instructions on bf16 pairs, x = hi + lo: the sum of lo hi, hi lo and hi hi has a
//             relative error of about 2e-5
//
// All of them read V x V blocks of the operand tiles (tile_layout.h); `base` is the index at which this
// warp's part of the tile starts.
//
// Simt: with i = lane / 8 and j = lane % 8, a thread takes the blocks i, i + 4, .. of A and j, j + 8, .. of
// B. It goes through all k of the slab, one q after the other.
//
// Matrix instructions: a warp computes C^T = B^T A^T, 16 columns n by 8 rows m an instruction. With
// g = lane / 4 and t = lane % 4, a lane reads the blocks (g, q = t) of both operands. The result does not
// depend on which k an instruction calls first; both operands only have to use the same order. So each lane
// feeds its own four consecutive k, 4 t .. 4 t + 3, in pairs, as they were loaded (where the tile is
// contiguous in k, without moves). Row or column g of group x is index 4 g + x. A thread's sums are then
// columns 4 g .. 4 g + 3, which is one whole vector, of rows 8 t .. 8 t + 7.
//
// `Accumulators` is what a thread holds: kRows x kColumns elements of the warp's tile; at(r, c) is element
// (row(r), column(c)). Columns come in vectors of V. The four lanes that are kRowLane and 2 kRowLane apart
// hold the same columns, and kStatisticsRows consecutive rows of the tile are kGroupRows rows of each of
// these lanes.
#pragma once

#include "cuda/product/mma.h"
#include "cuda/product/statistics.h"
#include "cuda/product/tile_layout.h"

namespace maml::cuda {

template <class T>
struct alignas(16) Vector {
  T element[kVector<T>];
};

/// f[i][k] = element (index i, k) of the block (lane, q) in the group of the tile that starts at `base`.
template <class Layout, class T>
__device__ __forceinline__ void load_block(const T* tile, int base, int lane, int q,
                                           T (&f)[kVector<T>][kVector<T>]) {
#pragma unroll
  for (int x = 0; x < kVector<T>; ++x) {
    const auto v = *reinterpret_cast<const Vector<T>*>(tile + Layout::vector(base, lane, x, q));
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) (Layout::kAlongK ? f[x][e] : f[e][x]) = v.element[e];
  }
}

template <class T_>
struct Simt {
  using T = T_;
  static constexpr int V = kVector<T>;
  static constexpr bool kMatrix = false;

  template <int M, int N>
  struct Accumulators {
    static constexpr int kRows = M / 4, kColumns = N / 8, kGroupRows = kStatisticsRows / 4, kRowLane = 8;
    T sum[kRows][kColumns] = {};
    __device__ __forceinline__ T& at(int r, int c) { return sum[r][c]; }
    static __device__ __forceinline__ int row(int lane, int r) {
      return r / V * (4 * V) + lane / 8 * V + r % V;
    }
    static __device__ __forceinline__ int column(int lane, int c) {
      return c / V * (8 * V) + lane % 8 * V + c % V;
    }
  };

  template <class LayoutA, class LayoutB, int M, int N>
  static __device__ __forceinline__ void multiply(const T* a, const T* b, int base_a, int base_b, int lane,
                                                  Accumulators<M, N>& sums) {
    const int i_lane = lane / 8, j_lane = lane % 8;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      T fb[N / 8 / V][V][V];
#pragma unroll
      for (int j = 0; j < N / 8 / V; ++j) load_block<LayoutB>(b, base_b + 8 * V * j, j_lane, q, fb[j]);
#pragma unroll
      for (int i = 0; i < M / 4 / V; ++i) {
        T fa[V][V];
        load_block<LayoutA>(a, base_a + i / 2 * (8 * V), i_lane + i % 2 * 4, q, fa);
#pragma unroll
        for (int k = 0; k < V; ++k) {
#pragma unroll
          for (int x = 0; x < V; ++x) {
#pragma unroll
            for (int c = 0; c < N / 8; ++c) sums.at(V * i + x, c) += fa[x][k] * fb[c / V][c % V][k];
          }
        }
      }
    }
  }
};

/// The sums of the matrix instructions: tile[i][j] is C^T of group i of the rows m by groups 2 j, 2 j + 1 of
/// the columns n.
template <int M, int N>
struct MatrixAccumulators {
  static constexpr int kRows = M / 4, kColumns = N / 8, kGroupRows = kStatisticsRows / 4, kRowLane = 1;
  float tile[M / 8][N / 16][4] = {};
  __device__ __forceinline__ float& at(int r, int c) {
    return tile[r / 8 * 4 + r % 4][c / 2][c % 2 * 2 + r % 8 / 4];
  }
  static __device__ __forceinline__ int row(int lane, int r) { return r / 8 * 32 + lane % 4 * 8 + r % 8; }
  static __device__ __forceinline__ int column(int lane, int c) { return c / 4 * 32 + lane / 4 * 4 + c % 4; }
};

/// The product by matrix instructions. `Words` holds the four k of one index as operands, a word for each
/// pair of slots that it fills.
template <class Words>
struct MatrixArithmetic {
  using T = float;
  static constexpr int V = kVector<T>;
  static constexpr bool kMatrix = true;

  template <int M, int N>
  using Accumulators = MatrixAccumulators<M, N>;

  template <class LayoutA, class LayoutB, int M, int N>
  static __device__ __forceinline__ void multiply(const T* a, const T* b, int base_a, int base_b, int lane,
                                                  MatrixAccumulators<M, N>& sums) {
    const int g = lane / 4, t = lane % 4;
    Words wb[N / 8];
#pragma unroll
    for (int j = 0; j < N / 32; ++j) load<LayoutB>(b, base_b + 32 * j, g, t, wb + 4 * j);
#pragma unroll
    for (int i = 0; i < M / 32; ++i) {
      Words wa[4];
      load<LayoutA>(a, base_a + 32 * i, g, t, wa);
#pragma unroll
      for (int part = 0; part < Words::kParts; ++part) {  // consecutive instructions write different sums
#pragma unroll
        for (int x = 0; x < 4; ++x) {
#pragma unroll
          for (int j = 0; j < N / 16; ++j) {
            Words::multiply(part, sums.tile[4 * i + x][j], wb[2 * j], wb[2 * j + 1], wa[x]);
          }
        }
      }
    }
  }

 private:
  template <class Layout>
  static __device__ __forceinline__ void load(const T* tile, int base, int g, int t, Words* words) {
    T f[V][V];
    load_block<Layout>(tile, base, g, t, f);
#pragma unroll
    for (int x = 0; x < V; ++x) words[x] = Words(f[x]);
  }
};

struct Tf32Words {
  static constexpr int kParts = 2;
  uint32_t k[4];
  Tf32Words() = default;
  __device__ __forceinline__ explicit Tf32Words(const float (&f)[4])
      : k{to_tf32(f[0]), to_tf32(f[1]), to_tf32(f[2]), to_tf32(f[3])} {}
  /// d += rows g (a0) and g + 8 (a1) times column g (b), for part `part` of the k.
  static __device__ __forceinline__ void multiply(int part, float (&d)[4], const Tf32Words& a0,
                                                  const Tf32Words& a1, const Tf32Words& b) {
    const int x = 2 * part, y = x + 1;
    mma_tf32(d, {a0.k[x], a1.k[x], a0.k[y], a1.k[y]}, {b.k[x], b.k[y]});
  }
};

struct Bf16Words {
  static constexpr int kParts = 1;
  uint32_t k[2];
  Bf16Words() = default;
  __device__ __forceinline__ explicit Bf16Words(const float (&f)[4])
      : k{to_bf16(f[0], f[1]), to_bf16(f[2], f[3])} {}
  static __device__ __forceinline__ void multiply(int, float (&d)[4], const Bf16Words& a0,
                                                  const Bf16Words& a1, const Bf16Words& b) {
    mma_bf16(d, {a0.k[0], a1.k[0], a0.k[1], a1.k[1]}, {b.k[0], b.k[1]});
  }
};

struct Bf16x3Words {
  static constexpr int kParts = 3;
  Bf16Words high, low;
  Bf16x3Words() = default;
  __device__ __forceinline__ explicit Bf16x3Words(const float (&f)[4]) : high(f), low(rest(high, f)) {}
  static __device__ __forceinline__ void multiply(int part, float (&d)[4], const Bf16x3Words& a0,
                                                  const Bf16x3Words& a1, const Bf16x3Words& b) {
    const bool a_low = part == 0, b_low = part == 1;  // the small products first: less is lost in rounding
    Bf16Words::multiply(0, d, a_low ? a0.low : a0.high, a_low ? a1.low : a1.high, b_low ? b.low : b.high);
  }

 private:
  static __device__ __forceinline__ Bf16Words rest(const Bf16Words& high, const float (&f)[4]) {
    return Bf16Words({f[0] - low_half(high.k[0]), f[1] - high_half(high.k[0]), f[2] - low_half(high.k[1]),
                      f[3] - high_half(high.k[1])});
  }
};

using Tf32 = MatrixArithmetic<Tf32Words>;
using Bf16 = MatrixArithmetic<Bf16Words>;
using Bf16x3 = MatrixArithmetic<Bf16x3Words>;

}  // namespace maml::cuda
