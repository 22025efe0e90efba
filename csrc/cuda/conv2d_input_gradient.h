// grad_x = sum over taps of grad_y w^T, and its tangent: the products of grad_y_dot with w and of grad_y with
// w_dot.
//
// Every element of grad_x gathers its terms; nothing is scattered. With stride s, input rows with equal
// (i + pad) mod s read the same taps. So each of the s x s parity classes is a convolution of grad_y with
// stride 1 and the taps of that class, last first, and no product has a factor that is zero because of the
// stride. There is one product (product.h) for each class:
//
//   C [m, n] = grad_x     m: (sample, position of the class);  n: c_in;  k: (tap of the class, c_out)
//   A [m, k]              grad_y gathered, zero outside
//   B [k, n]              w [tap, c_in, c_out], as it stands in memory, contiguous in k
//
// Numerics: sums in ascending k, first term first; then the value that grad_x held is added. A class without
// taps gets zeros. sum_cotangents.h adds up what is written, for a normalisation that reads it next.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/conv2d.h"
#include "cuda/product/split.h"
#include "cuda/run/work.h"
#include "cuda/sum_cotangents.h"

namespace maml::cuda {

struct ParityClass {
  PixelsByTaps a;
  Taps b;
  PatchGather to;  // where its positions stand in grad_x
  Split split;
  int first_block;
  int first_entry, first_folded;  // of its tiles' sums

