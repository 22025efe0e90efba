// The transforms of Winograd's minimal filtering in one dimension, by Toom and Cook: with three taps w, a
// tile of M outputs y reads M + 2 inputs d, and as many products give them,
//
//   y = A^T [(G w) * (B^T d)]
//
// one for each point p at which polynomials are evaluated: row p of A is 1, p, p^2, ..; row p of G is 1, p,
// p^2 over the product of p's distances from the other points; row p of B^T has the coefficients of the
// polynomial whose roots these are. Infinity, the last point, takes the highest coefficients. By rows, then
// by columns: two dimensions.
//
// Tile<2>: points 0, 1, -1, infinity (and the sign of the last product turned). B and A hold 0 and 1 alone.
// Tile<4>: points 0, a, -a, b, -b, infinity with a = 3/4, b = 3/2: of the points that float32 holds those
// whose rounding grows least (cf. Barabasz et al. 2020, arXiv 1803.10986; measured in
// tests/layers/test_winograd.py): 3 times the error of Tile<2>, half of that of the usual 1 and 2.
//
// The compiler chooses which products become part of an FMA, and may choose otherwise in every copy that it
// makes of a transform: what threads share must be one copy (each_tile in winograd.cpp).
#pragma once

#include "simd.h"

namespace maml::MAML_ISA {

template <int M>
struct Tile;

template <>
struct Tile<2> {
  static constexpr int kSide = 4;

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
struct Tile<4> {
  static constexpr int kSide = 6;
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
  /// The quotient in the precision of V's elements.
  template <class V>
  static auto scale(int over, int under) {
    using T = std::remove_cvref_t<decltype(V{}[0])>;
    return T(over) / T(under);
  }
};

/// write(i, j) <- f by columns, then by rows, of read(i, j): In x In to Out x Out vectors.
template <class T, int In, int Out, class F, class Read, class Write>
inline void by_both_axes(F f, Read read, Write write) {
  Vector<T> half[Out][In];
#pragma GCC unroll 6
  for (int j = 0; j < In; ++j) {
    Vector<T> column[In], result[Out];
#pragma GCC unroll 6
    for (int i = 0; i < In; ++i) column[i] = read(i, j);
    f(column, result);
#pragma GCC unroll 6
    for (int i = 0; i < Out; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < Out; ++i) {
    Vector<T> result[Out];
    f(half[i], result);
#pragma GCC unroll 6
    for (int j = 0; j < Out; ++j) write(i, j, result[j]);
  }
}

}  // namespace maml::MAML_ISA
