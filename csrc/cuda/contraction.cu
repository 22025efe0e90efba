// out (+)= scale times the sum of a b along the axes that out does not have (contraction.h), in one of two
// ways, by shape.
//
// As matrix products (product/product.h), in the layer's precision. Each axis of the loops belongs to one of
// four groups, by the operands that have it (a stride of 0 is no axis):
//
//   batch: out, a and b    m: out, not b    n: out, not a    k: not out
//
// For each index of the batch it is a product [m, k] [k, n]. The operands stay where they are
// (product/strides.h): an axis along which an operand has the stride 1 is the last one of its group, so that
// 16 bytes are one copy where sizes and addresses allow. The factors may change places, which gives the
// transpose of out. There are three pairs of operands: both in vectors along k; a along k and b along n; a
// along m and b along n.
//
// Where k is long and the tiles are few, k is split over blocks. Each block writes its sums to scratch
// [task, tile, split, sum of a thread, thread]; the last one of a tile adds up the splits in order
// (run/last_block.h). The number of splits depends on the shape of one task alone.
//
// blockIdx: x (batch, split, tile of n, tile of m), m fastest; z task. Numerics: sums in ascending k, first
// term first, then splits in order; then the scale; then the value that out held is added.
//
// Otherwise by plain multiply-adds: few elements in the sums, or few sums. Some threads share an element of
// out (shares.h). Float32 whatever the precision, because such sums are bound by memory.
#include <algorithm>
#include <limits>
#include <vector>

#include "cuda/contraction.h"
#include "cuda/conv2d.h"
#include "cuda/product/strides.h"
#include "cuda/run/last_block.h"
#include "cuda/run/work.h"
#include "cuda/shares.h"

namespace maml::cuda {
namespace {

/// The operands of the nests of a product: both factors and the result.
enum : int { kFactorA, kFactorB, kResult, kProductOperands };

/// The fewest elements of a sum, and the fewest sums of one index of the batch, for which a tile is filled:
/// below, most of its multiply-adds would be of zeros.
constexpr int kFewestTerms = kSmallTiles ? 2 : 8, kFewestSums = kSmallTiles ? 2 : 64;
/// The fewest elements of k in a split, and the most sums of a task's splits: 256 tiles of 32 x 32, which
/// with four tasks are two waves of a large GPU.
constexpr int kSplitDepth = kSmallTiles ? 64 : 256;
constexpr int64_t kMostSplitSums = kSmallTiles ? 1 << 14 : 1 << 18;
constexpr int64_t kLargestTile = 128;  // the side that sizes are rounded up to, to bound the tiles' sums

// ---- As matrix products --------------------------------------------------------------------------------

/// The axes of a contraction by groups.
struct Groups {
  Nest<kProductOperands> batch, m, n, k;
  int64_t start[kProductOperands];

  explicit Groups(const Contraction& c) : start{c.a.offset, c.b.offset, c.to.offset} {
    struct Axis {
      int64_t size, stride[kProductOperands];
    };
    std::vector<Axis> axes;
    for (int i = 0; i < c.loops.axes; ++i) {
      const int64_t size = extent(c.loops, i, c.n);
      if (size != 1) axes.push_back({size, {c.a.stride[i], c.b.stride[i], c.to.stride[i]}});
    }
    // An axis along which some operand is contiguous comes last.
    const auto least = [](const Axis& axis) {
      int64_t found = std::numeric_limits<int64_t>::max();
      for (const int64_t stride : axis.stride) {
        if (stride != 0) found = std::min(found, std::abs(stride));
      }
      return found;
    };
    std::stable_sort(axes.begin(), axes.end(),
                     [&](const Axis& x, const Axis& y) { return least(x) > least(y); });
    for (const Axis& axis : axes) {
      Nest<kProductOperands>& group = axis.stride[kResult] == 0    ? k
                                      : axis.stride[kFactorA] == 0 ? n
                                      : axis.stride[kFactorB] == 0 ? m
                                                                   : batch;
      group.append(axis.size, axis.stride);
    }
    for (Nest<kProductOperands>* group : {&batch, &m, &n, &k}) {
      if (group->axes == 0) group->append(1, {});
    }
  }

