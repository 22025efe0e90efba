// How an image is divided into the tiles of winograd_tiles.h: which tiles a layer uses, where they start,
// which of their products are needed, and the chunks in which they are processed.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "cpu/product/winograd_tiles.h"
#include "layers/layer.h"

namespace maml::MAML_ISA::winograd {

constexpr int64_t kLeastChannels = 16;
constexpr int64_t kTransformWork = 8;      // multiply-adds for a channel of a value and its point: measured
constexpr int64_t kChunkElements = 98304;  // values and points of a chunk of tiles
template <class Tile>
constexpr int64_t kMostTiles = kSkips<Tile> ? 48 : 96;  // of a chunk
constexpr int kMostSums = 9;                            // products of one weight, or at one point, in a tile

constexpr int square(int side) { return side * side; }

/// One axis of a plane of tiles. Tile i computes kOutputs outputs from start + kOutputs i on, and reads
/// inputs from `from` + kOutputs kDown / kUp i on.
struct Side {
  int64_t in, out, from, start, tiles;
};

/// The points of tile i: those that are not zero and contribute to an output inside the image.
template <class Tile>
uint32_t points_of(const Side& side, int64_t i) {
  const auto inside = [](int64_t at, int count, int64_t size, const auto& of) {
    const int64_t first = std::clamp<int64_t>(-at, 0, count);
    return of[first][std::clamp<int64_t>(size - at, first, count)];
  };
  constexpr int kStep = Tile::kOutputs * Tile::kDown / Tile::kUp;
  return inside(side.from + i * kStep, Tile::kReads, side.in, kBorders<Tile>.reading) &
         inside(side.start + i * Tile::kOutputs, Tile::kOutputs, side.out, kBorders<Tile>.reaching);
}

/// The number of products along an axis.
template <class Tile>
int64_t products_of(const Side& side) {
  int64_t count = 0;
  for (int64_t i = 0; i < side.tiles; ++i) count += kBorders<Tile>.products[points_of<Tile>(side, i)];
  return count;
}

/// The axis where output o reads inputs from (kDown o + shift) / kUp on. The first tile starts where the
/// number of products is the least.
template <class Tile>
Side side_of(int64_t in, int64_t out, int64_t shift) {
  Side best{in, out, shift, 0, (out + Tile::kOutputs - 1) / Tile::kOutputs};
  if constexpr (kSkips<Tile>) {
    int64_t fewest = std::numeric_limits<int64_t>::max();
    for (int64_t start = 0; start > -Tile::kOutputs; --start) {
      const int64_t from = Tile::kDown * start + shift;
      if (from % Tile::kUp != 0) continue;
      const Side side{in, out, from / Tile::kUp, start, (out - start + Tile::kOutputs - 1) / Tile::kOutputs};
      const int64_t products = products_of<Tile>(side);
      if (products < fewest) best = side, fewest = products;
    }
  }
  return best;
}

/// The tiles of a convolution from image `in` to image `out`; in the input gradient the two change roles.
struct Plane {
  int64_t n;
  Image in, out;
  Side rows, columns;
  int64_t tiles() const { return n * rows.tiles * columns.tiles; }
};

template <class Tile>
Plane forward_plane(const Layer& l) {
  return {l.n, l.in, l.out, side_of<Tile>(l.in.h, l.out.h, -l.window.pad_top),
          side_of<Tile>(l.in.w, l.out.w, -l.window.pad_left)};
}
template <class Tile>
Plane backward_plane(const Layer& l) {
  constexpr int64_t kBack = Tile::kUp - 3;
  return {l.n, l.out, l.in, side_of<Tile>(l.out.h, l.in.h, l.window.pad_top + kBack),
          side_of<Tile>(l.out.w, l.in.w, l.window.pad_left + kBack)};
}

/// The number of tiles of m x m that cover an image.
inline int64_t tiles_of(const Image& image, int m) {
  return ((image.h + m - 1) / m) * ((image.w + m - 1) / m);
}

/// The number of pairs of an output and a tap inside the image, along an axis.
inline int64_t taps_of(int64_t in, int64_t out, int64_t stride, int64_t pad) {
  int64_t count = 0;
  for (int64_t o = 0; o < out; ++o) {
    for (int64_t at = stride * o - pad, end = at + 3; at < end; ++at) count += at >= 0 && at < in;
  }
  return count;
}

/// How a layer is computed: by which tiles, or directly. Depends on its shape alone.
enum class Way { direct, tile_2, tile_4, halving };

inline Way way_of(const Layer& l) {
  const Window& k = l.window;
  if (k.kernel_h != 3 || k.kernel_w != 3 || k.stride_h != k.stride_w || k.stride_h > 2) return Way::direct;
  if (k.pad_top > 2 || k.pad_left > 2) return Way::direct;
  if (l.in.c < kLeastChannels || l.out.c < kLeastChannels) return Way::direct;
  if (k.stride_h == 2) {
    const Plane plane = forward_plane<Halving>(l);
    const int64_t products = products_of<Halving>(plane.rows) * products_of<Halving>(plane.columns);
    const int64_t plain = taps_of(l.in.h, l.out.h, 2, k.pad_top) * taps_of(l.in.w, l.out.w, 2, k.pad_left);
    const int64_t channels = l.in.c * l.out.c, both = l.in.c + l.out.c;
    return products * (channels + kTransformWork * both) <= plain * channels ? Way::halving : Way::direct;
  }
  const int64_t of_2 = 16 * tiles_of(l.out, 2), of_4 = 36 * tiles_of(l.out, 4);
  if (tiles_of(l.out, 4) >= 4 && of_4 < of_2) return Way::tile_4;
  // The transforms cost another quarter.
  return 5 * of_2 <= 4 * 9 * l.out.h * l.out.w ? Way::tile_2 : Way::direct;
}

/// Calls f.operator()<Tile>() with the layer's tile.
template <class F>
auto with_tile(const Layer& l, F f) {
  switch (way_of(l)) {
    case Way::tile_4:
      return f.template operator()<Tile<4>>();
    case Way::halving:
      return f.template operator()<Halving>();
    default:
      return f.template operator()<Tile<2>>();
  }
}

/// How many tiles form a chunk: a whole number of register blocks of rows.
template <class Tile>
int64_t chunk_of(const Layer& l) {
  const int64_t each = square(Tile::kValues) * l.in.c + square(Tile::kPoints) * l.out.c;
  return std::clamp<int64_t>(kChunkElements / (2 * each) / 24 * 24, 24, kMostTiles<Tile>);
}

/// The distance from one point to the next: one cache line more than the rows need, so that points do not
/// share cache sets.
inline int64_t stride_of(int64_t chunk, int64_t channels) { return (chunk * channels + 15) / 16 * 16 + 16; }

/// The values or the points of a chunk of tiles, for both terms: [points, stride], with a row of channels for
/// each tile.
template <class T>
struct Points {
  T* at[2];
  int64_t stride;
};

/// The values of the inputs and the points of the outputs; in the input gradient, the points of the inputs
/// and the values of the outputs.
template <class T, class Tile>
struct Scratch {
  int64_t chunk;
  Points<T> in, out;
  T* zeros;

