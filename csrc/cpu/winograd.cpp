// Winograd's minimal filtering F(M x M, 3 x 3) (Lavin, Gray 2016, arXiv 1509.09308), channels last, one task.
//
// A tile is M x M outputs and the P x P inputs d that they read, P = M + 2. With A, B, G of winograd_tiles.h
//
//   y      = A^T [ sum_c (B^T d B) (G w G^T) ] A          a matrix product over channels for each of P x P
//   points grad_w = G^T [ sum_tiles (B^T d B) (A g A^T) ] G      its transpose, summed over tiles before the
//   last step grad_x   is a convolution of g with the taps reversed and transposed
//
// All are bilinear, so the pair of a tangent is a sum at the points: one product of two terms, one transform
// of its result. Products are those of product.h; a chunk of tiles goes through them at a time, so that what
// stands at its points stays in the cache: V [P P, chunk, c] of the image that is read, and what is
// multiplied or results. Channels are lanes, so the transforms are sums of vectors. A pixel outside the image
// is a row of zeros; outputs outside are not stored. M = 4 has 36 products for 16 outputs and suits images of
// some size; M = 2 has 16 for 4, and smaller errors. Summation order of a weight gradient: tiles ascending, a
// chunk at a time; of the others: channels.
#include "winograd.h"

#include <algorithm>
#include <utility>

#include "share.h"
#include "winograd_tiles.h"

namespace maml::MAML_ISA {
namespace {

constexpr int64_t kLeastChannels = 16;
constexpr int64_t kChunkElements = 98304;  // of what a chunk of tiles has at its points

constexpr int points(int m) { return (m + 2) * (m + 2); }

/// The plane of tiles of a convolution of `in` to `out`; the input gradient's is one of out to in.
struct Plane {
  int64_t n;
  Image in, out;
  int64_t top, left;  // padding
};

Plane forward_plane(const Layer& l) { return {l.n, l.in, l.out, l.window.pad_top, l.window.pad_left}; }
Plane backward_plane(const Layer& l) {
  return {l.n, l.out, l.in, 2 - l.window.pad_top, 2 - l.window.pad_left};
}

/// Tiles of m x m that cover an image.
int64_t tiles_of(const Image& image, int m) { return ((image.h + m - 1) / m) * ((image.w + m - 1) / m); }

/// M of the layer's tiles, by its shape alone; 0: it does not go this way.
int tile_of(const Layer& l) {
  const Window& k = l.window;
  if (k.kernel_h != 3 || k.kernel_w != 3 || k.stride_h != 1 || k.stride_w != 1) return 0;
  if (k.pad_top > 2 || k.pad_left > 2) return 0;
  if (l.in.c < kLeastChannels || l.out.c < kLeastChannels) return 0;
  const int64_t of_2 = points(2) * tiles_of(l.out, 2), of_4 = points(4) * tiles_of(l.out, 4);
  if (tiles_of(l.out, 4) >= 4 && of_4 < of_2) return 4;
  return 5 * of_2 <= 4 * 9 * l.out.h * l.out.w ? 2 : 0;  // a quarter more for the transforms
}

/// f.operator()<M>() for the layer's tiles.
template <class F>
auto with_tile(const Layer& l, F f) {
  return tile_of(l) == 4 ? f.template operator()<4>() : f.template operator()<2>();
}

/// Tiles that go together: whole register blocks of rows.
int64_t chunk_of(const Layer& l, int m) {
  const int64_t fit = kChunkElements / (points(m) * 2 * (l.in.c + l.out.c));
  return std::clamp<int64_t>(fit / 24 * 24, 24, 96);
}

/// From one point to the next: a cache line more than the rows need, so that points do not share cache sets.
int64_t stride_of(int64_t chunk, int64_t channels) { return (chunk * channels + 15) / 16 * 16 + 16; }

/// What a chunk of tiles has at the points, of both terms: [points, stride], a row of channels for each tile.
template <class T>
struct Points {
  T* at[2];
  int64_t stride;
  int32_t* row;
};

template <class T, int M>
struct Scratch {
  int64_t chunk;
  Points<T> in, out;
  T* zeros;

