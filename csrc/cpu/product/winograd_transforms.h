// The two-dimensional transforms of all tiles of a chunk: B^T d B of the inputs, A g A^T of the cotangents,
// A^T m A to the outputs, and G w G^T of the weights. Channels are the lanes of vectors, so a transform
// consists of sums of vectors. Pixels outside the image are read from a row of zeros; outputs outside are not
// stored.
#pragma once

#include "cpu/product/winograd_plane.h"
#include "cpu/run/share.h"

namespace maml::MAML_ISA::winograd {

/// Calls f(k, place) for the tiles [start, end). Never inlined or cloned: one copy gives the same bits for a
/// tile, in whichever thread it runs (winograd_tiles.h).
template <class Tile, class F>
#if defined(__clang__)
[[gnu::noinline]]
#else
[[gnu::noinline, gnu::noclone]]
#endif
void some_tiles(const Chunk<Tile>& tiles, int64_t start, int64_t end, const F& f) {
  for (int64_t k = start; k < end; ++k) f(k, tiles.places[k]);
}

/// Calls f(k, place) for all tiles; threads share them.
template <class Tile, class F>
inline void each_tile(const Chunk<Tile>& tiles, int64_t channels, const F& f) {
  share(tiles.count, 1, kElementWork * square(Tile::kReads) * tiles.count * channels,
        [&](int64_t start, int64_t end) { some_tiles(tiles, start, end, f); });
}

/// The pixels at + [0, Side) that are inside an axis, as a bit mask.
template <int Side>
uint32_t inside_bits(int64_t at, int64_t size) {
  uint32_t bits = 0;
  for (int i = 0; i < Side; ++i) bits |= uint32_t{at + i >= 0 && at + i < size} << i;
  return bits;
}

/// Calls f(pixel, wanted). pixel(i, j) is the address of one of Side x Side pixels of sample s from (top,
/// left) on, or that of zeros outside the image; `wanted` tells which results of the transform the tile
/// needs.
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

/// v [values] of each tile = B^T d B. The innermost functions capture by value, because stores may alias
/// captured references, which would be loaded again after each store.
template <class Tile, class T>
void transform_inputs(const Plane& g, const Chunk<Tile>& tiles, const T* x, const T* zeros, int64_t stride,
                      T* v) {
  constexpr int R = Tile::kReads, P = Tile::kValues;
  each_tile(tiles, g.in.c, [&](int64_t k, const TilePlace& at) {
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

/// u [points] of each tile = A g A^T, from the cotangents of the outputs.
template <class Tile, class T>
void transform_cotangents(const Plane& g, const Chunk<Tile>& tiles, const T* y, const T* zeros,
                          int64_t stride, T* u) {
  constexpr int M = Tile::kOutputs, P = Tile::kPoints;
  each_tile(tiles, g.out.c, [&](int64_t k, const TilePlace& at) {
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
  each_tile(tiles, g.out.c, [&](int64_t k, const TilePlace& at) {
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

/// out = G w G^T for each of the `size` elements of a tap. The taps w may be the last 9 matrices of `out`.
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

}  // namespace maml::MAML_ISA::winograd
