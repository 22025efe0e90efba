// The two matrix products that linear layers and convolutions are made of. Their rows are gathered by
// offsets.
//
// For output pixel m and row r of taps, a convolution on a padded channels-last image reads the elements
// a[row[m] + run[r] + i], i < length: a row of taps with all its channels is one contiguous run. A linear
// layer has one run of length c_in. Two terms are summed into one accumulator for tangents: y_dot = x_dot W +
// x W_dot.
//
//   gather_product
//     c[c_row[m] + j] = bias[j] + sum_terms sum_r sum_i a[row[m] + run[r] + i] b[(k[r] + i) n + j]
//   outer_product
//     d[(k[r] + i) n + j] (+)= sum_terms sum_m a[row[m] + run[r] + i] g[g_row[m] + j]
//
// k[r], the start of run r's weights, is r length by default. It is given where taps outside an image are
// left out.
//
// Register blocks have R rows by V vectors. With 32 registers: 6 x 4, and 8 x 3 to 8 x 1 for narrow outputs;
// with 16 registers: 6 x 2 and 8 x 1. A single vector or row end that would remain is joined to the block
// beside it, which is then 5 x 5 or 4 x 3. The remaining rows form two blocks of nearly equal size
// (blocks.h). The last vector of a row is masked. If a sum has few products, the rows of b are kept in
// registers while the loop goes over the rows of c.
//
// Order of sums: terms, runs, i (in outer_product: terms, m) ascending, from zero or from the value in c, for
// every block shape: the bits of an element do not depend on the other elements. Because long sums round
// more, sums are split where possible: with one run (a linear layer) every kLongest elements are summed
// separately, and so are every kLongest m of an outer product.
#pragma once

#include "cpu/simd.h"

namespace maml::MAML_ISA {

/// The most products in one sum, where it can be split.
constexpr int64_t kLongest = 256;

template <class T>
struct Term {
  const T* a;
  const T* b;
};

struct Runs {
  int count;
  int64_t length;
  const int64_t* offset;            // [count]
  const int64_t* weight = nullptr;  // [count] k; null: r length
  int64_t weight_of(int r) const { return weight ? weight[r] : r * length; }
};

template <class T>
struct GatherProduct {
  Term<T> term[2];
  int terms;
  Runs runs;
  const int32_t* row;  // [m] offsets into a
  int64_t m, n;
  T* c;
  const int32_t* c_row;  // [m] offsets into c
  const T* bias;         // [n] or null
  bool add;              // start from the value in c
  bool apart = false;    // start from zero, and add the sum to the value in c
};

template <class T>
struct OuterProduct {
  Term<T> term[2];  // b is g
  int terms;
  Runs runs;
  const int32_t* row;
  const int32_t* g_row;  // [m] offsets into g; null: m n
  int64_t m, n;
  T* d;
  bool add;
};

template <class T>
void gather_product(const GatherProduct<T>& g);
template <class T>
void outer_product(const OuterProduct<T>& o);

/// out[t, j, i] = in[t, i, j]: [taps, rows, columns] -> [taps, columns, rows].
template <class T>
void transpose(int64_t taps, int64_t rows, int64_t columns, const T* in, T* out);

/// out[j] (+)= sum_m g[m n + j].
template <class T>
void column_sums(int64_t m, int64_t n, const T* g, bool add, T* out);

}  // namespace maml::MAML_ISA