  Extent extent() const { return {to.pixels, b.n, b.depth}; }
};

constexpr int kMostClasses = 9;  // per launch: strides up to 3 x 3; kernel parameters stay below 4 KB

template <class T>
struct InputGradient {
  ParityClass classes[kMostClasses];
  int count;
  Terms<T> terms;
  T *grad_x, *parts;
  bool vectors_x, add;
  SumOfTiles<T> sums;
};

template <class Arithmetic, class Tile>
using InputProduct = Product<Arithmetic, Tile, PixelsByTaps, Taps>;

/// The work of one of the products' blocks.
template <class Arithmetic, class Tile>
__device__ __forceinline__ void input_gradient_block(const InputGradient<typename Arithmetic::T>& p,
                                                     const Memory& memory, int64_t task, int block) {
  using T = typename Arithmetic::T;
  using Backward = InputProduct<Arithmetic, Tile>;
  static_assert(kDepthGrain % Backward::kDepth == 0);
  int own = 0;
  while (own + 1 < p.count && block >= p.classes[own + 1].first_block) ++own;
  const ParityClass& c = p.classes[own];
  const Share share(c.split, block - c.first_block, c.b.depth);
  const int m0 = share.m_tile * Tile::kM, n0 = share.n_tile * Tile::kN;

  typename Backward::Accumulators sums;
  Backward::compute(c.a, c.b, p.terms, memory, task, m0, n0, share.begin, share.end, sums,
                    [](bool, const T*, auto) {});
  if (!add_parts<Backward>(c.split, share, resolve(p.parts, memory, task), memory.counters_of(task), sums))
    return;
  T* const grad_x = resolve(p.grad_x, memory, task);
  if (const auto at = Backward::position(m0, n0); at.owner) {
    write<Backward>(at, sums, c.b.n, p.vectors_x, p.add, [&](int m) {
      const Place to = c.to.pixel(m);
      return to.at < 0 ? nullptr : grad_x + to.offset;
    });
  }
  if (!p.sums.entries) return;
  const SummedTile tile{share.m_tile, c.split.tiles_m, n0,
                        c.b.n,        c.first_entry,   share.n_tile * p.sums.folded + c.first_folded};
  TileOfCotangents<Tile, T>(p.sums, tile, memory, task).sum(grad_x, [&](int m) {
    const Place to = c.to.pixel(m);
    return RowOfSample{to.at < 0 ? -1 : c.to.by_channels.quotient(to.offset), c.to.by_positions.quotient(m)};
  });
}

/// One axis of a parity class: its positions in grad_x are first, first + stride, ...; its taps are parity,
/// parity + stride, ...; `start` is the first row of grad_y that the first position reads.
struct ParityAxis {
  int64_t parity, first, positions, taps, start;
  ParityAxis(int64_t parity_, int64_t size, int64_t kernel, int64_t stride, int64_t pad) : parity(parity_) {
    first = ((parity - pad) % stride + stride) % stride;
    positions = first < size ? (size - first - 1) / stride + 1 : 0;
    taps = parity < kernel ? (kernel - parity - 1) / stride + 1 : 0;
    start = (first + pad - parity) / stride - (taps - 1);
  }
};

inline ParityClass parity_class(const Layer& l, const ParityAxis& rows, const ParityAxis& columns) {
  const Window& k = l.window;
  const int64_t taps = rows.taps * columns.taps, tap_size = l.in.c * l.out.c;
  const int64_t last_row = rows.parity + (rows.taps - 1) * k.stride_h;
  const int64_t last_column = columns.parity + (columns.taps - 1) * k.stride_w;
  ParityClass c;
  c.a.gather = PatchGather(l.n, l.out, rows.positions, columns.positions, 1, 1, rows.start, columns.start,
                           rows.taps, columns.taps);
  c.b.n = static_cast<int>(l.in.c);
  c.b.o = static_cast<int>(l.out.c);
  c.b.depth = static_cast<int>(taps * l.out.c);
  c.b.first = static_cast<int>((last_row * k.kernel_w + last_column) * tap_size);
  c.b.row = static_cast<int>(k.stride_h * k.kernel_w * tap_size);
  c.b.column = static_cast<int>(k.stride_w * tap_size);
  c.b.by_o = Divisor(c.b.o);
  c.b.by_taps_w = c.a.gather.by_taps_w;
  c.to = PatchGather(l.n, l.in, rows.positions, columns.positions, k.stride_h, k.stride_w, rows.first,
                     columns.first, 1, 1);
  c.first_block = c.first_entry = c.first_folded = 0;
  return c;
}

/// The classes that have something to write, those with the longest sums first. `add`: grad_x is added to.
inline std::vector<ParityClass> parity_classes(const Layer& l, bool add) {
  std::vector<ParityClass> classes;
  for (int64_t a = 0; a < l.window.stride_h; ++a) {
    for (int64_t b = 0; b < l.window.stride_w; ++b) {
      const ParityAxis rows(a, l.in.h, l.window.kernel_h, l.window.stride_h, l.window.pad_top);
      const ParityAxis columns(b, l.in.w, l.window.kernel_w, l.window.stride_w, l.window.pad_left);
      if (rows.positions == 0 || columns.positions == 0) continue;
      if (add && (rows.taps == 0 || columns.taps == 0)) continue;
      classes.push_back(parity_class(l, rows, columns));
    }
  }
  std::stable_sort(classes.begin(), classes.end(),
                   [](const ParityClass& a, const ParityClass& b) { return a.b.depth > b.b.depth; });
  return classes;
}

/// The most entries for the tiles of an input gradient: each parity class has an incomplete tile, and leaves
/// entries unused.
inline int64_t most_tile_sums(const Layer& l) {
  const int64_t smallest = 32, classes = l.window.stride_h * l.window.stride_w;
  return blocks_for(l.n * l.in.h * l.in.w, smallest) + classes * (1 + kSummedTiles);
}

/// Lays out the entries of the classes of p, whose tiles and number of columns are known.
template <class T, class Input>
CotangentSums<T> place_sums(const Layer& l, Input& p, const TileSize& size, const Normalised<T>& norm,
                            T* scratch) {
  int tiles = 0, folded = 0;
  auto folded_of = [](const auto& c) { return int32(blocks_for(c.split.tiles_m, kSummedTiles)); };
  for (int i = 0; i < p.count; ++i) {
    p.classes[i].first_folded = folded;
    tiles += p.classes[i].split.tiles_m, folded += folded_of(p.classes[i]);
  }
  const bool counted = folded * blocks_for(l.in.c, size.n) <= kCounters - kFirstFoldCounter;
  const int step = tiles > kMostSummedTiles && counted ? kSummedTiles : 1;
  int entries = 0;
  for (int i = 0; i < p.count; ++i) {
    auto& c = p.classes[i];
    c.first_entry = entries;
    entries += step == 1 ? c.split.tiles_m : folded_of(c) * step;
  }
  p.sums = {norm, scratch, step, folded};
  return {scratch, entries / step, step, scratch + 2 * l.in.c * most_tile_sums(l)};
}

/// The bytes that the sums read again or besides.
template <class T>
Work work_of_sums(const Layer& l, const Normalised<T>& norm) {
  const int64_t outputs = l.n * size(l.in);
  return traffic<T>(outputs, 1 + (norm.x_dot && norm.g ? 2 : 0)) + traffic<int32_t>(outputs, norm.pooled);
}

}  // namespace maml::cuda