  Scratch(const Layer& l, T* p) : chunk(chunk_of(l, M)) {
    in.stride = stride_of(chunk, l.in.c), out.stride = stride_of(chunk, l.out.c);
    for (Points<T>* side : {&in, &out}) {
      for (T*& v : side->at) v = std::exchange(p, p + points(M) * side->stride);
    }
    zeros = std::exchange(p, p + std::max(l.in.c, l.out.c));
    in.row = reinterpret_cast<int32_t*>(p);
    out.row = in.row + chunk;
    std::fill_n(zeros, std::max(l.in.c, l.out.c), T(0));
    for (int64_t i = 0; i < chunk; ++i) {
      in.row[i] = static_cast<int32_t>(i * l.in.c);
      out.row[i] = static_cast<int32_t>(i * l.out.c);
    }
  }
  static int64_t size(const Layer& l) {
    const int64_t chunk = chunk_of(l, M);
    return 2 * points(M) * (stride_of(chunk, l.in.c) + stride_of(chunk, l.out.c)) +
           std::max(l.in.c, l.out.c) + 2 * chunk;
  }
};

/// f(k, sample, row, column) of tiles first + [start, end): k, and its first output. Not to be copied, so
/// that a tile has the same bits whoever asks for it.
template <int M, class F>
#if defined(__clang__)
[[gnu::noinline]]
#else
[[gnu::noinline, gnu::noclone]]
#endif
void some_tiles(const Plane& g, int64_t first, int64_t start, int64_t end, const F& f) {
  const int64_t rows = (g.out.h + M - 1) / M, columns = (g.out.w + M - 1) / M;
  int64_t j = (first + start) % columns, i = (first + start) / columns % rows;
  int64_t s = (first + start) / columns / rows;
  for (int64_t k = start; k < end; ++k) {
    f(k, s, M * i, M * j);
    if (++j < columns) continue;
    j = 0;
    if (++i < rows) continue;
    i = 0;
    ++s;
  }
}

/// The same of tiles first + [0, count), which threads share.
template <int M, class F>
inline void each_tile(const Plane& g, int64_t first, int64_t count, int64_t channels, const F& f) {
  share(count, 1, kElementWork * points(M) * count * channels,
        [&](int64_t start, int64_t end) { some_tiles<M>(g, first, start, end, f); });
}

/// f(point) of all, which threads share; `work` in multiply-adds.
template <int M, class F>
inline void each_point(int64_t work, F f) {
  share(points(M), 1, work, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) f(p);
  });
}

