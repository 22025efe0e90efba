#include "cpu/product/product.h"

#include <algorithm>
#include <type_traits>

#include "cpu/product/blocks.h"
#include "cpu/run/share.h"

namespace maml::MAML_ISA {
namespace {

constexpr int kMostVectors = MAML_REGISTERS >= 32 ? 4 : 2;
constexpr int most_rows(int vectors) {
  if (MAML_REGISTERS >= 32) return vectors > 4 ? 5 : vectors > 3 ? 6 : 8;
  return vectors > 2 ? 4 : vectors > 1 ? 6 : 8;
}

/// The end of a row: Lanes of one more vector, HalfLanes of half a vector, or NoLanes where there is none.
template <class T>
struct NoLanes {
  using V = Vector<T>;
};

/// A block of R rows in registers: V full vectors and the end of each row.
template <class T, int R, int V, class End>
struct Piece {
  static constexpr int W = kLanes<T>;
  static constexpr bool kEnd = !std::is_same_v<End, NoLanes<T>>;
  static constexpr bool kHalfEnd = sizeof(typename End::V) < sizeof(Vector<T>);
  Vector<T> whole[R][V > 0 ? V : 1];
  typename End::V end[R];

  /// Loads row r.
  void read(int r, const T* from, const End& lanes) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) whole[r][v] = load(from + v * W);
    if constexpr (kEnd) end[r] = load(from + V * W, lanes);
  }
  void zero(int r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) whole[r][v] = Vector<T>{};
    if constexpr (kEnd) end[r] = typename End::V{};
  }
  /// Row r += x times the row of `b`.
  void add_product(int r, T x, const Piece<T, 1, V, End>& b) {
    if constexpr (V == 0 && kHalfEnd) {
      end[r] += broadcast_half(x) * b.end[0];
    } else {
      const Vector<T> factor = broadcast(x);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) whole[r][v] += factor * b.whole[0][v];
      if constexpr (kHalfEnd) {
        end[r] += half<T>(factor) * b.end[0];
      } else if constexpr (kEnd) {
        end[r] += factor * b.end[0];
      }
    }
  }
  void add(int r, const T* from, const End& lanes) {
    Piece<T, 1, V, End> b;
    b.read(0, from, lanes);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) whole[r][v] += b.whole[0][v];
    if constexpr (kEnd) end[r] += b.end[0];
  }
  void write(int r, T* to, const End& lanes) const {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(to + v * W, whole[r][v]);
    if constexpr (kEnd) store(to + V * W, end[r], lanes);
  }
};

/// R rows of c from row m on, as wide as a Piece, from column j on. Blocks are separate functions, because in
/// a larger function the compiler runs out of registers for their addresses. Stores may alias the fields of
/// p, so what is needed after a store (`apart`, the rows' addresses) is copied to locals first.
template <class T, int R, int V, class End>
[[gnu::noinline]] void gather_block(const GatherProduct<T>& p, int64_t m, int64_t j, const End& lanes) {
  Piece<T, R, V, End> sum;
  T* c[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) c[r] = p.c + p.c_row[m + r] + j;
  const bool apart = p.apart;
  if (!apart && p.add) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum.read(r, c[r], lanes);
  } else if (!apart && p.bias) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum.read(r, p.bias + j, lanes);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum.zero(r);
  }
  for (int t = 0; t < p.terms; ++t) {
    for (int run = 0; run < p.runs.count; ++run) {
      const T* b = p.term[t].b + p.runs.weight_of(run) * p.n + j;
      const T* a[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) a[r] = p.term[t].a + p.row[m + r] + p.runs.offset[run];
      for (int64_t i = 0; i < p.runs.length; ++i, b += p.n) {
        Piece<T, 1, V, End> row;
        row.read(0, b, lanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum.add_product(r, a[r][i], row);
      }
    }
  }
  if (apart) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum.add(r, c[r], lanes);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum.write(r, c[r], lanes);
}

/// Up to this number of products in a sum, a and b stay in registers while the loop goes over the rows of c.
constexpr int kFewProducts = 4;

template <class T, int K, int V, class End>
[[gnu::noinline]] void gather_thin(const GatherProduct<T>& p, int64_t first, int64_t last, int64_t j,
                                   const End& lanes) {
  Piece<T, 1, V, End> start, b[K];
  const T* a[K];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    const int64_t term = k / p.runs.length, i = k % p.runs.length;
    b[k].read(0, p.term[term].b + (p.runs.weight_of(0) + i) * p.n + j, lanes);
    a[k] = p.term[term].a + p.runs.offset[0] + i;
  }
  const bool add = p.add;
  if (p.bias) {
    start.read(0, p.bias + j, lanes);
  } else {
    start.zero(0);
  }
  const int32_t *row = p.row, *c_row = p.c_row;
  T* const c = p.c + j;
  for (int64_t m = first; m < last; ++m) {
    auto sum = start;
    if (add) sum.read(0, c + c_row[m], lanes);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) sum.add_product(0, a[k][row[m]], b[k]);
    sum.write(0, c + c_row[m], lanes);
  }
}

