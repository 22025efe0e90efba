// grad_w = sum over output pixels of x^T grad_y, and its tangent, the products of x with grad_y_dot and of
// x_dot with grad_y; and grad_b = sum over pixels of grad_y. As one product (product.h):
//
//   C [m, n] = grad_w     m: (tap, c_in);  n: c_out;  k: output pixel (sample, i, j)
//   A [m, k]              x gathered at (pixel, tap), contiguous in m, zero in the padding
//   B [k, n]              grad_y, as it stands in memory
//
// C is small and k is long, so k is split over blocks; the number of splits depends on the layer's shape.
// Each block writes its part to scratch [splits, m, n], and a second kernel adds up the parts in order. With
// one split, the block writes grad_w itself. The blocks of the first row of tiles also sum the columns of the
// B tiles in shared memory: that is grad_b, in parts [splits, n] after the others. These sums are of type T,
// whatever the arithmetic of the product.
//
// blockIdx: x tile of m, y (tile of n, split), z task. Numerics: sums in ascending k, first term first; then
// splits in order; then the value that the gradient held is added.
#include <algorithm>

#include "cuda/conv2d.h"
#include "cuda/run/work.h"

namespace maml::cuda {
namespace {

constexpr int kSplitPixels = kSmallTiles ? 64 : 256;  // the fewest pixels of a split
constexpr int kSplitGrain = 64;                       // it has a multiple of so many, for any tile's stages
constexpr int64_t kMostSplits = 32;
constexpr int kAddThreads = kSmallTiles ? 32 : 256;

template <class T>
struct WeightGradient {
  TapsByPixels a;
  Rows b;
  Terms<T> terms;
  int splits, split_pixels;
  T *grad_w, *grad_b, *parts;  // parts: null with one split
  bool vectors_w, add_w, add_b;