  /// The same with the factors in each other's place.
  void transpose() {
    std::swap(start[kFactorA], start[kFactorB]);
    std::swap(m, n);
    for (Nest<kProductOperands>* group : {&batch, &m, &n, &k}) {
      for (auto& stride : group->stride) std::swap(stride[kFactorA], stride[kFactorB]);
    }
  }
};

/// Whether consecutive indices of a group are consecutive elements of an operand.
bool is_dense(const Nest<kProductOperands>& group, int operand) {
  return group.steps > 1 && group.stride[group.axes - 1][operand] == 1;
}

/// Whether an operand is read or written in vectors along a group: the last axis is whole vectors, and all
/// other steps keep them aligned.
bool is_aligned(const Groups& g, const Nest<kProductOperands>& along, int operand, int vector) {
  if (!is_dense(along, operand) || along.size[along.axes - 1] % vector != 0) return false;
  for (const Nest<kProductOperands>* group : {&g.batch, &g.m, &g.n, &g.k}) {
    for (int a = 0; a < group->axes - (group == &along); ++a) {
      if (group->stride[a][operand] % vector != 0) return false;
    }
  }
  return true;
}

/// A product for kernels.
template <class T>
struct Tiled {
  Axes a_m, a_k, b_n, b_k, to_m, to_n, a_batch, b_batch, to_batch;
  Terms<T> terms{};
  T *out = nullptr, *parts = nullptr;  // parts: null with one split
  T scale = 1;
  int tiles_m = 1, tiles_n = 1, splits = 1, depth = 0;  // depth: of a split
  bool vectors_out = false, add = false;
};

/// Resident blocks per multiprocessor for which registers must suffice. Places along several axes take more
/// registers than those of an image: where a convolution's product needs all that three blocks leave it, two.
template <class Arithmetic, class Tile>
constexpr int kResidentContractions =
    std::is_same_v<Arithmetic, Simt<float>> ? 2 : kResidentProducts<Arithmetic, Tile>;

/// Writes the sums of one index of the batch.
template <class Product, class T>
__device__ __forceinline__ void write_sums(const Tiled<T>& p, const typename Product::Position& at,
                                           typename Product::Accumulators& sums, T* out) {
  constexpr int V = kVector<T>, kColumns = Product::Accumulators::kColumns;
  int column[kColumns];  // offsets; in vectors, of their first elements
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    column[c] = c % V == 0 || !p.vectors_out ? p.to_n.offset(at.column(c)) : kNoOffset;
#pragma unroll
  for (int r = 0; r < Product::Accumulators::kRows; ++r) {
    if (at.row(r) >= p.to_m.size) continue;
    T* const row = out + p.to_m.offset(at.row(r));
#pragma unroll
    for (int c = 0; c < kColumns; c += V) {
      T values[V];
#pragma unroll
      for (int e = 0; e < V; ++e) values[e] = p.scale * sums.at(r, c + e);
      if (p.vectors_out) {
        if (column[c] >= 0) put(row + column[c], values, V, true, p.add);
        continue;
      }
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (column[c + e] >= 0) put(row, column[c + e], values[e], p.add);
      }
    }
  }
}

/// One block of a product. `index`: its number within the task.
template <class Product, class Tile, class A, class B, class T>
__device__ __forceinline__ void compute_tile(const Tiled<T>& p, const Memory& memory, int64_t task,
                                             int index) {
  const int tiles = p.tiles_m * p.tiles_n, part = index / tiles, tile = index - part * tiles;
  const int batch = part / p.splits, split = part - batch * p.splits;
  const int n_tile = tile / p.tiles_m;
  const int m0 = (tile - n_tile * p.tiles_m) * Tile::kM, n0 = n_tile * Tile::kN;
  const A a{p.a_m, p.a_k, p.a_batch.offset(batch)};
  const B b{p.b_n, p.b_k, p.b_batch.offset(batch)};
  const int begin = split * p.depth, end = begin + p.depth < p.a_k.size ? begin + p.depth : p.a_k.size;

  typename Product::Accumulators sums;
  Product::compute(a, b, p.terms, memory, task, m0, n0, begin, end, sums, [](bool, const T*, auto) {});
  const auto at = Product::position(m0, n0);
  if (p.splits > 1) {
    constexpr int kSums = Product::Accumulators::kRows * Product::Accumulators::kColumns;
    constexpr int kColumns = Product::Accumulators::kColumns;
    const int number = batch * tiles + tile;
    T* const parts = resolve(p.parts, memory, task) +
                     static_cast<int64_t>(number) * p.splits * kSums * Tile::kGroup + threadIdx.x;
    if (at.owner) {
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        parts[(split * kSums + i) * Tile::kGroup] = sums.at(i / kColumns, i % kColumns);
    }
    if (!last_to_arrive(memory.counters_of(task) + number, p.splits)) return;
    if (at.owner) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums.at(i / kColumns, i % kColumns) = 0;
#pragma unroll 1
      for (int s = 0; s < p.splits; ++s) {
#pragma unroll
        for (int i = 0; i < kSums; ++i)
          sums.at(i / kColumns, i % kColumns) += parts[(s * kSums + i) * Tile::kGroup];
      }
    }
  }
  if (at.owner) write_sums<Product>(p, at, sums, resolve(p.out, memory, task) + p.to_batch.offset(batch));
}

