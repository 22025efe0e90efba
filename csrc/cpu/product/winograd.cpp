// Winograd's minimal filtering (Lavin, Gray 2016, arXiv 1509.09308), channels last, one task, in the tiles of
// winograd_tiles.h: F(M x M, 3 x 3) for stride 1; for stride 2 the same idea for those inputs that two
// outputs read.
//
// A tile is M x M outputs and the inputs d that they read. With its A, B, G
//
//   y      = A^T [ sum_c (B^T d B) (G w G^T) ] A
//
// where every product of a value B^T d B with a weight G w G^T has its place in one of the points that A
// reads: a matrix product over channels for each point.
//
//   grad_w = G^T [ sum_tiles (B^T d B) (A g A^T) ] G
//
// is its transpose, summed over tiles before the last step. grad_x is a convolution of g with the taps
// reversed and transposed: for stride 1 in the same tiles, for stride 2, where it doubles the image, in tiles
// of its own. All are bilinear, so the pair of a tangent is a sum at the points: one product of two terms,
// one transform of its result.
//
// Products are those of product.h, what meets at a point are the runs of one; a chunk of tiles goes through
// them at a time, so that its values and points [.., chunk, c] stay in the cache. Channels are lanes, so the
// transforms are sums of vectors. A pixel outside the image is a row of zeros; outputs outside are not
// stored.
//
// M = 4 has 36 products for 16 outputs and suits images of some size; M = 2 has 16 for 4, and smaller errors.
// Stride 2 has 49 for 9 outputs, where plain sums have 81. The images that it leaves are small, so a tile
// there leaves out the points that are zero or reach no output inside, and the first one starts where the
// least is left: 14 pixels to 7, as in the Omniglot net, are tiles of 1, 3 and 3 outputs and 2 + 7 + 7
// products along an axis, where plain sums have 20.
//
// Summation order of a weight gradient: chunks, a weight's products, tiles ascending; of the others:
// products, channels.
#include "cpu/product/winograd.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "cpu/product/winograd_tiles.h"
#include "cpu/run/share.h"

