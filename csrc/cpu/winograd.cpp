// Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin, Gray 2016, arXiv 1509.09308), channels last, one task.
//
// A tile is 2 x 2 outputs and the 4 x 4 inputs d that they read. With
//
//        1  0 -1  0          1   0   0
//  B^T = 0  1  1  0      G = .5  .5  .5       A^T = 1  1  1  0
//        0 -1  1  0          .5 -.5  .5             0  1 -1 -1
//        0  1  0 -1          0   0   1
//
//   y      = A^T [ sum_c (B^T d B) (G w G^T) ] A          a matrix product over channels for each of 16
//   points grad_w = G^T [ sum_tiles (B^T d B) (A g A^T) ] G      its transpose, summed over tiles before the
//   last step grad_x   is a convolution of g with the taps reversed and transposed
//
// All are bilinear, so the pair of a tangent is a sum at the 16 points: one product of two terms, one
// transform of its result. Products are those of product.h; a chunk of tiles goes through them at a time, so
// that what stands at its points stays in the cache: V [16, chunk, c] of the image that is read, and what is
// multiplied or results. Channels are lanes, so the transforms are sums of vectors. A pixel outside the image
// is a row of zeros; outputs outside are not stored. B and A hold 0 and 1 alone: float32 errs about as the
// plain sum. Summation order of a weight gradient: tiles ascending, a chunk at a time; of the others:
// channels.
#include "winograd.h"

#include <algorithm>
#include <utility>

#include "share.h"

namespace maml::MAML_ISA {
namespace {

constexpr int kPoints = 16;
constexpr int64_t kLeastChannels = 16;
constexpr int64_t kChunkElements = 98304;  // of what a chunk of tiles has at its points

/// The plane of tiles of a convolution of `in` to `out`; the input gradient's is one of out to in.
struct Plane {
  int64_t n;
  Image in, out;
  int64_t top, left;  // padding

  int64_t rows() const { return (out.h + 1) / 2; }
  int64_t columns() const { return (out.w + 1) / 2; }
  int64_t tiles() const { return n * rows() * columns(); }
};

Plane forward_plane(const Layer& l) { return {l.n, l.in, l.out, l.window.pad_top, l.window.pad_left}; }
Plane backward_plane(const Layer& l) {
  return {l.n, l.out, l.in, 2 - l.window.pad_top, 2 - l.window.pad_left};
}

/// Tiles that go together: whole register blocks of rows.
int64_t chunk_of(const Layer& l) {
  const int64_t fit = kChunkElements / (kPoints * 2 * (l.in.c + l.out.c));
  return std::clamp<int64_t>(fit / 24 * 24, 24, 96);
}

/// From one point to the next: a cache line more than the rows need, so that points do not share cache sets.
int64_t stride_of(int64_t chunk, int64_t channels) { return (chunk * channels + 15) / 16 * 16 + 16; }

/// What a chunk of tiles has at the points, of both terms: [16, stride], a row of channels for each tile.
template <class T>
struct Points {
  T* at[2];
  int64_t stride;
  int32_t* row;
};

template <class T>
struct Scratch {
  int64_t chunk;
  Points<T> in, out;
  T* zeros;

  Scratch(const Layer& l, T* p) : chunk(chunk_of(l)) {
    in.stride = stride_of(chunk, l.in.c), out.stride = stride_of(chunk, l.out.c);
    for (Points<T>* side : {&in, &out}) {
      for (T*& v : side->at) v = std::exchange(p, p + kPoints * side->stride);
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
    const int64_t chunk = chunk_of(l);
    return 2 * kPoints * (stride_of(chunk, l.in.c) + stride_of(chunk, l.out.c)) + std::max(l.in.c, l.out.c) +
           2 * chunk;
  }
};

/// f(k, sample, row, column) of tiles [first, first + count): its place among them and its first output;
/// threads share the tiles.
template <class F>
inline void each_tile(const Plane& g, int64_t first, int64_t count, int64_t channels, F f) {
  const int64_t rows = g.rows(), columns = g.columns();
  share(count, 1, kElementWork * kPoints * count * channels, [&](int64_t start, int64_t end) {
    int64_t j = (first + start) % columns, i = (first + start) / columns % rows;
    int64_t s = (first + start) / columns / rows;
    for (int64_t k = start; k < end; ++k) {
      f(k, s, 2 * i, 2 * j);
      if (++j < columns) continue;
      j = 0;
      if (++i < rows) continue;
      i = 0;
      ++s;
    }
  });
}

/// f(point) of all 16, which threads share; `work` in multiply-adds.
template <class F>
inline void each_point(int64_t work, F f) {
  share(kPoints, 1, work, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) f(p);
  });
}

/// Where the pixels of an H x W part of an image stand, or zeros.
template <int H, int W, class T>
inline void find_pixels(const T* x, const Image& image, int64_t s, int64_t top, int64_t left, const T* zeros,
                        const T* (&pixel)[H * W]) {
  for (int i = 0; i < H; ++i) {
    const bool row = top + i >= 0 && top + i < image.h;
    const T* at = x + ((s * image.h + top + i) * image.w + left) * image.c;
    for (int j = 0; j < W; ++j, at += image.c) {
      pixel[W * i + j] = row && left + j >= 0 && left + j < image.w ? at : zeros;
    }
  }
}

/// v[16] of each tile = B^T d B.
template <class T>
void transform_inputs(const Plane& g, const T* x, const T* zeros, int64_t first, int64_t count,
                      int64_t stride, T* v) {
  each_tile(g, first, count, g.in.c, [&](int64_t k, int64_t s, int64_t row, int64_t column) {
    const T* pixel[16];
    find_pixels<4, 4>(x, g.in, s, row - g.top, column - g.left, zeros, pixel);
    each_lanes<T>(g.in.c, [&](int64_t c, auto lanes) {
      Vector<T> a[4][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vector<T> d0 = load(pixel[j] + c, lanes), d1 = load(pixel[4 + j] + c, lanes);
        const Vector<T> d2 = load(pixel[8 + j] + c, lanes), d3 = load(pixel[12 + j] + c, lanes);
        a[0][j] = d0 - d2, a[1][j] = d1 + d2, a[2][j] = d2 - d1, a[3][j] = d1 - d3;
      }
      T* to = v + k * g.in.c + c;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, to += 4 * stride) {
        store(to, a[i][0] - a[i][2], lanes);
        store(to + stride, a[i][1] + a[i][2], lanes);
        store(to + 2 * stride, a[i][2] - a[i][1], lanes);
        store(to + 3 * stride, a[i][1] - a[i][3], lanes);
      }
    });
  });
}

