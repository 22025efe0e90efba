// y = bias + x * w and its tangent y_dot = bias_dot + x_dot * w + x * w_dot, each as one product (product.h):
//
//   C [m, n] = y     m: output pixel (sample, i, j);  n: c_out;  k: (tap, c_in)
//   A [m, k]         x gathered at (pixel, tap), zero in the padding
//   B [k, n]         w [tap, c_in, c_out], as it stands in memory
//
// k is split over blocks where there are few tiles (split.h). blockIdx: x the blocks of a task; z task.
// Numerics: sums in ascending k, first term first; parts of k in order; then the bias. tile_statistics.h
// computes the statistics of the output, and fold_statistics.h makes many entries few. Where the output is
// small, the last block of each column of tiles computes the normalisation that follows
// (normalise_columns.h).
#include "cuda/conv2d.h"
#include "cuda/normalise_columns.h"
#include "cuda/product/fold_statistics.h"
#include "cuda/product/split.h"
#include "cuda/product/tile_statistics.h"
#include "cuda/run/work.h"

namespace maml::cuda {
namespace {

template <class T>
struct Forward {
  PixelsByTaps a;
  Rows b;
  Terms<T> terms;
  Split split;
  const T* bias;
  T *y, *parts;
  bool vectors_y;
  StatisticsOf<T> statistics;
};

// When the last block computes the normalisation. It does so alone, with 128 threads, which have 8 kB in
// flight: .025 TB/s (benchmarks/gpu/model.py). With 96 rows of 32 channels, 12 kB a tensor, the forward pass
// takes .8 us, to see which block is last and to merge the statistics, and 1 us; its tangent .8 and 1.5 us.
// The launch that is saved takes 1.8 us and the time of its bytes, which is .1 us for 4 tasks and .5 to .7 us
// for 32. So for 4 tasks the forward pass gains a little and the tangent loses as much; for more tasks both
// gain. With twice the rows both lose.
constexpr int64_t kMostNormalisedRows = 96;

/// One counter for each column of tiles (last_block.h), the last of a launch's.
constexpr int kMostNormalisedColumns = 64, kNormalisedCounter = kCounters - kMostNormalisedColumns;
static_assert(kMostBlocksOfTask <= kNormalisedCounter);

/// The work of one block; false where another one has the totals of its tile.
template <class Arithmetic, class Tile>
__device__ __forceinline__ bool forward_block(const Forward<typename Arithmetic::T>& p, const Memory& memory,
                                              int64_t task, const Share& share) {
  using T = typename Arithmetic::T;
  using Forward = Product<Arithmetic, Tile, PixelsByTaps, Rows>;
  static_assert(kDepthGrain % Forward::kDepth == 0 && kMostBlocksOfTask <= kFirstFoldCounter);
  const int m0 = share.m_tile * Tile::kM, n0 = share.n_tile * Tile::kN;
  const int rows = p.a.gather.pixels, n = p.b.n;

  typename Forward::Accumulators sums;
  Forward::compute(p.a, p.b, p.terms, memory, task, m0, n0, share.begin, share.end, sums,
                   [](bool, const T*, auto) {});
  if (!add_parts<Forward>(p.split, share, resolve(p.parts, memory, task), memory.counters_of(task), sums))
    return false;
  const auto at = Forward::position(m0, n0);
  if (!at.owner) return true;
  if (const T* const bias = resolve(p.bias, memory, task)) {
#pragma unroll
    for (int c = 0; c < Forward::Accumulators::kColumns; ++c) {
      const T shift = at.column(c) < n ? bias[at.column(c)] : T(0);
#pragma unroll
      for (int r = 0; r < Forward::Accumulators::kRows; ++r) sums.at(r, c) += shift;
    }
  }
  T* const y = resolve(p.y, memory, task);
  write<Forward>(at, sums, n, p.vectors_y, false,
                 [&](int m) { return m < rows ? y + static_cast<int64_t>(m) * n : nullptr; });
  if (T* const entries = resolve(p.statistics.entries, memory, task)) {
    take_statistics<Forward>(at, sums, rows, n, resolve(p.statistics.primal, memory, task), entries);
  }
  return true;
}

/// Not inlined, so that nothing of it is kept in registers during the product, which needs all of them.
template <class Tile, class T>
[[gnu::noinline]] __device__ void fold_block(const Forward<T>& p, const Memory& memory) {
  const Share share(p.split, static_cast<int>(blockIdx.x), p.a.gather.depth);
  fold_statistics<Tile>(share.m_tile * Tile::kM, share.n_tile * Tile::kN, p.a.gather.pixels, p.b.n,
                        p.statistics.primal, resolve(p.statistics.entries, memory, blockIdx.z),
                        memory.counters_of(blockIdx.z));
}

template <class Arithmetic, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResidentProducts<Arithmetic, Tile>)
    forward_kernel(const __grid_constant__ Forward<typename Arithmetic::T> p,
                   const __grid_constant__ Deferred deferred) {
  const Memory& memory = deferred.ready();
  const Share share(p.split, static_cast<int>(blockIdx.x), p.a.gather.depth);
  if (!forward_block<Arithmetic, Tile>(p, memory, blockIdx.z, share) || !p.statistics.entries) return;
  fold_block<Tile>(p, memory);
}

template <class Arithmetic, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResidentProducts<Arithmetic, Tile>)
    forward_normalised_kernel(const __grid_constant__ Forward<typename Arithmetic::T> p,
                              const __grid_constant__ Following<typename Arithmetic::T> following,
                              const __grid_constant__ Deferred deferred) {
  const Memory& memory = deferred.ready();
  const int64_t task = blockIdx.z;
  const Share share(p.split, static_cast<int>(blockIdx.x), p.a.gather.depth);
  if (!forward_block<Arithmetic, Tile>(p, memory, task, share)) return;
  unsigned* const counter = memory.counters_of(task) + kNormalisedCounter + share.n_tile;
  if (!last_to_arrive(counter, static_cast<unsigned>(p.split.tiles_m))) return;
  normalise_columns<Tile::kN, Tile::kThreads>(following, memory, task, share.n_tile * Tile::kN);
}

