// The moments of the patches of a constant image (layers/patch_moments.h), computed once a task. With q = (1,
// p), the sum S = sum q q^T over all patches p contains their count, their mean and their products.
//
// S is symmetric, so only blocks of 4 x 4 on and below the diagonal are computed, one by each lane of a warp.
// A block goes through its tiles of the image in shared memory (stem_tiles.h); while one is used, the next is
// being copied. A warp takes a chunk of a tile's patches at a time and writes it to shared memory as doubles,
// where lane e writes element e of every patch. At the end the block adds up its warps in order. The last
// block to arrive (run/last_block.h) adds up the blocks in order and computes the moments.
//
// blockIdx: x part of the tiles, z task. Numerics: everything in double, where the product of two floats is
// exact. The twin on the CPU is cpu/patch_gram.cpp.
#include <algorithm>

#include "cuda/implement.h"
#include "cuda/run/last_block.h"
#include "cuda/stem_tiles.h"
#include "plan/problem.h"

namespace maml::cuda {
namespace {

constexpr int kThreads = kSmallTiles ? 64 : 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = kSmallTiles ? 4 : 16;  // patches that a warp takes at a time
static_assert(kStemRows % (kWarps * kChunk) == 0);
// Tiles of a block. The support images of a task are few: with more tiles, few multiprocessors would have
// work, and each would go through its tiles one after the other.
constexpr int64_t kPartTiles = kSmallTiles ? 2 : 4;
constexpr int64_t kMostParts = 128;
constexpr int kWidth = (kMostPatch + 1 + 3) / 4 * 4;  // the length of q, rounded up to blocks
constexpr int kBlocks = kWidth / 4 * (kWidth / 4 + 1) / 2, kSums = 16 * kBlocks;
static_assert(kBlocks <= 32 && kMostPatch <= 32);

template <class T>
struct Gram {
  StemTiles tiles;
  int tiles_of_block, counter;
  const T* x;
  T *sums, *y;
};

/// The index of S(i, j), i >= j, among the sums of the blocks.
__device__ __forceinline__ int sum_at(int i, int j) {
  return 16 * (i / 4 * (i / 4 + 1) / 2 + j / 4) + i % 4 * 4 + j % 4;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    patch_gram_kernel(const __grid_constant__ Gram<T> p, Deferred deferred) {
  __shared__ Vector<double> chunks[kWarps][kChunk][kWidth / 2];
  __shared__ double total[kSums];
  __shared__ StemTables tables;
  const Memory memory = deferred.ready();
  const StemTiles& s = p.tiles;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const T* const x = resolve(p.x, memory, blockIdx.z);
  T* const buffers = reinterpret_cast<T*>(dynamic_shared());
  double* const chunk = chunks[warp][0][0].element;
  const int first = static_cast<int>(blockIdx.x) * p.tiles_of_block;
  const int end = std::min(first + p.tiles_of_block, s.tiles);
  int i = 0;  // this lane computes block (i, j)
  while ((i + 1) * (i + 2) / 2 <= lane) ++i;
  const int j = lane - i * (i + 1) / 2;
  double sum[4][4] = {};

  copy_tile(s, s.tile(first), x, buffers);
  commit_copies();
  fill_tables(s, tables);
  for (int number = first; number < end; ++number) {
    wait_copies<0>();
    __syncthreads();
    if (number + 1 < end) {
      copy_tile(s, s.tile(number + 1), x, buffers + (number + 1 - first) % 2 * s.elements());
      commit_copies();
    }
    const StemTiles::Tile tile = s.tile(number);
    const T* const image = buffers + (number - first) % 2 * s.elements() + s.skew(tile);
    for (int from = warp * kChunk; from < kStemRows; from += kWarps * kChunk) {
      for (int q = 0; q < kChunk; ++q) {
        const bool there = s.output(tile, tables.output[from + q]) >= 0;
        double* const to = chunk + q * kWidth;
        if (lane + 1 < kWidth) {
          const bool element = there && lane < s.patch;
          to[lane + 1] = element ? static_cast<double>(image[tables.row[from + q] + tables.tap[lane]]) : 0;
        }
        if (lane == 0) to[0] = there ? 1 : 0;
      }
      __syncwarp();
      for (int q = 0; lane < kBlocks && q < kChunk; ++q) {
        const Vector<double>* const row = chunks[warp][q];
        const Vector<double> a[2] = {row[2 * i], row[2 * i + 1]}, b[2] = {row[2 * j], row[2 * j + 1]};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[r][c] += a[r / 2].element[r % 2] * b[c / 2].element[c % 2];
        }
      }
      __syncwarp();
    }
  }
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn && lane < kBlocks) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          double& to = total[16 * lane + 4 * r + c];
          to = turn == 0 ? sum[r][c] : to + sum[r][c];
        }
      }
    }
    __syncthreads();
  }
  if (gridDim.x > 1) {
    double* const parts = reinterpret_cast<double*>(resolve(p.sums, memory, blockIdx.z));
    for (int k = thread; k < kSums; k += kThreads)
      parts[static_cast<int64_t>(blockIdx.x) * kSums + k] = total[k];
    if (!last_to_arrive(memory.counters_of(blockIdx.z) + p.counter, gridDim.x)) return;
    for (int k = thread; k < kSums; k += kThreads) {
      double all = 0;
#pragma unroll 8
      for (int part = 0; part < static_cast<int>(gridDim.x); ++part) {
        all += parts[static_cast<int64_t>(part) * kSums + k];
      }
      total[k] = all;
    }
    __syncthreads();
  }
  // The mean and the centred products.
  double* const mean = reinterpret_cast<double*>(resolve(p.y, memory, blockIdx.z));
  const double count = total[0];
  const int patch = s.patch;
  for (int e = thread; e < patch; e += kThreads) mean[e] = total[sum_at(e + 1, 0)] / count;
  for (int k = thread; k < patch * patch; k += kThreads) {
    const int e = k / patch, q = k % patch, high = std::max(e, q), low = std::min(e, q);
    mean[patch + k] = total[sum_at(high + 1, low + 1)] / count -
                      total[sum_at(e + 1, 0)] / count * (total[sum_at(q + 1, 0)] / count);
  }
}