/// R rows of d from element k of a run on, summed over the pixels [m0, m1).
template <class T, int R, int V, class End>
[[gnu::noinline]] void outer_block(const OuterProduct<T>& p, int64_t offset, T* d, int64_t m0, int64_t m1,
                                   int64_t j, bool add, const End& lanes) {
  Piece<T, R, V, End> sum;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum.zero(r);
  for (int t = 0; t < p.terms; ++t) {
    const T* a = p.term[t].a + offset;
    for (int64_t m = m0; m < m1; ++m) {
      const T* g = p.term[t].b + (p.g_row ? p.g_row[m] : m * p.n) + j;
      Piece<T, 1, V, End> row;
      row.read(0, g, lanes);
      const T* x = a + p.row[m];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum.add_product(r, x[r], row);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (add) sum.add(r, d + r * p.n + j, lanes);
    sum.write(r, d + r * p.n + j, lanes);
  }
}

/// Splits n columns into pieces of Most vectors and a rest; a single vector or end is joined to the last
/// piece. Calls f.template operator()<V>(j, end of a row).
template <class T, int Most, class F>
void columns(int64_t n, F f) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  for (; n - j > (Most + 1) * W || n - j == Most * W; j += Most * W)
    f.template operator()<Most>(j, NoLanes<T>());
  const int64_t vectors = (n - j) / W, rest = (n - j) % W;
  auto with = [&]<int V>() {
    if (rest == 0) {
      if constexpr (V > 0) f.template operator()<V>(j, NoLanes<T>());
    } else if constexpr (V <= Most) {
      if (rest > kHalf<T>) {
        f.template operator()<V>(j, Lanes<T>(rest));
      } else {
        f.template operator()<V>(j, HalfLanes<T>(rest));
      }
    }
  };
  [&]<int... V>(std::integer_sequence<int, V...>) {
    ((vectors == V ? with.template operator()<V>() : void()), ...);
  }(std::make_integer_sequence<int, Most + 2>());
}

/// The number of vectors of a piece, including the end of its rows.
template <class T, int V, class End>
constexpr int kVectors = V + !std::is_same_v<End, NoLanes<T>>;

/// Threads share rows in multiples of this: four register blocks of six rows, or three of eight.
constexpr int64_t kShareRows = 24;

}  // namespace

template <class T>
void gather_product(const GatherProduct<T>& p) {
  if (p.runs.count == 1 && p.runs.length > kLongest) {
    for (int64_t i = 0; i < p.runs.length; i += kLongest) {
      GatherProduct<T> part = p;
      const int64_t offset = p.runs.offset[0] + i, weight = p.runs.weight_of(0) + i;
      part.runs = {1, std::min(kLongest, p.runs.length - i), &offset, &weight};
      part.apart = p.apart || i > 0;
      gather_product(part);
    }
    return;
  }
  const int64_t depth = p.terms * p.runs.count * p.runs.length;
  share(p.m, kShareRows, p.m * p.n * depth, [&](int64_t first, int64_t last) {
    const bool thin = depth > 0 && depth <= kFewProducts && p.runs.count == 1 && !p.apart;
    columns<T, kMostVectors>(p.n, [&]<int V, class End>(int64_t j, const End& lanes) {
      if (thin) {
        of_size<kFewProducts>(depth, j,
                              [&]<int K>(int64_t) { gather_thin<T, K, V>(p, first, last, j, lanes); });
        return;
      }
      in_like_blocks<most_rows(kVectors<T, V, End>)>(
          first, last, [&]<int R>(int64_t m) { gather_block<T, R, V>(p, m, j, lanes); });
    });
  });
}