  Scratch(const Layer& l, T* p) : chunk(chunk_of<Tile>(l)) {
    in.stride = stride_of(chunk, l.in.c), out.stride = stride_of(chunk, l.out.c);
    for (T*& v : in.at) v = std::exchange(p, p + square(Tile::kValues) * in.stride);
    for (T*& v : out.at) v = std::exchange(p, p + square(Tile::kPoints) * out.stride);
    zeros = p;
    std::fill_n(zeros, std::max(l.in.c, l.out.c), T(0));
  }
  static int64_t size(const Layer& l) {
    const int64_t chunk = chunk_of<Tile>(l);
    return 2 * (square(Tile::kValues) * stride_of(chunk, l.in.c) +
                square(Tile::kPoints) * stride_of(chunk, l.out.c)) +
           std::max(l.in.c, l.out.c);
  }
};

/// One tile: its sample, first output and first input, and the points and values that it computes.
struct TilePlace {
  int64_t sample, row, column, from_row, from_column;
  Some points, values;
  template <class Tile>
  bool whole() const {
    constexpr uint32_t kAll = (1u << Tile::kPoints) - 1;
    return !kSkips<Tile> || (points.rows == kAll && points.columns == kAll);
  }
};

/// Where to write a list of offsets: start + step k for tile k.
struct OffsetList {
  int32_t* to;
  int32_t start, step;
  OffsetList(int32_t* to_, int64_t start_, int64_t step_)
      : to(to_), start(static_cast<int32_t>(start_)), step(static_cast<int32_t>(step_)) {}
};

/// The tiles [first, first + count) of a plane.
template <class Tile>
struct Chunk {
  int64_t count;
  TilePlace places[kMostTiles<Tile>];
  // With kSkips, for each point along an axis, the tiles that have it, as bit masks.
  uint64_t rows[Tile::kPoints] = {}, columns[Tile::kPoints] = {};

  Chunk(const Plane& g, int64_t first, int64_t count_) : count(count_) {
    constexpr int kStep = Tile::kOutputs * Tile::kDown / Tile::kUp;
    int64_t j = first % g.columns.tiles, i = first / g.columns.tiles % g.rows.tiles;
    int64_t s = first / g.columns.tiles / g.rows.tiles;
    for (int64_t k = 0; k < count; ++k) {
      places[k].sample = s;
      places[k].row = g.rows.start + Tile::kOutputs * i;
      places[k].column = g.columns.start + Tile::kOutputs * j;
      places[k].from_row = g.rows.from + kStep * i;
      places[k].from_column = g.columns.from + kStep * j;
      if constexpr (kSkips<Tile>) {
        const Some points{points_of<Tile>(g.rows, i), points_of<Tile>(g.columns, j)};
        places[k].points = points;
        places[k].values = {kBorders<Tile>.values[points.rows], kBorders<Tile>.values[points.columns]};
        for (int p = 0; p < Tile::kPoints; ++p) {
          rows[p] |= uint64_t{points.row(p)} << k;
          columns[p] |= uint64_t{points.column(p)} << k;
        }
      }
      if (++j < g.columns.tiles) continue;
      j = 0;
      if (++i < g.rows.tiles) continue;
      i = 0;
      ++s;
    }
  }
  /// Lists the offsets of the tiles that have point (i, j); returns their number.
  int list(int i, int j, OffsetList list) const {
    const int all = static_cast<int>(count);
    if constexpr (!kSkips<Tile>) {
      for (int k = 0; k < all; ++k) list.to[k] = list.start + list.step * k;
      return all;
    }
    int m = 0;
    for (uint64_t tiles = rows[i] & columns[j]; tiles != 0; tiles &= tiles - 1) {
      list.to[m++] = list.start + list.step * std::countr_zero(tiles);
    }
    return m;
  }
};

}  // namespace maml::MAML_ISA::winograd