/// The patches of every output of the convolution.
StemTiles tiles_of(const Layer& l, int vector, bool planar) {
  Layer all = l;
  all.out = l.between;
  all.pooled = false;
  return StemTiles(all, vector, planar);
}
int64_t tiles_of_block(int64_t tiles) { return std::max(kPartTiles, blocks_for(tiles, kMostParts)); }

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const StemTiles tiles = tiles_of(l, kVector<T>, is_planar(t.x[0]));
  const int64_t of_block = tiles_of_block(tiles.tiles);
  // The moments of the query images may be computed on the branch of a graph, beside those of the support.
  const int counter = launch.branch ? kCounters - 2 : kCounters - 1;
  launch("patch_gram", patch_gram_kernel<T>, {blocks_for(tiles.tiles, of_block)}, kThreads,
         2 * tiles.elements() * sizeof(T), {tiles, int32(of_block), counter, t.x[0], t.scratch, t.y},
         launch.memory);
}

template <class T>
LaunchPasses<T> all_passes() {
  const auto nothing = [](const Launcher&, const Layer&, const Tensors<T>&) {};
  return {forward<T>, nothing, nothing, nothing};
}

}  // namespace

template <>
struct OnGpu<Kind::patch_gram> {
  static Footprint footprint(const Layer& l) {
    refuse_large(l);
    const int64_t parts =
        std::min(blocks_for(tiles_of(l, kVector<float>, false).tiles, kPartTiles), kMostParts);
    return {0, 2 * kSums * parts};
  }
  template <class T>
  static LaunchPasses<T> passes() {
    return all_passes<T>();
  }
};
template struct Implementation<Kind::patch_gram>;

}  // namespace maml::cuda
