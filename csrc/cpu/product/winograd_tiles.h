// The transforms of Winograd's minimal filtering in one dimension, constructed by Toom and Cook's method.
// With three taps w, a tile of M outputs y reads M + 2 inputs d and takes as many products:
//
//   y = A^T [(G w) * (B^T d)]
//
// There is one product for each point p at which polynomials are evaluated. Row p of A is 1, p, p^2, ..; row
// p of G is 1, p, p^2 divided by the product of p's differences to the other points; row p of B^T has the
// coefficients of the polynomial whose roots are the other points. The last point is infinity, where a
// polynomial's value is its highest coefficient. Two dimensions: along both axes.
//
// In general, product t multiplies value(t) of B^T d with weight(t) of G w and is added to point(t), which
// A^T reads. A tile reads kReads inputs; kDown / kUp is the number of inputs per output.
//
// Tile<2>: points 0, 1, -1, infinity (with the sign of the last product reversed). B and A consist of 0, 1,
// -1. Tile<4>: points 0, a, -a, b, -b, infinity with a = 3/4, b = 3/2. Of the points that float32 represents
// exactly, these have the least rounding error (cf. Barabasz et al. 2020, arXiv 1803.10986; measured in
// tests/cpu/test_winograd.py): 3 times the error of Tile<2>, half of that of the usual points 1 and 2.
//
// The compiler chooses which products it contracts into FMAs, and may choose differently in each inlined copy
// of a transform. So results that threads share must come from one copy (some_tiles in
// winograd_transforms.h).
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace maml::MAML_ISA::winograd {

template <int M>
struct Tile;

/// The sizes of a tile of stride 1: product t has value, weight and point t.
template <int M>
struct OnePointEach {
  using Transposed = Tile<M>;
  static constexpr int kOutputs = M, kReads = M + 2, kUp = 1, kDown = 1;
  static constexpr int kValues = kReads, kWeights = kReads, kPoints = kReads, kProducts = kReads;
  static constexpr int value(int t) { return t; }
  static constexpr int weight(int t) { return t; }
  static constexpr int point(int t) { return t; }
};

template <>
struct Tile<2> : OnePointEach<2> {
  /// B^T d
  template <class V>
  static void inputs(const V (&d)[4], V (&v)[4]) {
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
  }
  /// A^T m
  template <class V>
  static void outputs(const V (&m)[4], V (&y)[2]) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
  }
  /// A g
  template <class V>
  static void cotangents(const V (&g)[2], V (&u)[4]) {
    u[0] = g[0], u[1] = g[0] + g[1], u[2] = g[0] - g[1], u[3] = -g[1];
  }
  /// G w
  template <class V>
  static void weights(const V (&w)[3], V (&u)[4]) {
    const V ends = (w[0] + w[2]) * 0.5f, middle = w[1] * 0.5f;
    u[0] = w[0], u[1] = ends + middle, u[2] = ends - middle, u[3] = w[2];
  }
  /// G^T s
  template <class V>
  static void sums(const V (&s)[4], V (&w)[3]) {
    const V both = (s[1] + s[2]) * 0.5f;
    w[0] = s[0] + both, w[1] = (s[1] - s[2]) * 0.5f, w[2] = both + s[3];
  }
};

template <>
struct Tile<4> : OnePointEach<4> {
  static constexpr float a = 0.75f, b = 1.5f, a2 = a * a, b2 = b * b, a3 = a * a2;

  template <class V>
  static void inputs(const V (&d)[6], V (&v)[6]) {
    const V even_a = d[4] - d[2] * b2, odd_a = (d[3] - d[1] * b2) * a;
    const V even_b = d[4] - d[2] * a2, odd_b = (d[3] - d[1] * a2) * b;
    v[0] = d[0] * (a2 * b2) + (d[4] - d[2] * (a2 + b2));
    v[1] = even_a + odd_a, v[2] = even_a - odd_a;
    v[3] = even_b + odd_b, v[4] = even_b - odd_b;
    v[5] = d[1] * (a2 * b2) + (d[5] - d[3] * (a2 + b2));
  }
  template <class V>
  static void outputs(const V (&m)[6], V (&y)[4]) {
    const V sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    const V sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = (difference_a + difference_b * 2) * a;
    y[2] = (sum_a + sum_b * 4) * a2;
    y[3] = (difference_a + difference_b * 8) * a3 + m[5];
  }
  template <class V>
  static void cotangents(const V (&g)[4], V (&u)[6]) {
    const V even_a = g[0] + g[2] * a2, odd_a = (g[1] + g[3] * a2) * a;
    const V even_b = g[0] + g[2] * b2, odd_b = (g[1] + g[3] * b2) * b;
    u[0] = g[0];
    u[1] = even_a + odd_a, u[2] = even_a - odd_a;
    u[3] = even_b + odd_b, u[4] = even_b - odd_b;
    u[5] = g[3];
  }
  template <class V>
  static void weights(const V (&w)[3], V (&u)[6]) {
    const V even_a = (w[0] + w[2] * a2) * scale<V>(-128, 243), odd_a = w[1] * scale<V>(-96, 243);
    const V even_b = (w[0] + w[2] * b2) * scale<V>(32, 243), odd_b = w[1] * scale<V>(48, 243);
    u[0] = w[0] * scale<V>(64, 81);
    u[1] = even_a + odd_a, u[2] = even_a - odd_a;
    u[3] = even_b + odd_b, u[4] = even_b - odd_b;
    u[5] = w[2];
  }
  template <class V>
  static void sums(const V (&s)[6], V (&w)[3]) {
    const V sum_a = (s[1] + s[2]) * scale<V>(-128, 243), sum_b = (s[3] + s[4]) * scale<V>(32, 243);
    w[0] = s[0] * scale<V>(64, 81) + sum_a + sum_b;
    w[1] = (s[1] - s[2]) * scale<V>(-96, 243) + (s[3] - s[4]) * scale<V>(48, 243);
    w[2] = sum_a * a2 + sum_b * b2 + s[5];
  }