template <class Arithmetic, class Tile, bool AAlongK, bool BAlongK>
__global__ void __launch_bounds__(Tile::kThreads, kResidentContractions<Arithmetic, Tile>)
    contraction_kernel(const __grid_constant__ Tiled<typename Arithmetic::T> p, Deferred deferred) {
  using A = Strided<AAlongK>;
  using B = Strided<BAlongK>;
  compute_tile<Product<Arithmetic, Tile, A, B>, Tile, A, B>(p, deferred.ready(), blockIdx.z,
                                                            static_cast<int>(blockIdx.x));
}

bool are_many(const Groups& g) {
  return g.k.steps >= kFewestTerms && static_cast<int64_t>(g.m.steps) * g.n.steps >= kFewestSums;
}

/// Whether a contraction is computed as matrix products.
bool fits_tiles(const Contraction& c) {
  const bool addressable =
      std::max({elements(c.a, c.n), elements(c.b, c.n), elements(c.to, c.n)}) <= INT32_MAX;
  return addressable && are_many(Groups(c));
}

/// How many parts k is split into at most, by its length.
int64_t most_splits(const Groups& g) { return g.k.steps / kSplitDepth; }

/// The work of a contraction: its operands are read once for each term.
template <class T>
Work work_of(const Contraction& c, int terms) {
  const double read = static_cast<double>(elements(c.a, c.n) + elements(c.b, c.n)) * terms;
  return {.flop = 2.0 * static_cast<double>(iterations(c.loops, c.n)) * terms,
          .bytes = (read + static_cast<double>(elements(c.to, c.n))) * sizeof(T)};
}

/// Launches the product of a pair of operands.
template <bool AAlongK, bool BAlongK, class T>
void launch_tiles(const Launcher& launch, const Contraction& c, const Groups& g, Tiled<T>& p) {
  Layer of;
  of.precision = c.precision;
  const int64_t m = g.m.steps, n = g.n.steps, k = g.k.steps, batch = g.batch.steps;
  with_product<T>(of, batch * m * n, n, [&]<class Arithmetic, class Tile>() {
    const int64_t tiles_m = blocks_for(m, Tile::kM), tiles_n = blocks_for(n, Tile::kN);
    const int64_t tiles = batch * tiles_m * tiles_n;
    const int64_t wanted =
        p.parts ? std::clamp<int64_t>(kMostSplitSums / (tiles * Tile::kM * Tile::kN), 1, most_splits(g)) : 1;
    constexpr int64_t kGrain = 64;  // a multiple of every tile's stage
    static_assert(kGrain % Product<Arithmetic, Tile, Strided<AAlongK>, Strided<BAlongK>>::kDepth == 0);
    const int64_t depth = blocks_for(blocks_for(k, wanted), kGrain) * kGrain;
    p.tiles_m = static_cast<int>(tiles_m), p.tiles_n = static_cast<int>(tiles_n);
    p.depth = static_cast<int>(depth), p.splits = static_cast<int>(blocks_for(k, depth));
    note([&] { return work_of<T>(c, p.terms.count); });
    launch(c.name, contraction_kernel<Arithmetic, Tile, AAlongK, BAlongK>, {tiles * p.splits}, Tile::kThreads,
           Product<Arithmetic, Tile, Strided<AAlongK>, Strided<BAlongK>>::kSharedBytes, p, launch.memory);
  });
}

