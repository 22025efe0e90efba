#include "product.h"

#include <algorithm>

#include "share.h"

namespace maml::MAML_ISA {
namespace {

constexpr int kMostVectors = MAML_REGISTERS >= 32 ? 4 : 2;
constexpr int most_rows(int vectors) {
  return vectors > 2 ? 6 : MAML_REGISTERS >= 32 ? 8 : vectors > 1 ? 6 : 8;
}

/// R rows of c from row m on, V vectors wide from column j on; Masked: the last vector is `lanes`.
template <class T, int R, int V, bool Masked>
inline void gather_block(const Gather<T>& p, int64_t m, int64_t j, const Lanes<T>& lanes) {
  constexpr int W = kLanes<T>;
  auto read = [&](const T* from, int v) {
    return Masked && v == V - 1 ? load(from + v * W, lanes) : load(from + v * W);
  };
  Vector<T> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sum[r][v] = p.add ? read(p.c + p.c_row[m + r] + j, v) : p.bias ? read(p.bias + j, v) : Vector<T>{};
    }
  }
  for (int t = 0; t < p.terms; ++t) {
    for (int run = 0; run < p.runs.count; ++run) {
      const T* b = p.term[t].b + p.runs.weight_of(run) * p.n + j;
      const T* a[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) a[r] = p.term[t].a + p.row[m + r] + p.runs.offset[run];
      for (int64_t i = 0; i < p.runs.length; ++i, b += p.n) {
        Vector<T> column[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) column[v] = read(b, v);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vector<T> x = broadcast(a[r][i]);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) sum[r][v] += x * column[v];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    T* c = p.c + p.c_row[m + r] + j;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if (Masked && v == V - 1) {
        store(c + v * W, sum[r][v], lanes);
      } else {
        store(c + v * W, sum[r][v]);
      }
    }
  }
}

/// At most R rows from row m on, in one block.
template <class T, int R, int V, bool Masked>
void gather_few(const Gather<T>& p, int64_t m, int64_t rows, int64_t j, const Lanes<T>& lanes) {
  if (rows == R) return gather_block<T, R, V, Masked>(p, m, j, lanes);
  if constexpr (R > 1) gather_few<T, R - 1, V, Masked>(p, m, rows, j, lanes);
}

/// Blocks of R rows, and two like ones of what is more than R at the end.
template <class T, int R, int V, bool Masked>
void gather_rows(const Gather<T>& p, int64_t m, int64_t end, int64_t j, const Lanes<T>& lanes) {
  for (; end - m >= 2 * R || end - m == R; m += R) gather_block<T, R, V, Masked>(p, m, j, lanes);
  if (end - m > R) {
    const int64_t rows = (end - m + 1) / 2;
    gather_few<T, R, V, Masked>(p, m, rows, j, lanes);
    m += rows;
  }
  if (m < end) gather_few<T, R, V, Masked>(p, m, end - m, j, lanes);
}

/// R rows of d from element k of a run on, over the pixels [m0, m1).
template <class T, int R, int V, bool Masked>
inline void outer_block(const Outer<T>& p, int64_t offset, T* d, int64_t m0, int64_t m1, int64_t j, bool add,
                        const Lanes<T>& lanes) {
  constexpr int W = kLanes<T>;
  auto read = [&](const T* from, int v) {
    return Masked && v == V - 1 ? load(from + v * W, lanes) : load(from + v * W);
  };
  Vector<T> sum[R][V] = {};
  for (int t = 0; t < p.terms; ++t) {
    const T* a = p.term[t].a + offset;
    for (int64_t m = m0; m < m1; ++m) {
      const T* g = p.term[t].b + (p.g_row ? p.g_row[m] : m * p.n) + j;
      Vector<T> row[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) row[v] = read(g, v);
      const T* x = a + p.row[m];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vector<T> factor = broadcast(x[r]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[r][v] += factor * row[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      T* to = d + r * p.n + j + v * W;
      const bool masked = Masked && v == V - 1;
      Vector<T> value = sum[r][v];
      if (add) value += masked ? load(to, lanes) : load(to);
      if (masked) {
        store(to, value, lanes);
      } else {
        store(to, value);
      }
    }
  }
}

template <class T, int R, int V, bool Masked>
void outer_rows(const Outer<T>& p, int run, int64_t i, int64_t end, int64_t m0, int64_t m1, int64_t j,
                bool add, const Lanes<T>& lanes) {
  for (; i + R <= end; i += R) {
    outer_block<T, R, V, Masked>(p, p.runs.offset[run] + i, p.d + (p.runs.weight_of(run) + i) * p.n, m0, m1,
                                 j, add, lanes);
  }
  if constexpr (R > 1) {
    if (i < end) outer_rows<T, R / 2, V, Masked>(p, run, i, end, m0, m1, j, add, lanes);
  }
}

/// Cuts n columns into the widest blocks that fit: f.template operator()<V, Masked>(j, lanes).
template <class T, class F>
void columns(int64_t n, F f) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  const Lanes<T> all(W);
  for (; j + kMostVectors * W <= n; j += kMostVectors * W) f.template operator()<kMostVectors, false>(j, all);
  const int64_t rest = n - j;
  if (rest == 0) return;
  const int64_t vectors = (rest + W - 1) / W;
  const Lanes<T> lanes(rest - (vectors - 1) * W);
  const bool masked = rest % W != 0;
  auto with = [&]<int V>() {
    if (masked) {
      f.template operator()<V, true>(j, lanes);
    } else {
      f.template operator()<V, false>(j, all);
    }
  };
  if (vectors == 1) return with.template operator()<1>();
  if (vectors == 2) return with.template operator()<2>();
  if constexpr (kMostVectors > 2) {
    if (vectors == 3) return with.template operator()<3>();
    return with.template operator()<4>();
  }
}

/// Sums over pixels go through a fresh accumulator of so many: short sums, added up, round less.
constexpr int64_t kPixels = 256;

/// Threads share rows by the dozen: two register blocks of six, one and a half of eight.
constexpr int64_t kShareRows = 12;

}  // namespace