 private:
  /// The quotient, computed in the precision of V's elements.
  template <class V>
  static auto scale(int over, int under) {
    using T = std::remove_cvref_t<decltype(V{}[0])>;
    return T(over) / T(under);
  }
};

struct Doubling;

/// Stride 2 in one dimension: y[i] = w[0] d[2i] + w[1] d[2i + 1] + w[2] d[2i + 2]. Inputs of even index are
/// multiplied by two taps, the first and the last: a filter F(3, 2), which has 4 products instead of 6, with
/// points 0, 1, -1, infinity. Inputs of odd index are multiplied by the middle tap only, in 3 products that
/// need no points of their own: y[0] and y[2] contain all of point 1, and the part that does not belong to
/// them is subtracted at points 0 and infinity.
struct Halving {
  using Transposed = Doubling;
  static constexpr int kOutputs = 3, kReads = 7, kUp = 1, kDown = 2;
  static constexpr int kValues = 7, kWeights = 5, kPoints = 4, kProducts = 7;
  static constexpr int value(int t) { return t; }
  static constexpr int weight(int t) { return std::min(t, 4); }
  static constexpr int point(int t) { return t < 4 ? t : t < 6 ? t - 4 : 3; }

  template <class V>
  static constexpr void inputs(const V (&d)[7], V (&v)[7]) {
    v[0] = d[0] - d[4], v[1] = d[2] + d[4], v[2] = d[4] - d[2], v[3] = d[6] - d[2];
    v[4] = d[1] - d[3], v[5] = d[3], v[6] = d[5] - d[3];
  }
  template <class V>
  static constexpr void outputs(const V (&m)[4], V (&y)[3]) {
    const V both = m[1] + m[2];
    y[0] = m[0] + both, y[1] = m[1] - m[2], y[2] = both + m[3];
  }
  template <class V>
  static void cotangents(const V (&g)[3], V (&u)[4]) {
    const V ends = g[0] + g[2];
    u[0] = g[0], u[1] = ends + g[1], u[2] = ends - g[1], u[3] = g[2];
  }
  template <class V>
  static void weights(const V (&w)[3], V (&u)[5]) {
    u[0] = w[0], u[1] = (w[0] + w[2]) * 0.5f, u[2] = (w[0] - w[2]) * 0.5f, u[3] = w[2], u[4] = w[1];
  }
  template <class V>
  static void sums(const V (&s)[5], V (&w)[3]) {
    w[0] = s[0] + (s[1] + s[2]) * 0.5f, w[1] = s[4], w[2] = (s[1] - s[2]) * 0.5f + s[3];
  }
};

/// The input gradient of stride 2: x[2i] = w[1] g[i] and x[2i + 1] = w[0] g[i] + w[2] g[i + 1], with the taps
/// reversed. F(3, 2) again; the middle tap is multiplied by the same values in 3 products with points of
/// their own.
struct Doubling {
  static constexpr int kOutputs = 6, kReads = 4, kUp = 2, kDown = 1;
  static constexpr int kValues = 4, kWeights = 5, kPoints = 7, kProducts = 7;
  static constexpr int value(int t) { return t < 4 ? t : t - 4; }
  static constexpr int weight(int t) { return std::min(t, 4); }
  static constexpr int point(int t) { return t; }

  template <class V>
  static constexpr void inputs(const V (&g)[4], V (&v)[4]) {
    v[0] = g[0] - g[2], v[1] = g[1] + g[2], v[2] = g[2] - g[1], v[3] = g[3] - g[1];
  }
  template <class V>
  static constexpr void outputs(const V (&m)[7], V (&x)[6]) {
    const V both = m[1] + m[2], last = (m[5] + m[6]) * 0.5f;
    x[0] = m[4] + last, x[1] = m[0] + both;
    x[2] = (m[5] - m[6]) * 0.5f, x[3] = m[1] - m[2];
    x[4] = last, x[5] = both + m[3];
  }
};

