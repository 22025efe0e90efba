// The product of one warp in the stem's kernels: 32 x 32 sums, whose operands are not tiles in shared memory
// but functions. a(index, k, block) and b(index, k, block) give V x V elements: block[i][j] = element (index
// + i, k + j), index and k multiples of V. Which blocks a lane asks for, and the sums that it holds, are
// those of arithmetic.h. With matrix instructions every element of a slab is asked for by one lane, and in
// Simt by the eight lanes (of a) or four lanes (of b) that use it.
#pragma once

#include "cuda/product/arithmetic.h"

namespace maml::cuda {

template <class Arithmetic>
struct WarpProduct;

template <class T_>
struct WarpProduct<Simt<T_>> {
  using T = T_;
  static constexpr int V = kVector<T>;
  using Sums = typename Simt<T>::template Accumulators<32, 32>;

  /// The operand b, to be read when it is used.
  template <int Slabs, class B>
  struct Held {
    B b;
    __device__ __forceinline__ Held(B b_, int, int) : b(b_) {}
  };

  /// Adds the product of slab `slab` to the sums, in ascending k.
  template <class A, int Slabs, class B>
  static __device__ __forceinline__ void multiply(A a, const Held<Slabs, B>& held, int slab, int lane,
                                                  Sums& sums) {
    multiply(a, held.b, slab, lane, sums);
  }
  template <class A, class B>
  static __device__ __forceinline__ void multiply(A a, B b, int slab, int lane, Sums& sums) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int k = slab * kSlab<T> + V * q;
      T fb[4 / V][V][V];
#pragma unroll
      for (int j = 0; j < 4 / V; ++j) b(8 * V * j + V * (lane % 8), k, fb[j]);
#pragma unroll
      for (int i = 0; i < 8 / V; ++i) {
        T fa[V][V];
        a(4 * V * i + V * (lane / 8), k, fa);
#pragma unroll
        for (int e = 0; e < V; ++e) {
#pragma unroll
          for (int x = 0; x < V; ++x) {
#pragma unroll
            for (int c = 0; c < 4; ++c) sums.at(V * i + x, c) += fa[x][e] * fb[c / V][c % V][e];
          }
        }
      }
    }
  }
};

template <class Words>
struct WarpProduct<MatrixArithmetic<Words>> {
  using T = float;
  static constexpr int V = kVector<T>;
  using Sums = MatrixAccumulators<32, 32>;

  /// The operand b, rounded and in registers.
  template <int Slabs, class B>
  struct Held {
    Words words[Slabs][4];
    __device__ __forceinline__ Held(B b, int slabs, int lane) {
#pragma unroll
      for (int slab = 0; slab < Slabs; ++slab) {
        if (slab < slabs) load(b, slab, lane, words[slab]);
      }
    }
  };

  template <class A, int Slabs, class B>
  static __device__ __forceinline__ void multiply(A a, const Held<Slabs, B>& held, int slab, int lane,
                                                  Sums& sums) {
    Words wa[4];
    load(a, slab, lane, wa);
    multiply(wa, held.words[slab], sums);
  }
  template <class A, class B>
  static __device__ __forceinline__ void multiply(A a, B b, int slab, int lane, Sums& sums) {
    Words wa[4], wb[4];
    load(a, slab, lane, wa);
    load(b, slab, lane, wb);
    multiply(wa, wb, sums);
  }

 private:
  template <class Operand>
  static __device__ __forceinline__ void load(Operand operand, int slab, int lane, Words (&words)[4]) {
    T block[V][V];
    operand(4 * (lane / 4), slab * kSlab<T> + 4 * (lane % 4), block);
#pragma unroll
    for (int x = 0; x < V; ++x) words[x] = Words(block[x]);
  }
  static __device__ __forceinline__ void multiply(const Words (&a)[4], const Words (&b)[4], Sums& sums) {
#pragma unroll
    for (int part = 0; part < Words::kParts; ++part) {  // consecutive instructions write different sums
#pragma unroll
      for (int x = 0; x < 4; ++x) {
#pragma unroll
        for (int j = 0; j < 2; ++j) Words::multiply(part, sums.tile[x][j], b[2 * j], b[2 * j + 1], a[x]);
      }
    }
  }
};

}  // namespace maml::cuda
