// The two products that linear layers and convolutions are made of, on rows that are gathered by offset.
//
// A convolution on a padded channels-last image reads, for output pixel m and tap row r, the elements
// a[row[m] + run[r] + i], i < length: a whole row of taps with all its channels is one contiguous run. A
// linear layer has one run of length c_in. The pair forms (two terms into one accumulator) are the tangents:
// y_dot = x_dot W + x W_dot.
//
//   gather_product   c[c_row[m] + j] = bias[j] + sum_terms sum_r sum_i a[row[m] + run[r] + i] b[(k[r] + i) n
//   + j] outer_product    d[(k[r] + i) n + j] (+)= sum_terms sum_m a[row[m] + run[r] + i] g[g_row[m] + j]
//
// Where a run's weights start, k[r], is r length unless told: taps that fall outside an image are left out.
//
// Register blocks of R rows by V vectors: 6 x 4 where there are 32 registers and 8 x 3 to 8 x 1 for narrow
// outputs, 6 x 2 and 8 x 1 where there are 16; a vector or the end of a row that would be left alone goes
// with the block beside it, 5 x 5 or 4 x 3; what is left of the rows goes in two like blocks (blocks.h). The
// last vector of a row is a masked one. Of a sum of few products the rows of b stay in registers, and the
// rows of c pass by. Summation order: terms, runs, i (terms, m) ascending, from zero or from what c holds,
// whatever the block: the bits of an element do not depend on its neighbours. Short sums, added up, round
// less: of one run (a linear layer's) every kLongest elements have a sum of their own, and so has an outer
// product's m.
#pragma once

#include "cpu/simd.h"

namespace maml::MAML_ISA {

/// Products in one sum, where it can be cut.
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
  const int64_t* weight = nullptr;  // [count] k, or null: r length
  int64_t weight_of(int r) const { return weight ? weight[r] : r * length; }
};

template <class T>
struct Gather {
  Term<T> term[2];
  int terms;
  Runs runs;
  const int32_t* row;  // [m] offsets into a
  int64_t m, n;
  T* c;
  const int32_t* c_row;  // [m] offsets into c
  const T* bias;         // [n] or null
  bool add;              // start from what c holds
  bool apart = false;    // start from zero, and add the sum to what c holds
};

template <class T>
struct Outer {
  Term<T> term[2];  // b is g
  int terms;
  Runs runs;
  const int32_t* row;
  const int32_t* g_row;  // [m] offsets into g, or null: m n
  int64_t m, n;
  T* d;
  bool add;
};

template <class T>
void gather_product(const Gather<T>& g);
template <class T>
void outer_product(const Outer<T>& o);

/// out[t, j, i] = in[t, i, j]: [taps, rows, columns] -> [taps, columns, rows].
template <class T>
void transpose(int64_t taps, int64_t rows, int64_t columns, const T* in, T* out);

/// out[j] (+)= sum_m g[m n + j].
template <class T>
void column_sums(int64_t m, int64_t n, const T* g, bool add, T* out);

}  // namespace maml::MAML_ISA
