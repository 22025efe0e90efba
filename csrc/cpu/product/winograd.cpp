// Winograd's minimal filtering (Lavin, Gray 2016, arXiv 1509.09308), channels last, for one task, in the
// tiles of winograd_tiles.h: F(M x M, 3 x 3) for stride 1; for stride 2 the same idea, applied to the inputs
// that two outputs read. This file has the products and the passes; winograd_plane.h divides images into
// tiles, and winograd_transforms.h transforms them.
//
// A tile is M x M outputs and the inputs d that they read. With the matrices A, B, G of the tile
//
//   y      = A^T [ sum_c (B^T d B) (G w G^T) ] A
//
// where each product of a value of B^T d B with a weight of G w G^T is added to one of the points that A
// reads. For each point this is a matrix product over channels.
//
//   grad_w = G^T [ sum_tiles (B^T d B) (A g A^T) ] G
//
// is its transpose, summed over tiles before the last step. grad_x is a convolution of g with the taps
// reversed and transposed: for stride 1 in the same tiles; for stride 2, where it doubles the image, in tiles
// of its own. All are bilinear, so that the two terms of a tangent are summed at the points: one product of
// two terms, and one transform of the result.
//
// The products are those of product.h; the products that are added at a point are its runs. One chunk of
// tiles is processed at a time, so that its values and points [.., chunk, c] stay in the cache.
//
// M = 4 has 36 products for 16 outputs and suits larger images; M = 2 has 16 for 4, and smaller errors.
// Stride 2 has 49 products for 9 outputs, where plain sums have 81. Its images are small, so a tile leaves
// out the points that are zero or contribute to no output inside the image, and the first tile starts where
// the fewest products remain. For example 14 pixels to 7, as in the Omniglot network, are tiles of 1, 3 and 3
// outputs with 2 + 7 + 7 products along an axis, where plain sums have 20.
//
// Order of sums: in a weight gradient chunks, a weight's products, tiles, ascending; in the others products,
// then channels.
#include "cpu/product/winograd.h"

#include "cpu/product/winograd_transforms.h"

namespace maml::MAML_ISA {
namespace {

using namespace winograd;

/// Calls f(i, j) for Side x Side points; threads share them. `work`: of all points, in multiply-adds.
template <int Side, class F>
inline void each_point(int64_t work, F f) {
  share(square(Side), 1, work, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) f(static_cast<int>(p) / Side, static_cast<int>(p) % Side);
  });
}

/// y (+)= bias + sum of terms a * b, from the values `from` of one side to the points `to` of the other.
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
      GatherProduct<T> product{};
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
      OuterProduct<T> product{};
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