Extent extent_of(const Layer& l) {
  return {l.n * l.out.h * l.out.w, l.out.c, l.window.kernel_h * l.window.kernel_w * l.in.c};
}

}  // namespace

int64_t convolve_scratch(const Layer& l) {
  const Extent product = extent_of(l);
  return split_scratch(l, std::span(&product, 1));
}

bool normalises_at_once(const Layer& l) {
  const Extent product = extent_of(l);
  const bool matrix = l.precision != Precision::float32;
  // A layer may also be computed in double, without matrix instructions.
  for (const bool in_matrix : {false, matrix}) {
    const Cut cut(in_matrix, std::span(&product, 1));
    if (cut.tile != TileClass::small || blocks_for(product.n, cut.size.n) > kMostNormalisedColumns)
      return false;
  }
  return product.m <= kMostNormalisedRows;
}

template <class T>
void convolve(const Launcher& launch, const char* name, const Layer& l, Terms<T> terms, const T* bias, T* out,
              StatisticsOf<T> statistics, T* scratch, const Following<T>* following) {
  const PatchGather gather = patch_gather<T>(l);
  terms.vectors_a = in_vectors(terms.a, terms.count, l.in.c);
  terms.vectors_b = in_vectors(terms.b, terms.count, l.out.c);
  Forward<T> p{{gather},  {gather.depth, static_cast<int>(l.out.c)},
               terms,     {},
               bias,      out,
               scratch,   in_vectors(out, l.out.c),
               statistics};
  const Extent product = extent_of(l);
  with_arithmetic<T>(l.precision, [&]<class Arithmetic>() {
    const Cut cut(Arithmetic::kMatrix, std::span(&product, 1));
    SplitPlacer splits;
    p.split = splits.place(cut, product);
    note([&] {
      Work work = traffic<T>(splits.slots() * cut.size.elements(), 2);
      work += product_work<T>(product.m, product.n, product.k, terms.count, l.n * size(l.in),
                              product.m * product.n);
      if (following) {
        const int tensors = following->tangent ? 3 : 2;
        work += traffic<T>(product.m * product.n, tensors);
        // The bytes of one block; no other field of a product.
        work.part_bytes = traffic<T>(product.m * std::min(product.n, cut.size.n), tensors).bytes;
      }
      return work;
    });
    if (following) {
      using Small = typename Tiles<Arithmetic>::Small;
      return launch(name, forward_normalised_kernel<Arithmetic, Small>,
                    {cut.size.tiles(product) * p.split.parts}, Small::kThreads,
                    Product<Arithmetic, Small, PixelsByTaps, Rows>::kSharedBytes, p, *following,
                    launch.memory);
    }
    with_tile<Arithmetic>(cut.tile, [&]<class Tile>() {
      launch(name, forward_kernel<Arithmetic, Tile>, {cut.size.tiles(product) * p.split.parts},
             Tile::kThreads, Product<Arithmetic, Tile, PixelsByTaps, Rows>::kSharedBytes, p, launch.memory);
    });
  });
}

template <class T>
void convolve(const Launcher& launch, const char* name, const Layer& l, Terms<T> terms, const T* bias, T* out,
              StatisticsOf<T> statistics, T* scratch) {
  convolve<T>(launch, name, l, terms, bias, out, statistics, scratch, nullptr);
}

template void convolve<float>(const Launcher&, const char*, const Layer&, Terms<float>, const float*, float*,
                              StatisticsOf<float>, float*);
template void convolve<double>(const Launcher&, const char*, const Layer&, Terms<double>, const double*,
                               double*, StatisticsOf<double>, double*);
template void convolve<float>(const Launcher&, const char*, const Layer&, Terms<float>, const float*, float*,
                              StatisticsOf<float>, float*, const Following<float>*);
template void convolve<double>(const Launcher&, const char*, const Layer&, Terms<double>, const double*,
                               double*, StatisticsOf<double>, double*, const Following<double>*);

}  // namespace maml::cuda
