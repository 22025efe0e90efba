// The computations per channel of the stem, by one block: kStemColumns channels, one in each lane; warp `row`
// has the elements row, row + Warps, .. of every channel's patch. Sums over a patch go through shared memory,
// in the order of the warps. Channels that do not exist have weights of zero. Everything is in double.
#pragma once

#include "cuda/stem.h"

namespace maml::cuda {

static_assert(kStemColumns == 32);

/// A matrix [patch, channels of the block] in shared memory.
template <class T>
using StemMatrix = T[kStemPatch][kStemColumns];

/// The shared memory of these computations.
template <class T, int Warps>
struct alignas(16) ChannelMemory {
  StemMatrix<T> matrix;
  double gram[kMostPatch * kMostPatch];
  double parts[2][Warps][kStemColumns];
};

template <class T, int Warps>
struct StemChannels {
  static constexpr int kEach = (kMostPatch + Warps - 1) / Warps;

  const Tensors<T>& t;
  ChannelMemory<T, Warps>& shared;
  StemSaved<T> saved;
  const double *pbar, *G;
  int patch, n, row, column, channel;
  bool active;  // the channel exists

  __device__ __forceinline__ StemChannels(const Stem<T>& p, const Tensors<T>& t_,
                                          ChannelMemory<T, Warps>& shared_)
      : t(t_),
        shared(shared_),
        saved(p.saved(t_.saved)),
        pbar(reinterpret_cast<const double*>(t_.x[1])),
        G(pbar + p.tiles.patch),
        patch(p.tiles.patch),
        n(p.n),
        row(static_cast<int>(threadIdx.x) / 32),
        column(static_cast<int>(threadIdx.x) % 32),
        channel(static_cast<int>(blockIdx.y) * kStemColumns + column),
        active(channel < n) {}

  __device__ __forceinline__ int64_t at(int e) const { return static_cast<int64_t>(e) * n + channel; }
  /// A parameter of this channel: element i of p, or `otherwise` where it is absent.
  __device__ __forceinline__ double value(const T* p, int64_t i, double otherwise) const {
    return p && active ? static_cast<double>(p[i]) : otherwise;
  }
  __device__ __forceinline__ double kept(const double* p, int64_t i) const { return active ? p[i] : 0; }
  __device__ __forceinline__ double w(int e) const { return value(t.w[0], at(e), 0); }
  __device__ __forceinline__ double w_dot(int e) const { return value(t.w_dot[0], at(e), 0); }
  __device__ __forceinline__ double gamma() const { return value(t.w[2], channel, 1); }

  /// Calls f(i, e) for the elements e of this thread.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int e = row + Warps * i;
      if (e < patch) f(i, e);
    }
  }

  /// The sums over all elements of the channel's patch of term(i, e, sum), in all threads of the channel.
  template <int Q, class Term>
  __device__ __forceinline__ void sum(double (&total)[Q], Term term) const {
    static_assert(Q <= 2);
    double mine[Q] = {};
    each([&](int i, int e) { term(i, e, mine); });
    for (int q = 0; q < Q; ++q) shared.parts[q][row][column] = mine[q];
    __syncthreads();
    for (int q = 0; q < Q; ++q) {
      total[q] = 0;
      for (int warp = 0; warp < Warps; ++warp) total[q] += shared.parts[q][warp][column];
    }
    __syncthreads();
  }

  /// product[i] = element e of G v, for v [patch, channels]. Each block computes it anew. A warp loads G from
  /// shared memory for each of its multiply-adds: with 27 elements a patch that is 27 x 27 loads and 27 for
  /// each warp, some 850 cycles or 0.5 us; with 9 elements some 120 cycles.
  __device__ __forceinline__ void gram_product(const T* v, double (&product)[kEach]) const {
    for (int k = static_cast<int>(threadIdx.x); k < patch * patch; k += 32 * Warps) shared.gram[k] = G[k];
    each([&](int, int e) { shared.matrix[e][column] = active ? v[at(e)] : T(0); });
    for (int i = 0; i < kEach; ++i) product[i] = 0;
    __syncthreads();
    for (int q = 0; q < patch; ++q) {
      const double factor = static_cast<double>(shared.matrix[q][column]);
      each([&](int i, int e) { product[i] += shared.gram[e * patch + q] * factor; });
    }
    __syncthreads();
  }
};

template <class T>
__device__ __forceinline__ void give(T* to, int64_t i, double value, bool add) {
  if (to) to[i] = add ? to[i] + static_cast<T>(value) : static_cast<T>(value);
}

}  // namespace maml::cuda