/// w[16] of each tile = A g A^T, of the outputs' cotangents.
template <class T>
void transform_cotangents(const Plane& g, const T* y, const T* zeros, int64_t first, int64_t count,
                          int64_t stride, T* w) {
  each_tile(g, first, count, g.out.c, [&](int64_t k, int64_t s, int64_t row, int64_t column) {
    const T* pixel[4];
    find_pixels<2, 2>(y, g.out, s, row, column, zeros, pixel);
    each_lanes<T>(g.out.c, [&](int64_t c, auto lanes) {
      const Vector<T> top[2] = {load(pixel[0] + c, lanes), load(pixel[1] + c, lanes)};
      const Vector<T> bottom[2] = {load(pixel[2] + c, lanes), load(pixel[3] + c, lanes)};
      const Vector<T> a[4][2] = {{top[0], top[1]},
                                 {top[0] + bottom[0], top[1] + bottom[1]},
                                 {top[0] - bottom[0], top[1] - bottom[1]},
                                 {-bottom[0], -bottom[1]}};
      T* to = w + k * g.out.c + c;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, to += 4 * stride) {
        store(to, a[i][0], lanes);
        store(to + stride, a[i][0] + a[i][1], lanes);
        store(to + 2 * stride, a[i][0] - a[i][1], lanes);
        store(to + 3 * stride, -a[i][1], lanes);
      }
    });
  });
}

/// y of each tile (+)= bias + A^T m A.
template <class T>
void transform_outputs(const Plane& g, const T* m, int64_t stride, const T* bias, bool add, int64_t first,
                       int64_t count, T* y) {
  each_tile(g, first, count, g.out.c, [&](int64_t k, int64_t s, int64_t row, int64_t column) {
    T* const corner = y + ((s * g.out.h + row) * g.out.w + column) * g.out.c;
    const int rows = row + 1 < g.out.h ? 2 : 1, columns = column + 1 < g.out.w ? 2 : 1;
    each_lanes<T>(g.out.c, [&](int64_t c, auto lanes) {
      const T* from = m + k * g.out.c + c;
      const Vector<T> start = bias ? load(bias + c, lanes) : Vector<T>{};
      Vector<T> a[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, from += stride) {
        const Vector<T> m0 = load(from, lanes), m1 = load(from + 4 * stride, lanes);
        const Vector<T> m2 = load(from + 8 * stride, lanes), m3 = load(from + 12 * stride, lanes);
        a[0][j] = m0 + m1 + m2, a[1][j] = m1 - m2 - m3;
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        if (i == rows) break;
        T* to = corner + i * g.out.w * g.out.c + c;
        const Vector<T> left = a[i][0] + a[i][1] + a[i][2] + start;
        store(to, add ? load(to, lanes) + left : left, lanes);
        if (columns == 1) continue;
        to += g.out.c;
        const Vector<T> right = a[i][1] - a[i][2] - a[i][3] + start;
        store(to, add ? load(to, lanes) + right : right, lanes);
      }
    });
  });
}

/// out [16, size] = G w G^T for each element of w [9, size], which may stand in the last 9 sixteenths of out.
template <class T>
void transform_weights(int64_t size, const T* w, T* out) {
  each_lanes<T>(size, [&](int64_t e, auto lanes) {
    const Vector<T> half = broadcast(T(0.5));
    Vector<T> a[4][3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const T* from = w + j * size + e;
      const Vector<T> w0 = load(from, lanes), w1 = load(from + 3 * size, lanes) * half;
      const Vector<T> w2 = load(from + 6 * size, lanes), ends = (w0 + w2) * half;
      a[0][j] = w0, a[1][j] = ends + w1, a[2][j] = ends - w1, a[3][j] = w2;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      T* to = out + 4 * i * size + e;
      const Vector<T> middle = a[i][1] * half, ends = (a[i][0] + a[i][2]) * half;
      store(to, a[i][0], lanes);
      store(to + size, ends + middle, lanes);
      store(to + 2 * size, ends - middle, lanes);
      store(to + 3 * size, a[i][2], lanes);
    }
  });
}