/// f(pixel) where pixel(i, j) is the address of one of Side x Side pixels of sample s from (top, left) on.
template <int Side, class T, class F>
inline void with_pixels(const T* x, const Image& image, int64_t s, int64_t top, int64_t left, const T* zeros,
                        F f) {
  const int64_t below = image.w * image.c;
  const T* corner = x + s * size(image) + top * below + left * image.c;
  if (top >= 0 && left >= 0 && top + Side <= image.h && left + Side <= image.w) {
    f([=](int i, int j) { return corner + i * below + j * image.c; });
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
  f([&](int i, int j) { return pixel[i][j]; });
}

/// v [points] of each tile = B^T d B.
template <int M, class T>
void transform_inputs(const Plane& g, const T* x, const T* zeros, int64_t first, int64_t count,
                      int64_t stride, T* v) {
  constexpr int P = Tile<M>::kSide;
  each_tile<M>(g, first, count, g.in.c, [&](int64_t k, int64_t s, int64_t row, int64_t column) {
    with_pixels<P>(x, g.in, s, row - g.top, column - g.left, zeros, [&](auto pixel) {
      each_lanes<T>(g.in.c, [&](int64_t c, auto lanes) {
        T* const to = v + k * g.in.c + c;
        by_both_axes<T, P, P>([](const auto& d, auto& r) { Tile<M>::inputs(d, r); },
                              [&](int i, int j) { return load(pixel(i, j) + c, lanes); },
                              [&](int i, int j, Vector<T> r) { store(to + (P * i + j) * stride, r, lanes); });
      });
    });
  });
}

/// u [points] of each tile = A g A^T, of the outputs' cotangents.
template <int M, class T>
void transform_cotangents(const Plane& g, const T* y, const T* zeros, int64_t first, int64_t count,
                          int64_t stride, T* u) {
  constexpr int P = Tile<M>::kSide;
  each_tile<M>(g, first, count, g.out.c, [&](int64_t k, int64_t s, int64_t row, int64_t column) {
    with_pixels<M>(y, g.out, s, row, column, zeros, [&](auto pixel) {
      each_lanes<T>(g.out.c, [&](int64_t c, auto lanes) {
        T* const to = u + k * g.out.c + c;
        by_both_axes<T, M, P>([](const auto& d, auto& r) { Tile<M>::cotangents(d, r); },
                              [&](int i, int j) { return load(pixel(i, j) + c, lanes); },
                              [&](int i, int j, Vector<T> r) { store(to + (P * i + j) * stride, r, lanes); });
      });
    });
  });
}

/// y of each tile (+)= bias + A^T m A.
template <int M, class T>
void transform_outputs(const Plane& g, const T* m, int64_t stride, const T* bias, bool add, int64_t first,
                       int64_t count, T* y) {
  constexpr int P = Tile<M>::kSide;
  each_tile<M>(g, first, count, g.out.c, [&](int64_t k, int64_t s, int64_t row, int64_t column) {
    T* const corner = y + ((s * g.out.h + row) * g.out.w + column) * g.out.c;
    const int64_t rows = g.out.h - row, columns = g.out.w - column;
    each_lanes<T>(g.out.c, [&](int64_t c, auto lanes) {
      const T* const from = m + k * g.out.c + c;
      const Vector<T> start = bias ? load(bias + c, lanes) : Vector<T>{};
      by_both_axes<T, P, M>([](const auto& d, auto& r) { Tile<M>::outputs(d, r); },
                            [&](int i, int j) { return load(from + (P * i + j) * stride, lanes); },
                            [&](int i, int j, Vector<T> r) {
                              if (i >= rows || j >= columns) return;
                              T* const to = corner + (i * g.out.w + j) * g.out.c + c;
                              store(to, add ? load(to, lanes) + (r + start) : r + start, lanes);
                            });
    });
  });
}

/// out [points, size] = G w G^T for each element of w [9, size], which may stand in the last 9 of out.
template <int M, class T>
void transform_weights(int64_t size, const T* w, T* out) {
  constexpr int P = Tile<M>::kSide;
  each_lanes<T>(size, [&](int64_t e, auto lanes) {
    by_both_axes<T, 3, P>([](const auto& d, auto& r) { Tile<M>::weights(d, r); },
                          [&](int i, int j) { return load(w + (3 * i + j) * size + e, lanes); },
                          [&](int i, int j, Vector<T> r) { store(out + (P * i + j) * size + e, r, lanes); });
  });
}

/// y (+)= bias + sum of terms a * b, from what is at the points of the one side to the other's.
template <int M, class T>
void convolve_plane(const Plane& g, const Scratch<T, M>& scratch, const Points<T>& from, const Points<T>& to,
                    const Term<T>* terms, int count, const T* bias, bool add, T* y) {
  const int64_t tiles = g.n * tiles_of(g.out, M), no_offset = 0;
  for (int64_t first = 0; first < tiles; first += scratch.chunk) {
    const int64_t some = std::min(scratch.chunk, tiles - first);
    for (int t = 0; t < count; ++t) {
      transform_inputs<M>(g, terms[t].a, scratch.zeros, first, some, from.stride, from.at[t]);
    }
    each_point<M>(points(M) * count * some * g.in.c * g.out.c, [&](int64_t p) {
      Gather<T> product{};
      for (int t = 0; t < count; ++t) {
        product.term[t] = {from.at[t] + p * from.stride, terms[t].b + p * g.in.c * g.out.c};
      }
      product.terms = count;
      product.runs = {1, g.in.c, &no_offset};
      product.row = from.row;
      product.m = some;
      product.n = g.out.c;
      product.c = to.at[0] + p * to.stride;
      product.c_row = to.row;
      gather_product(product);
    });
    transform_outputs<M>(g, to.at[0], to.stride, bias, add, first, some, y);
  }
}

template <int M, class T>
void weight_sums(const Layer& l, const Term<T>* terms, int count, bool add, T* sums, T* memory) {
  const Scratch<T, M> s(l, memory);
  const Plane g = forward_plane(l);
  const int64_t tiles = g.n * tiles_of(g.out, M), no_offset = 0;
  for (int64_t first = 0; first < tiles; first += s.chunk) {
    const int64_t some = std::min(s.chunk, tiles - first);
    for (int t = 0; t < count; ++t) {
      transform_inputs<M>(g, terms[t].a, s.zeros, first, some, s.in.stride, s.in.at[t]);
      transform_cotangents<M>(g, terms[t].b, s.zeros, first, some, s.out.stride, s.out.at[t]);
    }
    each_point<M>(points(M) * count * some * l.in.c * l.out.c, [&](int64_t p) {
      Outer<T> product{};
      for (int t = 0; t < count; ++t) {
        product.term[t] = {s.in.at[t] + p * s.in.stride, s.out.at[t] + p * s.out.stride};
      }
      product.terms = count;
      product.runs = {1, l.in.c, &no_offset};
      product.row = s.in.row;
      product.m = some;
      product.n = l.out.c;
      product.d = sums + p * l.in.c * l.out.c;
      product.add = add || first > 0;
      outer_product(product);
    });
  }
}

}  // namespace