template <class T>
void gather_product(const Gather<T>& p) {
  const int64_t depth = p.terms * p.runs.count * p.runs.length;
  share(p.m, kShareRows, p.m * p.n * depth, [&](int64_t first, int64_t last) {
    columns<T>(p.n, [&]<int V, bool Masked>(int64_t j, const Lanes<T>& lanes) {
      gather_rows<T, most_rows(V), V, Masked>(p, first, last, j, lanes);
    });
  });
}

template <class T>
void outer_product(const Outer<T>& p) {
  const int64_t rows = p.runs.count * p.runs.length;
  share(rows, kShareRows, p.terms * p.m * p.n * rows, [&](int64_t first, int64_t last) {
    for (int64_t m0 = 0; m0 < p.m; m0 += kPixels) {
      const int64_t m1 = std::min(p.m, m0 + kPixels);
      const bool add = p.add || m0 > 0;
      columns<T>(p.n, [&]<int V, bool Masked>(int64_t j, const Lanes<T>& lanes) {
        for (int run = static_cast<int>(first / p.runs.length); run < p.runs.count; ++run) {
          const int64_t i0 = std::max<int64_t>(0, first - run * p.runs.length);
          const int64_t i1 = std::min(p.runs.length, last - run * p.runs.length);
          if (i0 < i1) outer_rows<T, most_rows(V), V, Masked>(p, run, i0, i1, m0, m1, j, add, lanes);
        }
      });
    }
  });
}

template <class T>
void transpose(int64_t taps, int64_t rows, int64_t columns, const T* in, T* out) {
  constexpr int64_t W = kLanes<T>;
  share(taps, 1, kElementWork * taps * rows * columns, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const T* from = in + t * rows * columns;
      T* to = out + t * rows * columns;
      for (int64_t i = 0; i < rows; i += W) {
        for (int64_t j = 0; j < columns; j += W) {
          transpose_block(std::min(W, rows - i), std::min(W, columns - j), from + i * columns + j, columns,
                          to + j * rows + i, rows);
        }
      }
    }
  });
}

template <class T>
void column_sums(int64_t m, int64_t n, const T* g, bool add, T* out) {
  constexpr int W = kLanes<T>;
  share(n, W, kElementWork * m * n, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; j += W) {
      const Lanes<T> lanes(std::min<int64_t>(W, n - j));
      for (int64_t m0 = 0; m0 < m; m0 += kPixels) {
        Vector<T> sum{};
        const int64_t m1 = std::min(m, m0 + kPixels);
        for (int64_t i = m0; i < m1; ++i) sum += load(g + i * n + j, lanes);
        store(out + j, add || m0 > 0 ? sum + load(out + j, lanes) : sum, lanes);
      }
    }
  });
}

template void gather_product<float>(const Gather<float>&);
template void gather_product<double>(const Gather<double>&);
template void outer_product<float>(const Outer<float>&);
template void outer_product<double>(const Outer<double>&);
template void transpose<float>(int64_t, int64_t, int64_t, const float*, float*);
template void transpose<double>(int64_t, int64_t, int64_t, const double*, double*);
template void column_sums<float>(int64_t, int64_t, const float*, bool, float*);
template void column_sums<double>(int64_t, int64_t, const double*, bool, double*);

}  // namespace maml::MAML_ISA