/// y (+)= bias + sum of terms a * b, from what is at the points of the one side to the other's.
template <class T>
void convolve_plane(const Plane& g, const Scratch<T>& scratch, const Points<T>& from, const Points<T>& to,
                    const Term<T>* terms, int count, const T* bias, bool add, T* y) {
  const int64_t tiles = g.tiles(), no_offset = 0;
  for (int64_t first = 0; first < tiles; first += scratch.chunk) {
    const int64_t some = std::min(scratch.chunk, tiles - first);
    for (int t = 0; t < count; ++t) {
      transform_inputs(g, terms[t].a, scratch.zeros, first, some, from.stride, from.at[t]);
    }
    each_point(kPoints * count * some * g.in.c * g.out.c, [&](int64_t p) {
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
    transform_outputs(g, to.at[0], to.stride, bias, add, first, some, y);
  }
}

}  // namespace

bool is_winograd(const Layer& l) {
  const Window& k = l.window;
  if (k.kernel_h != 3 || k.kernel_w != 3 || k.stride_h != 1 || k.stride_w != 1) return false;
  if (k.pad_top > 2 || k.pad_left > 2) return false;
  if (l.in.c < kLeastChannels || l.out.c < kLeastChannels) return false;
  const int64_t tiles = ((l.out.h + 1) / 2) * ((l.out.w + 1) / 2);
  return 5 * kPoints * tiles <= 4 * 9 * l.out.h * l.out.w;  // a quarter more for the transforms
}

int64_t winograd_weights(const Layer& l) { return kPoints * l.in.c * l.out.c; }

int64_t winograd_scratch(const Layer& l) { return Scratch<float>::size(l); }

template <class T>
void winograd_forward_weights(const Layer& l, const T* w, T* out) {
  transform_weights(l.in.c * l.out.c, w, out);
}

template <class T>
void winograd_transposed_weights(const Layer& l, const T* w, T* out) {
  const int64_t size = l.in.c * l.out.c;
  T* const taps = out + (kPoints - 9) * size;
  for (int64_t tap = 0; tap < 9; ++tap)
    transpose(1, l.in.c, l.out.c, w + (8 - tap) * size, taps + tap * size);
  transform_weights(size, taps, out);
}

template <class T>
void winograd_convolve(const Layer& l, const Term<T>* terms, int count, const T* bias, T* y, T* memory) {
  const Scratch<T> s(l, memory);
  convolve_plane(forward_plane(l), s, s.in, s.out, terms, count, bias, false, y);
}

template <class T>
void winograd_input_gradient(const Layer& l, const Term<T>* terms, int count, bool add, T* grad_x,
                             T* memory) {
  const Scratch<T> s(l, memory);
  convolve_plane<T>(backward_plane(l), s, s.out, s.in, terms, count, nullptr, add, grad_x);
}

template <class T>
void winograd_weight_sums(const Layer& l, const Term<T>* terms, int count, bool add, T* sums, T* memory) {
  const Scratch<T> s(l, memory);
  const Plane g = forward_plane(l);
  const int64_t tiles = g.tiles(), no_offset = 0;
  for (int64_t first = 0; first < tiles; first += s.chunk) {
    const int64_t some = std::min(s.chunk, tiles - first);
    for (int t = 0; t < count; ++t) {
      transform_inputs(g, terms[t].a, s.zeros, first, some, s.in.stride, s.in.at[t]);
      transform_cotangents(g, terms[t].b, s.zeros, first, some, s.out.stride, s.out.at[t]);
    }
    each_point(kPoints * count * some * l.in.c * l.out.c, [&](int64_t p) {
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

template <class T>
void winograd_weight_gradient(const Layer& l, const T* sums, bool add, T* grad_w) {
  const int64_t size = l.in.c * l.out.c;
  each_lanes<T>(size, [&](int64_t e, auto lanes) {
    const Vector<T> half = broadcast(T(0.5));
    Vector<T> a[3][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const T* from = sums + j * size + e;
      const Vector<T> s0 = load(from, lanes), s1 = load(from + 4 * size, lanes);
      const Vector<T> s2 = load(from + 8 * size, lanes), s3 = load(from + 12 * size, lanes);
      const Vector<T> both = (s1 + s2) * half;
      a[0][j] = s0 + both, a[1][j] = (s1 - s2) * half, a[2][j] = both + s3;
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      T* to = grad_w + 3 * i * size + e;
      const Vector<T> both = (a[i][1] + a[i][2]) * half;
      const Vector<T> row[3] = {a[i][0] + both, (a[i][1] - a[i][2]) * half, both + a[i][3]};
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j, to += size) store(to, add ? load(to, lanes) + row[j] : row[j], lanes);
    }
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