bool is_winograd(const Layer& l) { return tile_of(l) > 0; }

int64_t winograd_weights(const Layer& l) { return points(tile_of(l)) * l.in.c * l.out.c; }

int64_t winograd_scratch(const Layer& l) {
  return with_tile(l, [&]<int M>() { return Scratch<float, M>::size(l); });
}

template <class T>
void winograd_forward_weights(const Layer& l, const T* w, T* out) {
  with_tile(l, [&]<int M>() { transform_weights<M>(l.in.c * l.out.c, w, out); });
}

template <class T>
void winograd_transposed_weights(const Layer& l, const T* w, T* out) {
  const int64_t size = l.in.c * l.out.c;
  T* const taps = out + winograd_weights(l) - 9 * size;
  for (int64_t tap = 0; tap < 9; ++tap)
    transpose(1, l.in.c, l.out.c, w + (8 - tap) * size, taps + tap * size);
  winograd_forward_weights(l, taps, out);
}

template <class T>
void winograd_convolve(const Layer& l, const Term<T>* terms, int count, const T* bias, T* y, T* memory) {
  with_tile(l, [&]<int M>() {
    const Scratch<T, M> s(l, memory);
    convolve_plane<M>(forward_plane(l), s, s.in, s.out, terms, count, bias, false, y);
  });
}

template <class T>
void winograd_input_gradient(const Layer& l, const Term<T>* terms, int count, bool add, T* grad_x,
                             T* memory) {
  with_tile(l, [&]<int M>() {
    const Scratch<T, M> s(l, memory);
    convolve_plane<M, T>(backward_plane(l), s, s.out, s.in, terms, count, nullptr, add, grad_x);
  });
}

template <class T>
void winograd_weight_sums(const Layer& l, const Term<T>* terms, int count, bool add, T* sums, T* memory) {
  with_tile(l, [&]<int M>() { weight_sums<M>(l, terms, count, add, sums, memory); });
}

template <class T>
void winograd_weight_gradient(const Layer& l, const T* sums, bool add, T* grad_w) {
  const int64_t size = l.in.c * l.out.c;
  with_tile(l, [&]<int M>() {
    constexpr int P = Tile<M>::kSide;
    each_lanes<T>(size, [&](int64_t e, auto lanes) {
      by_both_axes<T, P, 3>([](const auto& s, auto& r) { Tile<M>::sums(s, r); },
                            [&](int i, int j) { return load(sums + (P * i + j) * size + e, lanes); },
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