/// Whether a sum has any terms. Used in place of vectors in the transforms, it tells which results are zero.
struct Reach {
  bool any = false;
  friend constexpr Reach operator+(Reach a, Reach b) { return {a.any || b.any}; }
  friend constexpr Reach operator-(Reach a, Reach b) { return {a.any || b.any}; }
  friend constexpr Reach operator*(Reach a, float) { return a; }
};

/// Whether a tile leaves out the products that are zero or unused at the borders of an image.
template <class Tile>
constexpr bool kSkips = Tile::kUp * Tile::kDown > 1;

/// What a tile computes at the borders of an image, along one axis. Sets are bit masks.
template <class Tile>
struct Borders {
  /// The points that are not zero if only the inputs [first, end) are inside the image.
  uint32_t reading[Tile::kReads + 1][Tile::kReads + 1] = {};
  /// The points that contribute to any of the outputs [first, end).
  uint32_t reaching[Tile::kOutputs + 1][Tile::kOutputs + 1] = {};
  /// For each set of points, the values that it reads and the number of its products.
  uint32_t values[1 << Tile::kPoints] = {};
  int products[1 << Tile::kPoints] = {};

  constexpr Borders() {
    for (int first = 0; first <= Tile::kReads; ++first) {
      for (int end = first; end <= Tile::kReads; ++end) {
        Reach d[Tile::kReads] = {}, v[Tile::kValues] = {};
        for (int i = first; i < end; ++i) d[i].any = true;
        Tile::inputs(d, v);
        for (int t = 0; t < Tile::kProducts; ++t) {
          if (v[Tile::value(t)].any) reading[first][end] |= 1u << Tile::point(t);
        }
      }
    }
    for (int p = 0; p < Tile::kPoints; ++p) {
      Reach m[Tile::kPoints] = {}, y[Tile::kOutputs] = {};
      m[p].any = true;
      Tile::outputs(m, y);
      for (int i = 0; i < Tile::kOutputs; ++i) {
        for (int first = 0; first <= i && y[i].any; ++first) {
          for (int end = i + 1; end <= Tile::kOutputs; ++end) reaching[first][end] |= 1u << p;
        }
      }
    }
    for (uint32_t points = 0; points < 1u << Tile::kPoints; ++points) {
      for (int t = 0; t < Tile::kProducts; ++t) {
        if (!(points >> Tile::point(t) & 1)) continue;
        values[points] |= 1u << Tile::value(t);
        ++products[points];
      }
    }
  }
};
template <class Tile>
inline constexpr Borders<Tile> kBorders;

/// The rows and columns of a transform's results that are wanted, as bit masks.
struct Some {
  uint32_t rows, columns;
  bool row(int i) const { return rows >> i & 1; }
  bool column(int j) const { return columns >> j & 1; }
};

/// All rows and columns are wanted.
struct All {
  static constexpr bool row(int) { return true; }
  static constexpr bool column(int) { return true; }
};

/// write(i, j) receives the two-dimensional transform of read(i, j): f along columns, then along rows, from
/// In x In to Out x Out vectors, for the wanted results. `Again`: each result needs few inputs, so that it is
/// cheaper to read them again for every row than to keep the transforms of all columns.
template <class T, int In, int Out, bool Again, class F, class Read, class Wanted, class Write>
inline void by_both_axes(F f, Read read, Wanted wanted, Write write) {
  const auto column = [&](int j, Vector<T>(&result)[Out]) {
    Vector<T> d[In];
#pragma GCC unroll 7
    for (int i = 0; i < In; ++i) d[i] = read(i, j);
    f(d, result);
  };
  Vector<T> half[Again ? 1 : Out][In];
  if constexpr (!Again) {
#pragma GCC unroll 7
    for (int j = 0; j < In; ++j) {
      Vector<T> result[Out];
      column(j, result);
#pragma GCC unroll 7
      for (int i = 0; i < Out; ++i) half[i][j] = result[i];
    }
  }
#pragma GCC unroll 7
  for (int i = 0; i < Out; ++i) {
    if (!wanted.row(i)) continue;
    Vector<T> row[In], result[Out];
#pragma GCC unroll 7
    for (int j = 0; j < In; ++j) {
      if constexpr (Again) {
        column(j, result);
        row[j] = result[i];
      } else {
        row[j] = half[i][j];
      }
    }
    f(row, result);
#pragma GCC unroll 7
    for (int j = 0; j < Out; ++j) {
      if (wanted.column(j)) write(i, j, result[j]);
    }
  }
}

}  // namespace maml::MAML_ISA::winograd