  __host__ __device__ int64_t outputs() const { return static_cast<int64_t>(a.gather.depth) * b.n; }
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
__global__ void __launch_bounds__(Tile::kThreads, kResidentProducts<Arithmetic, Tile>)
    weight_gradient_kernel(const __grid_constant__ WeightGradient<typename Arithmetic::T> p,
                           Deferred deferred) {
  const Memory memory = deferred.ready();
  using T = typename Arithmetic::T;
  using Weight = Product<Arithmetic, Tile, TapsByPixels, Rows>;
  static_assert(kSplitGrain % Weight::kDepth == 0);
  const int64_t task = blockIdx.z;
  const int split = static_cast<int>(blockIdx.y) % p.splits, n = p.b.n;
  const int m0 = static_cast<int>(blockIdx.x) * Tile::kM,
            n0 = static_cast<int>(blockIdx.y) / p.splits * Tile::kN;
  const int begin = split * p.split_pixels;
  const int end = begin + p.split_pixels < p.b.depth ? begin + p.split_pixels : p.b.depth;
  const bool sums_columns = blockIdx.x == 0 && p.grad_b;

  typename Weight::Accumulators sums;
  ColumnSums<Weight, Tile> columns;
  Weight::compute(p.a, p.b, p.terms, memory, task, m0, n0, begin, end, sums,
                  [&](bool second, const T* slabs, auto layout) {
                    if (sums_columns && !second) columns.add(slabs, layout);
                  });
  T* const parts = resolve(p.parts, memory, task);
  if (sums_columns) {
    T* const grad_b = resolve(p.grad_b, memory, task);
    const T total = columns.total();
    const int column = n0 + static_cast<int>(threadIdx.x);
    if (static_cast<int>(threadIdx.x) < Tile::kN && column < n) {
      T* const to = parts ? parts + p.splits * p.outputs() + static_cast<int64_t>(split) * n : grad_b;
      to[column] = p.add_b && !parts ? to[column] + total : total;
    }
  }
  T* const grad_w = parts ? parts + split * p.outputs() : resolve(p.grad_w, memory, task);
  const auto at = Weight::position(m0, n0);
  if (!at.owner || !p.grad_w) return;
  write<Weight>(at, sums, n, p.vectors_w, p.add_w && !parts,
                [&](int m) { return m < p.a.gather.depth ? grad_w + static_cast<int64_t>(m) * n : nullptr; });
}

/// One thread for each element of grad_w, then of grad_b.
template <class T>
__global__ void __launch_bounds__(kAddThreads)
    add_splits_kernel(const __grid_constant__ WeightGradient<T> p, Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z, outputs = p.outputs(), n = p.b.n;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i >= outputs + n) return;
  const bool bias = i >= outputs;
  T* to = resolve(bias ? p.grad_b : p.grad_w, memory, task);
  if (!to) return;
  const T* from = resolve(p.parts, memory, task);
  const int64_t part = bias ? n : outputs;
  from += bias ? p.splits * outputs + (i - outputs) : i;
  to += bias ? i - outputs : i;
  T sum = 0;
#pragma unroll 4
  for (int split = 0; split < p.splits; ++split) sum += from[split * part];
  *to = (bias ? p.add_b : p.add_w) ? *to + sum : sum;
}

/// How many parts k is split into: each has kSplitPixels pixels or more, and all parts together are no larger
/// than the operands.
int64_t splits_of(const Layer& l) {
  const int64_t pixels = l.n * l.out.h * l.out.w * (l.pooled ? 4 : 1);
  const int64_t outputs = l.window.kernel_h * l.window.kernel_w * l.in.c * l.out.c;
  return std::clamp<int64_t>(std::min(pixels / kSplitPixels, pixels * (l.in.c + l.out.c) / outputs), 1,
                             kMostSplits);
}

}  // namespace

int64_t weight_gradient_scratch(const Layer& l) {
  const int64_t splits = splits_of(l);
  const int64_t outputs = l.window.kernel_h * l.window.kernel_w * l.in.c * l.out.c;
  return splits > 1 ? splits * (outputs + l.out.c) : 0;
}

template <class T>
void weight_gradient(const Launcher& launch, const char* name, const Layer& l, Terms<T> terms, bool add_w,
                     bool add_b, T* grad_w, T* grad_b, T* scratch) {
  const PatchGather gather = patch_gather<T>(l);
  terms.vectors_a = in_vectors(terms.a, terms.count, l.in.c);
  terms.vectors_b = in_vectors(terms.b, terms.count, l.out.c);
  const int64_t m = gather.depth, n = l.out.c, wanted = splits_of(l);
  const int64_t split_pixels = blocks_for(blocks_for(gather.pixels, wanted), kSplitGrain) * kSplitGrain;
  const int64_t splits = blocks_for(gather.pixels, split_pixels);
  T* const parts = splits > 1 ? scratch : nullptr;
  const WeightGradient<T> p{{gather},
                            {gather.pixels, static_cast<int>(n)},
                            terms,
                            static_cast<int>(splits),
                            static_cast<int>(split_pixels),
                            grad_w,
                            grad_b,
                            parts,
                            in_vectors(parts ? parts : grad_w, n),
                            add_w,
                            add_b};
  note([&] {
    return product_work<T>(grad_w ? m : 0, n, gather.pixels, terms.count, l.n * size(l.in), m * n * splits);
  });
  with_product<T>(l, m * n * splits, n, [&]<class Arithmetic, class Tile>() {
    launch(name, weight_gradient_kernel<Arithmetic, Tile>,
           {grad_w ? blocks_for(m, Tile::kM) : 1, blocks_for(n, Tile::kN) * splits}, Tile::kThreads,
           Product<Arithmetic, Tile, TapsByPixels, Rows>::kSharedBytes, p, launch.memory);
  });
  if (parts) {
    note([&] { return traffic<T>(m * n * (splits + 1), 1); });
    launch("conv2d gradient parts", add_splits_kernel<T>, {blocks_for(m * n + n, kAddThreads)}, kAddThreads,
           0, p, launch.memory);
  }
}

template void weight_gradient<float>(const Launcher&, const char*, const Layer&, Terms<float>, bool, bool,
                                     float*, float*, float*);
template void weight_gradient<double>(const Launcher&, const char*, const Layer&, Terms<double>, bool, bool,
                                      double*, double*, double*);

}  // namespace maml::cuda
