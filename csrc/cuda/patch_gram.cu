// The moments of the patches of a constant image (layers/patch_moments.h), computed once a task. With q = (1,
// p), the sum S = sum q q^T over all patches p contains their count, their mean and their products.
//
// S is symmetric, so only blocks of 4 x 4 on and below the diagonal are computed, one by each lane of a warp.
// The warps take turns at chunks of patches. A warp gathers its chunk into shared memory as doubles, where
// lane e loads element e of every patch. At the end, the block adds up its warps in order, and a second
// kernel adds up the blocks.
//
// blockIdx: x part of the patches, z task. Numerics: everything in double, where the product of two floats is
// exact. The twin on the CPU is cpu/patch_gram.cpp.
#include <algorithm>

#include "cuda/conv2d.h"
#include "cuda/implement.h"
#include "layers/patch_moments.h"
#include "plan/problem.h"

namespace maml::cuda {
namespace {

constexpr int kThreads = kSmallTiles ? 64 : 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = kSmallTiles ? 4 : 16;           // patches that a warp takes at a time
constexpr int kPartPatches = kSmallTiles ? 64 : 2048;  // patches of a block
constexpr int64_t kMostParts = 128;
constexpr int kWidth = (kMostPatch + 1 + 3) / 4 * 4;  // the length of q, rounded up to blocks
constexpr int kBlocks = kWidth / 4 * (kWidth / 4 + 1) / 2, kSums = 16 * kBlocks;
static_assert(kBlocks <= 32 && kMostPatch <= 32);

struct Patches {
  PatchGather gather;
  int part_patches, parts;
};

/// The index of S(i, j), i >= j, among the sums of the blocks.
__device__ __forceinline__ int sum_at(int i, int j) {
  return 16 * (i / 4 * (i / 4 + 1) / 2 + j / 4) + i % 4 * 4 + j % 4;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    patch_sums_kernel(const __grid_constant__ Patches p, const T* symbolic_x, T* symbolic_sums,
                      Deferred deferred) {
  const Memory memory = deferred.ready();
  __shared__ Vector<double> chunks[kWarps][kChunk][kWidth / 2];
  __shared__ double total[kSums];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const T* const x = resolve(symbolic_x, memory, blockIdx.z);
  double* const chunk = chunks[warp][0][0].element;
  const int begin = static_cast<int>(blockIdx.x) * p.part_patches;
  const int end = std::min(begin + p.part_patches, p.gather.pixels);
  const Place tap = p.gather.tap(lane);
  int i = 0;  // this lane computes block (i, j)
  while ((i + 1) * (i + 2) / 2 <= lane) ++i;
  const int j = lane - i * (i + 1) / 2;
  double sum[4][4] = {};
  for (int first = begin; first < end; first += kWarps * kChunk) {
    for (int q = 0; q < kChunk; ++q) {
      const int pixel = first + warp * kChunk + q;
      const Element e = p.gather.element(p.gather.pixel(pixel), tap);
      double* const to = chunk + q * kWidth;
      const bool there = pixel < end;
      if (lane + 1 < kWidth) to[lane + 1] = there && e.inside ? static_cast<double>(x[e.offset]) : 0;
      if (lane == 0) to[0] = there ? 1 : 0;
    }
    __syncthreads();
    for (int q = 0; lane < kBlocks && q < kChunk; ++q) {
      const Vector<double>* const row = chunks[warp][q];
      const Vector<double> a[2] = {row[2 * i], row[2 * i + 1]}, b[2] = {row[2 * j], row[2 * j + 1]};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] += a[r / 2].element[r % 2] * b[c / 2].element[c % 2];
      }
    }
    __syncthreads();
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
  double* const sums = reinterpret_cast<double*>(resolve(symbolic_sums, memory, blockIdx.z)) +
                       static_cast<int64_t>(blockIdx.x) * kSums;
  for (int k = thread; k < kSums; k += kThreads) sums[k] = total[k];
}

/// One block a task adds up the parts in order and computes the mean and the centred products.
template <class T>
__global__ void __launch_bounds__(kThreads)
    patch_moments_kernel(int patch, int parts, const T* symbolic_sums, T* symbolic_y, Deferred deferred) {
  const Memory memory = deferred.ready();
  __shared__ double total[kSums];
  const int thread = static_cast<int>(threadIdx.x);
  const double* const sums = reinterpret_cast<const double*>(resolve(symbolic_sums, memory, blockIdx.z));
  for (int k = thread; k < kSums; k += kThreads) {
    double sum = 0;
    for (int part = 0; part < parts; ++part) sum += sums[static_cast<int64_t>(part) * kSums + k];
    total[k] = sum;
  }
  __syncthreads();
  double* const mean = reinterpret_cast<double*>(resolve(symbolic_y, memory, blockIdx.z));
  const double count = total[0];
  for (int e = thread; e < patch; e += kThreads) mean[e] = total[sum_at(e + 1, 0)] / count;
  for (int k = thread; k < patch * patch; k += kThreads) {
    const int e = k / patch, q = k % patch, high = std::max(e, q), low = std::min(e, q);
    mean[patch + k] = total[sum_at(high + 1, low + 1)] / count -
                      total[sum_at(e + 1, 0)] / count * (total[sum_at(q + 1, 0)] / count);
  }
}

int64_t parts_of(int64_t patches) {
  return std::clamp<int64_t>(blocks_for(patches, kPartPatches), 1, kMostParts);
}

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const Window& k = l.window;
  const PatchGather gather(l.n, l.in, l.between.h, l.between.w, k.stride_h, k.stride_w, -k.pad_top,
                           -k.pad_left, k.kernel_h, k.kernel_w);
  const int64_t part_patches = blocks_for(gather.pixels, parts_of(gather.pixels));
  const int64_t parts = blocks_for(gather.pixels, part_patches);
  launch("patch_gram sums", patch_sums_kernel<T>, {parts}, kThreads, 0,
         {gather, static_cast<int>(part_patches), static_cast<int>(parts)}, t.x[0], t.scratch, launch.memory);
  launch("patch_gram", patch_moments_kernel<T>, {}, kThreads, 0, gather.depth, static_cast<int>(parts),
         t.scratch, t.y, launch.memory);
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
    return {0, 2 * kSums * parts_of(l.n * l.between.h * l.between.w)};
  }
  template <class T>
  static LaunchPasses<T> passes() {
    return all_passes<T>();
  }
};
template struct Implementation<Kind::patch_gram>;

}  // namespace maml::cuda