namespace {

/// outer_product in pieces of Most vectors and, unless 0, at most `Rows` rows.
template <class T, int Most, int Rows = 0>
void outer_product_of(const OuterProduct<T>& p) {
  const int64_t rows = p.runs.count * p.runs.length;
  share(rows, kShareRows, p.terms * p.m * p.n * rows, [&](int64_t first, int64_t last) {
    for (int64_t m0 = 0; m0 < p.m; m0 += kLongest) {
      const int64_t m1 = std::min(p.m, m0 + kLongest);
      const bool add = p.add || m0 > 0;
      columns<T, Most>(p.n, [&]<int V, class End>(int64_t j, const End& lanes) {
        constexpr int kRows = Rows > 0 ? Rows : most_rows(kVectors<T, V, End>);
        for (int run = static_cast<int>(first / p.runs.length); run < p.runs.count; ++run) {
          const int64_t i0 = std::max<int64_t>(0, first - run * p.runs.length);
          const int64_t i1 = std::min(p.runs.length, last - run * p.runs.length);
          if (i0 >= i1) continue;
          in_like_blocks<kRows>(i0, i1, [&]<int R>(int64_t i) {
            outer_block<T, R, V>(p, p.runs.offset[run] + i, p.d + (p.runs.weight_of(run) + i) * p.n, m0, m1,
                                 j, add, lanes);
          });
        }
      });
    }
  });
}

/// Up to this number of rows, a piece may have twice the vectors.
constexpr int kFewRows = 2;

/// With few columns most lanes would be idle. Where the rows of a are contiguous, this computes d transposed,
/// with the elements of a in the lanes, by the same sums in the same order. Returns false where that does not
/// apply.
template <class T>
bool outer_product_transposed(const OuterProduct<T>& p) {
  constexpr int64_t kMost = 4096;  // elements of d
  const int64_t length = p.runs.length;
  if (p.g_row || p.runs.count != 1 || p.runs.weight_of(0) != 0 || 2 * p.n > kLanes<T> ||
      length < 2 * kLanes<T> || length * p.n > kMost)
    return false;
  bool dense = true;
  for (int64_t m = 0; m < p.m; ++m) dense &= p.row[m] == p.row[0] + m * length;
  if (!dense) return false;
  alignas(64) T turned[kMost];
  if (p.add) transpose(1, length, p.n, p.d, turned);
  int32_t row[kLongest];
  for (int64_t m = 0; m < kLongest; ++m) row[m] = static_cast<int32_t>(m * p.n);
  const int64_t start = 0;
  for (int64_t m = 0; m < p.m; m += kLongest) {
    OuterProduct<T> o{{},     p.terms, {1, p.n, &start}, row, nullptr, std::min(kLongest, p.m - m),
                      length, turned,  p.add || m > 0};
    for (int t = 0; t < p.terms; ++t) {
      o.term[t] = {p.term[t].b + m * p.n, p.term[t].a + p.runs.offset[0] + p.row[0] + m * length};
    }
    outer_product(o);
  }
  transpose(1, p.n, length, turned, p.d);
  return true;
}

}  // namespace

template <class T>
void outer_product(const OuterProduct<T>& p) {
  if (outer_product_transposed(p)) return;
  if (p.runs.length <= kFewRows) return outer_product_of<T, 2 * kMostVectors, kFewRows>(p);
  outer_product_of<T, kMostVectors>(p);
}

template <class T>
void transpose(int64_t taps, int64_t rows, int64_t columns, const T* in, T* out) {
  constexpr int64_t W = kLanes<T>;
  // The last block of a side of W or more is moved back, over elements already done: a full block needs no
  // masks.
  const auto block_at = [](int64_t i, int64_t size) { return size < W ? i : std::min(i, size - W); };
  share(taps, 1, kElementWork * taps * rows * columns, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const T* from = in + t * rows * columns;
      T* to = out + t * rows * columns;
      if (2 * std::min(rows, columns) <= W) {  // most lanes would be idle
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
        }
        continue;
      }
      for (int64_t i = 0; i < rows; i += W) {
        const int64_t row = block_at(i, rows);
        for (int64_t j = 0; j < columns; j += W) {
          const int64_t column = block_at(j, columns);
          transpose_block(std::min(W, rows), std::min(W, columns), from + row * columns + column, columns,
                          to + column * rows + row, rows);
        }
      }
    }
  });
}

namespace {

/// out[j] (+)= sum of rows [m0, m1) of g, for V vectors of columns. Several vectors at a time hide the
/// latency of an addition.
template <int V, class T, class L>
void column_sums_of(int64_t m0, int64_t m1, int64_t n, const T* g, bool add, T* out, const L& lanes) {
  constexpr int W = kLanes<T>;
  Vector<T> sum[V] = {};
  for (int64_t m = m0; m < m1; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[v] += load(g + m * n + v * W, lanes);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    T* const to = out + v * W;
    store(to, add ? sum[v] + load(to, lanes) : sum[v], lanes);
  }
}

}  // namespace

template <class T>
void column_sums(int64_t m, int64_t n, const T* g, bool add, T* out) {
  constexpr int W = kLanes<T>;
  share(n, W, kElementWork * m * n, [&](int64_t first, int64_t last) {
    for (int64_t m0 = 0; m0 < m; m0 += kLongest) {
      const int64_t m1 = std::min(m, m0 + kLongest);
      const bool adds = add || m0 > 0;
      int64_t j = first;
      for (; j + 4 * W <= last; j += 4 * W) column_sums_of<4>(m0, m1, n, g + j, adds, out + j, Whole());
      each_lanes<T>(last - j, [&](int64_t c, auto lanes) {
        column_sums_of<1>(m0, m1, n, g + j + c, adds, out + j + c, lanes);
      });
    }
  });
}

template void gather_product<float>(const GatherProduct<float>&);
template void gather_product<double>(const GatherProduct<double>&);
template void outer_product<float>(const OuterProduct<float>&);
template void outer_product<double>(const OuterProduct<double>&);
template void transpose<float>(int64_t, int64_t, int64_t, const float*, float*);
template void transpose<double>(int64_t, int64_t, int64_t, const double*, double*);
template void column_sums<float>(int64_t, int64_t, const float*, bool, float*);
template void column_sums<double>(int64_t, int64_t, const double*, bool, double*);

}  // namespace maml::MAML_ISA