template <class T>
void contract_tiles(const Launcher& launch, const Contraction& c, const Factors<T>* factors, int count,
                    T scale, bool add, T* out, T* scratch) {
  Groups g(c);
  clear_unless_reached(launch, c.to, c.n, static_cast<int64_t>(g.batch.steps) * g.m.steps * g.n.steps, add,
                       out);
  bool a_along_k = is_dense(g.k, kFactorA) || !is_dense(g.m, kFactorA);
  bool b_along_k = is_dense(g.k, kFactorB) || !is_dense(g.n, kFactorB);
  const bool across = is_dense(g.m, kResult) && !is_dense(g.n, kResult);
  const bool transposed = a_along_k == b_along_k ? across : b_along_k;
  if (transposed) {
    g.transpose();
    std::swap(a_along_k, b_along_k);
  }
  Tiled<T> p{{g.m, kFactorA}, {g.k, kFactorA},     {g.n, kFactorB},     {g.k, kFactorB},   {g.m, kResult},
             {g.n, kResult},  {g.batch, kFactorA}, {g.batch, kFactorB}, {g.batch, kResult}};
  // The offsets count from the operand's lowest element.
  const auto lowest = [](const int64_t start, const Axes& x, const Axes& y, const Axes& z) {
    return start - x.first - y.first - z.first;
  };
  const int64_t of_a = lowest(g.start[kFactorA], p.a_m, p.a_k, p.a_batch);
  const int64_t of_b = lowest(g.start[kFactorB], p.b_n, p.b_k, p.b_batch);
  for (int t = 0; t < count; ++t) {
    const T *a = transposed ? factors[t].b : factors[t].a, *b = transposed ? factors[t].a : factors[t].b;
    p.terms.add(a + of_a, b + of_b);
  }
  constexpr int V = kVector<T>;
  p.terms.vectors_a = is_aligned(g, a_along_k ? g.k : g.m, kFactorA, V) && in_vectors(p.terms.a, count, V);
  p.terms.vectors_b = is_aligned(g, b_along_k ? g.k : g.n, kFactorB, V) && in_vectors(p.terms.b, count, V);
  p.out = out + lowest(g.start[kResult], p.to_m, p.to_n, p.to_batch);
  p.vectors_out = is_aligned(g, g.n, kResult, V) && in_vectors<T>(p.out, V);
  p.parts = most_splits(g) > 1 ? scratch : nullptr;
  p.scale = scale, p.add = add;
  if (a_along_k && b_along_k) return launch_tiles<true, true>(launch, c, g, p);
  if (a_along_k) return launch_tiles<true, false>(launch, c, g, p);
  launch_tiles<false, false>(launch, c, g, p);
}

// ---- By plain multiply-adds ----------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    plain_contraction_kernel(const __grid_constant__ Split<kProductOperands> loops, Shares shares,
                             Terms<T> terms, T scale, bool add, T* symbolic_out, Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  const T *a = resolve(terms.a[0], memory, task), *b = resolve(terms.b[0], memory, task);
  const T *a2 = resolve(terms.a[1], memory, task), *b2 = resolve(terms.b[1], memory, task);
  T* out = resolve(symbolic_out, memory, task);
  Sharer sharer(shares);
  sharer.each(grid_team(), loops.outer.steps, [&](int64_t step) {
    const Offsets<kProductOperands> to = outer_step(loops, step);
    Sum<T> own;
    sharer.each_step(loops.inner, to, [&](const Offsets<kProductOperands>& at) {
      if (a) own += a[at.of[kFactorA]] * b[at.of[kFactorB]];
      if (a2) own += a2[at.of[kFactorA]] * b2[at.of[kFactorB]];
    });
    const T sum = sharer.sum(own);
    if (sharer.is_first()) put(out, to.of[kResult], scale * sum, add);
  });
}

template <class T>
void contract_plainly(const Launcher& launch, const Contraction& c, const Factors<T>* factors, int count,
                      T scale, bool add, T* out) {
  const Split<kProductOperands> s = split<kProductOperands>(c.loops, c.n, c.to, {&c.a, &c.b, &c.to});
  const Shares shares = shares_of(s, elements(c.a, c.n) < elements(c.b, c.n) ? kFactorB : kFactorA);
  Terms<T> terms;
  for (int t = 0; t < count; ++t) terms.add(factors[t].a, factors[t].b);
  clear_unless_reached(launch, c.to, c.n, s.outer.steps, add, out);
  note([&] { return work_of<T>(c, count); });
  launch(c.name, plain_contraction_kernel<T>, shared_grid(shares, s.outer.steps), kElementThreads, 0, s,
         shares, terms, scale, add, out, launch.memory);
}

}  // namespace

int64_t contraction_scratch(const Contraction& c) {
  const Groups g(c);
  if (!are_many(g) || most_splits(g) < 2) return 0;
  const auto rounded = [](int64_t size) { return blocks_for(size, kLargestTile) * kLargestTile; };
  const int64_t of_split = g.batch.steps * rounded(g.m.steps) * rounded(g.n.steps);
  return std::min(kMostSplitSums, most_splits(g) * of_split);
}

template <class T>
void contract(const Launcher& launch, const Contraction& c, const Factors<T>* factors, int count, T scale,
              bool add, T* out, T* scratch) {
  if (count > 0 && fits_tiles(c)) {
    contract_tiles(launch, c, factors, count, scale, add, out, scratch);
  } else {
    contract_plainly(launch, c, factors, count, scale, add, out);
  }
}

template void contract<float>(const Launcher&, const Contraction&, const Factors<float>*, int, float, bool,
                              float*, float*);
template void contract<double>(const Launcher&, const Contraction&, const Factors<double>*, int, double, bool,
                               double*, double*);

}  // namespace maml::cuda