namespace maml::MAML_ISA {
namespace {

constexpr int64_t kLeastChannels = 16;
constexpr int64_t kTransformWork = 8;  // of a channel of a value and its point, in multiply-adds: measured
constexpr int64_t kChunkElements = 98304;  // of what a chunk of tiles has at its points
template <class Tile>
constexpr int64_t kMostTiles = kSkips<Tile> ? 48 : 96;  // of a chunk
constexpr int kMostSums = 9;                            // products of a weight, or at a point, in a tile

constexpr int square(int side) { return side * side; }

/// One axis of a plane of tiles: outputs start + kOutputs i, and the inputs that they read from `from` +
/// kOutputs kDown / kUp i on.
struct Side {
  int64_t in, out, from, start, tiles;
};

/// The points that tile i has: those that are not zero and reach an output inside.
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

/// Products along an axis.
template <class Tile>
int64_t products_of(const Side& side) {
  int64_t count = 0;
  for (int64_t i = 0; i < side.tiles; ++i) count += kBorders<Tile>.products[points_of<Tile>(side, i)];
  return count;
}

/// Where output o reads inputs from (kDown o + shift) / kUp on: the first tile starts where there are fewest
/// products.
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

/// The tiles of a convolution of `in` to `out`; the input gradient's is one of out to in.
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

/// Tiles of m x m that cover an image.
int64_t tiles_of(const Image& image, int m) { return ((image.h + m - 1) / m) * ((image.w + m - 1) / m); }

/// Pairs of an output and a tap inside the image, along an axis.
int64_t taps_of(int64_t in, int64_t out, int64_t stride, int64_t pad) {
  int64_t count = 0;
  for (int64_t o = 0; o < out; ++o) {
    for (int64_t at = stride * o - pad, end = at + 3; at < end; ++at) count += at >= 0 && at < in;
  }
  return count;
}

/// The layer's tiles, by its shape alone.
enum class Way { direct, tile_2, tile_4, halving };

Way way_of(const Layer& l) {
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
  // A quarter more for the transforms.
  return 5 * of_2 <= 4 * 9 * l.out.h * l.out.w ? Way::tile_2 : Way::direct;
}

/// f.operator()<Tile>() for the layer's tiles.
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

/// Tiles that go together: whole register blocks of rows.
template <class Tile>
int64_t chunk_of(const Layer& l) {
  const int64_t each = square(Tile::kValues) * l.in.c + square(Tile::kPoints) * l.out.c;
  return std::clamp<int64_t>(kChunkElements / (2 * each) / 24 * 24, 24, kMostTiles<Tile>);
}

/// From one point to the next: a cache line more than the rows need, so that points do not share cache sets.
int64_t stride_of(int64_t chunk, int64_t channels) { return (chunk * channels + 15) / 16 * 16 + 16; }

/// What a chunk of tiles has as its values or at its points, of both terms: [points, stride], a row of
/// channels for each tile.
template <class T>
struct Points {
  T* at[2];
  int64_t stride;
};

/// Values of inputs and points of outputs; for the input gradient they are points of inputs and values of
/// outputs.
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

/// A tile: its first output, its first input, and what it has.
struct Place {
  int64_t sample, row, column, from_row, from_column;
  Some points, values;
  template <class Tile>
  bool whole() const {
    constexpr uint32_t kAll = (1u << Tile::kPoints) - 1;
    return !kSkips<Tile> || (points.rows == kAll && points.columns == kAll);
  }
};

/// Bits of the pixels at + [0, Side) that are inside an axis.
template <int Side>
uint32_t inside_bits(int64_t at, int64_t size) {
  uint32_t bits = 0;
  for (int i = 0; i < Side; ++i) bits |= uint32_t{at + i >= 0 && at + i < size} << i;
  return bits;
}

/// Offsets of rows, a tile each: start + step k.
struct Rows {
  int32_t* to;
  int32_t start, step;
  Rows(int32_t* to_, int64_t start_, int64_t step_)
      : to(to_), start(static_cast<int32_t>(start_)), step(static_cast<int32_t>(step_)) {}
};

/// Tiles [first, first + count) of a plane.
template <class Tile>
struct Chunk {
  int64_t count;
  Place places[kMostTiles<Tile>];
  // Where kSkips, the tiles that have a point: bits.
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
  /// Lists the tiles that have point (i, j); their number.
  int list(int i, int j, Rows list) const {
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

/// f(k, place) of tiles [start, end). Not to be copied, so that a tile has the same bits whoever asks for it.
template <class Tile, class F>
#if defined(__clang__)
[[gnu::noinline]]
#else
[[gnu::noinline, gnu::noclone]]
#endif
void some_tiles(const Chunk<Tile>& tiles, int64_t start, int64_t end, const F& f) {
  for (int64_t k = start; k < end; ++k) f(k, tiles.places[k]);
}

/// The same of all, which threads share.
template <class Tile, class F>
inline void each_tile(const Chunk<Tile>& tiles, int64_t channels, const F& f) {
  share(tiles.count, 1, kElementWork * square(Tile::kReads) * tiles.count * channels,
        [&](int64_t start, int64_t end) { some_tiles(tiles, start, end, f); });
}

/// f(i, j) of Side x Side, which threads share; `work` in multiply-adds.
template <int Side, class F>
inline void each_point(int64_t work, F f) {
  share(square(Side), 1, work, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) f(static_cast<int>(p) / Side, static_cast<int>(p) % Side);
  });
}

/// f(pixel, wanted) where pixel(i, j) is the address of one of Side x Side pixels of sample s from (top,
/// left) on, and `wanted` the results that a tile has.
template <class Tile, int Side, class T, class F>
inline void with_pixels(const T* x, const Image& image, int64_t s, int64_t top, int64_t left, const T* zeros,
                        bool whole, const Some& some, F f) {
  const int64_t below = image.w * image.c;
  const T* corner = x + s * size(image) + top * below + left * image.c;
  if (whole && top >= 0 && left >= 0 && top + Side <= image.h && left + Side <= image.w) {
    f([=](int i, int j) { return corner + i * below + j * image.c; }, All());
    return;
  }
  const T* pixel[Side][Side];
  for (int i = 0; i < Side; ++i) {
    const bool row = top + i >= 0 && top + i < image.h;
    for (int j = 0; j < Side; ++j) {
      const bool inside = row && left + j >= 0 && left + j < image.w;
      pixel[i][j] = inside ? corner + i * below + j * image.c : zeros;
    }
  }
  const auto of = [&pixel](int i, int j) { return pixel[i][j]; };
  if constexpr (kSkips<Tile>) {
    f(of, some);
  } else {
    f(of, All());
  }
}

/// v [values] of each tile = B^T d B. What the innermost functions need they hold by value: it would be read
/// anew after every store otherwise, which may be to anywhere.
template <class Tile, class T>
void transform_inputs(const Plane& g, const Chunk<Tile>& tiles, const T* x, const T* zeros, int64_t stride,
                      T* v) {
  constexpr int R = Tile::kReads, P = Tile::kValues;
  each_tile(tiles, g.in.c, [&](int64_t k, const Place& at) {
    const int64_t step = stride, channels = g.in.c;
    T* const first = v + k * channels;
    with_pixels<Tile, R>(
        x, g.in, at.sample, at.from_row, at.from_column, zeros, at.whole<Tile>(), at.values,
        [=](auto pixel, auto wanted) {
          each_lanes<T>(channels, [=](int64_t c, auto lanes) {
            T* const to = first + c;
            by_both_axes<T, R, P, kSkips<Tile>>(
                [](const auto& d, auto& r) { Tile::inputs(d, r); },
                [=](int i, int j) { return load(pixel(i, j) + c, lanes); }, wanted,
                [=](int i, int j, Vector<T> r) { store(to + (P * i + j) * step, r, lanes); });
          });
        });
  });
}

/// u [points] of each tile = A g A^T, of the outputs' cotangents.
template <class Tile, class T>
void transform_cotangents(const Plane& g, const Chunk<Tile>& tiles, const T* y, const T* zeros,
                          int64_t stride, T* u) {
  constexpr int M = Tile::kOutputs, P = Tile::kPoints;
  each_tile(tiles, g.out.c, [&](int64_t k, const Place& at) {
    const int64_t step = stride, channels = g.out.c;
    T* const first = u + k * channels;
    with_pixels<Tile, M>(
        y, g.out, at.sample, at.row, at.column, zeros, at.whole<Tile>(), at.points,
        [&](auto pixel, auto wanted) {
          each_lanes<T>(channels, [&](int64_t c, auto lanes) {
            T* const to = first + c;
            by_both_axes<T, M, P, false>(
                [](const auto& d, auto& r) { Tile::cotangents(d, r); },
                [&](int i, int j) { return load(pixel(i, j) + c, lanes); }, wanted,
                [&](int i, int j, Vector<T> r) { store(to + (P * i + j) * step, r, lanes); });
          });
        });
  });
}

/// y of each tile (+)= bias + A^T m A.
template <class Tile, class T>
void transform_outputs(const Plane& g, const Chunk<Tile>& tiles, const T* m, int64_t stride, const T* bias,
                       bool add, T* y) {
  constexpr int M = Tile::kOutputs, P = Tile::kPoints;
  each_tile(tiles, g.out.c, [&](int64_t k, const Place& at) {
    const int64_t step = stride, channels = g.out.c, below = g.out.w * channels;
    const T* const first = m + k * channels;
    T* const corner = y + (at.sample * g.out.h + at.row) * below + at.column * channels;
    const Some inside{inside_bits<M>(at.row, g.out.h), inside_bits<M>(at.column, g.out.w)};
    const auto transform = [=](auto points) {
      each_lanes<T>(channels, [=](int64_t c, auto lanes) {
        const T* const from = first + c;
        T* const to = corner + c;
        const Vector<T> start = bias ? load(bias + c, lanes) : Vector<T>{};
        by_both_axes<T, P, M, kSkips<Tile>>(
            [](const auto& d, auto& r) { Tile::outputs(d, r); },
            [=](int i, int j) {
              const bool is = points.row(i) && points.column(j);
              return is ? load(from + (P * i + j) * step, lanes) : Vector<T>{};
            },
            inside,
            [=](int i, int j, Vector<T> r) {
              T* const pixel = to + i * below + j * channels;
              store(pixel, add ? load(pixel, lanes) + (r + start) : r + start, lanes);
            });
      });
    };
    if constexpr (kSkips<Tile>) {
      if (!at.whole<Tile>()) return transform(at.points);
    }
    transform(All());
  });
}

/// out = G w G^T for each of `size` elements of the taps of w, which may be the last 9 of out.
template <class Tile, class T>
void transform_weights(int64_t size, const T* w, int64_t w_stride, T* out, int64_t stride) {
  constexpr int P = Tile::kWeights;
  each_lanes<T>(size, [&](int64_t e, auto lanes) {
    by_both_axes<T, 3, P, false>(
        [](const auto& d, auto& r) { Tile::weights(d, r); },
        [&](int i, int j) { return load(w + (3 * i + j) * w_stride + e, lanes); }, All(),
        [&](int i, int j, Vector<T> r) { store(out + (P * i + j) * stride + e, r, lanes); });
  });
}

/// y (+)= bias + sum of terms a * b, from the values of the one side to the points of the other.
template <class Tile, class T>
void convolve_plane(const Plane& g, int64_t chunk, const T* zeros, const Points<T>& from, const Points<T>& to,
                    const Term<T>* terms, int count, const T* bias, bool add, T* y) {
  for (int64_t first = 0; first < g.tiles(); first += chunk) {
    const Chunk<Tile> tiles(g, first, std::min(chunk, g.tiles() - first));
    for (int t = 0; t < count; ++t) {
      transform_inputs(g, tiles, terms[t].a, zeros, from.stride, from.at[t]);
    }
    const int64_t work = square(Tile::kProducts) * count * tiles.count * g.in.c * g.out.c;
    each_point<Tile::kPoints>(work, [&](int i, int j) {
      int64_t value[kMostSums], weight[kMostSums];
      int runs = 0;
      for (int a = 0; a < Tile::kProducts; ++a) {
        if (Tile::point(a) != i) continue;
        for (int b = 0; b < Tile::kProducts; ++b) {
          if (Tile::point(b) != j) continue;
          value[runs] = (Tile::value(a) * Tile::kValues + Tile::value(b)) * from.stride;
          weight[runs++] = (Tile::weight(a) * Tile::kWeights + Tile::weight(b)) * (g.in.c + 1);
        }
      }
      int32_t row[kMostTiles<Tile>], c_row[kMostTiles<Tile>];
      Gather<T> product{};
      for (int t = 0; t < count; ++t) product.term[t] = {from.at[t], terms[t].b};
      product.terms = count;
      product.runs = {runs, g.in.c, value, weight};
      product.row = row;
      product.m = tiles.list(i, j, {row, 0, g.in.c});
      product.n = g.out.c;
      product.c = to.at[0] + (i * Tile::kPoints + j) * to.stride;
      product.c_row = c_row;
      tiles.list(i, j, {c_row, 0, g.out.c});
      gather_product(product);
    });
    transform_outputs(g, tiles, to.at[0], to.stride, bias, add, y);
  }
}

template <class Tile, class T>
void weight_sums(const Layer& l, const Term<T>* terms, int count, bool add, T* sums, T* memory) {
  const Scratch<T, Tile> s(l, memory);
  const Plane g = forward_plane<Tile>(l);
  const int64_t no_offset = 0;
  for (int64_t first = 0; first < g.tiles(); first += s.chunk) {
    const Chunk<Tile> tiles(g, first, std::min(s.chunk, g.tiles() - first));
    for (int t = 0; t < count; ++t) {
      transform_inputs(g, tiles, terms[t].a, s.zeros, s.in.stride, s.in.at[t]);
      transform_cotangents(g, tiles, terms[t].b, s.zeros, s.out.stride, s.out.at[t]);
    }
    const int64_t work = square(Tile::kProducts) * count * tiles.count * l.in.c * l.out.c;
    each_point<Tile::kWeights>(work, [&](int i, int j) {
      int32_t row[kMostSums * kMostTiles<Tile>], g_row[kMostSums * kMostTiles<Tile>];
      int64_t rows = 0;
      for (int a = 0; a < Tile::kProducts; ++a) {
        if (Tile::weight(a) != i) continue;
        for (int b = 0; b < Tile::kProducts; ++b) {
          if (Tile::weight(b) != j) continue;
          const int value = Tile::value(a) * Tile::kValues + Tile::value(b);
          const int point = Tile::point(a) * Tile::kPoints + Tile::point(b);
          tiles.list(Tile::point(a), Tile::point(b), {row + rows, value * s.in.stride, l.in.c});
          rows += tiles.list(Tile::point(a), Tile::point(b), {g_row + rows, point * s.out.stride, l.out.c});
        }
      }
      T* const d = sums + (i * Tile::kWeights + j) * (l.in.c + 1) * l.out.c;
      const bool adds = add || first > 0;
      if (rows == 0 && !adds) std::fill_n(d, l.in.c * l.out.c, T(0));
      Outer<T> product{};
      for (int t = 0; t < count; ++t) product.term[t] = {s.in.at[t], s.out.at[t]};
      product.terms = count;
      product.runs = {1, l.in.c, &no_offset};
      product.row = row;
      product.g_row = g_row;
      product.m = rows;
      product.n = l.out.c;
      product.d = d;
      product.add = adds;
      outer_product(product);
    });
  }
}

}  // namespace

bool is_winograd(const Layer& l) { return way_of(l) != Way::direct; }

int64_t winograd_weights(const Layer& l) {
  return with_tile(l, [&]<class Tile>() {
    return square(Tile::kWeights) * (l.in.c * l.out.c + std::max(l.in.c, l.out.c));
  });
}

int64_t winograd_scratch(const Layer& l) {
  return with_tile(l, [&]<class Tile>() { return Scratch<float, Tile>::size(l); });
}

template <class T>
void winograd_forward_weights(const Layer& l, const T* w, T* out) {
  const int64_t size = l.in.c * l.out.c;
  with_tile(l, [&]<class Tile>() { transform_weights<Tile>(size, w, size, out, size + l.out.c); });
}

template <class T>
void winograd_transposed_weights(const Layer& l, const T* w, T* out) {
  const int64_t size = l.in.c * l.out.c, stride = size + l.in.c;
  with_tile(l, [&]<class Tile>() {
    T* const taps = out + (square(Tile::kWeights) - 9) * stride;
    for (int64_t tap = 0; tap < 9; ++tap)
      transpose(1, l.in.c, l.out.c, w + (8 - tap) * size, taps + tap * stride);
    transform_weights<Tile>(size, taps, stride, out, stride);
  });
}

template <class T>
void winograd_convolve(const Layer& l, const Term<T>* terms, int count, const T* bias, T* y, T* memory) {
  with_tile(l, [&]<class Tile>() {
    const Scratch<T, Tile> s(l, memory);
    convolve_plane<Tile>(forward_plane<Tile>(l), s.chunk, s.zeros, s.in, s.out, terms, count, bias, false, y);
  });
}

template <class T>
void winograd_input_gradient(const Layer& l, const Term<T>* terms, int count, bool add, T* grad_x,
                             T* memory) {
  with_tile(l, [&]<class Tile>() {
    using Back = typename Tile::Transposed;
    static_assert(Back::kValues == Tile::kPoints && Back::kPoints == Tile::kValues);
    const Scratch<T, Tile> s(l, memory);
    convolve_plane<Back, T>(backward_plane<Back>(l), s.chunk, s.zeros, s.out, s.in, terms, count, nullptr,
                            add, grad_x);
  });
}

template <class T>
void winograd_weight_sums(const Layer& l, const Term<T>* terms, int count, bool add, T* sums, T* memory) {
  with_tile(l, [&]<class Tile>() { weight_sums<Tile>(l, terms, count, add, sums, memory); });
}

template <class T>
void winograd_weight_gradient(const Layer& l, const T* sums, bool add, T* grad_w) {
  const int64_t size = l.in.c * l.out.c;
  with_tile(l, [&]<class Tile>() {
    constexpr int P = Tile::kWeights;
    each_lanes<T>(size, [&](int64_t e, auto lanes) {
      by_both_axes<T, P, 3, false>(
          [](const auto& s, auto& r) { Tile::sums(s, r); },
          [&](int i, int j) { return load(sums + (P * i + j) * (l.in.c + 1) * l.out.c + e, lanes); }, All(),
          [&](int i, int j, Vector<T> r) {
            T* const to = grad_w + (3 * i + j) * size + e;
            store(to, add ? load(to, lanes) + r : r, lanes);
          });
    });
  });
}

#define MAML_INSTANTIATE(T)                                                                  \
  template void winograd_forward_weights<T>(const Layer&, const T*, T*);                     \
  template void winograd_transposed_weights<T>(const Layer&, const T*, T*);                  \
  template void winograd_convolve<T>(const Layer&, const Term<T>*, int, const T*, T*, T*);   \
  template void winograd_input_gradient<T>(const Layer&, const Term<T>*, int, bool, T*, T*); \
  template void winograd_weight_sums<T>(const Layer&, const Term<T>*, int, bool, T*, T*);    \
  template void winograd_weight_gradient<T>(const Layer&, const T*, bool, T*);
MAML_INSTANTIATE(float)
MAML_INSTANTIATE(double)
#undef MAML_INSTANTIATE

}  // namespace maml::MAML_ISA
