// Matrices within strided operands: copied to dense ones, also turned, and added to from dense ones.
#pragma once

#include <algorithm>

#include "cpu/simd.h"
#include "cpu/strided.h"

namespace maml::MAML_ISA {

/// A matrix within an operand; null where the operand is zero, or not wanted.
template <class T>
struct Matrix {
  T* at = nullptr;
  int64_t row = 0, column = 0;
  T* operator[](int64_t i) const { return at + i * row; }
};

/// to += factor from, for a dense matrix. Elements of `to` may be one.
template <class T>
void add(const Matrix<T>& to, int64_t rows, int64_t columns, const T* from, T factor) {
  for (int64_t i = 0; i < rows; ++i) {
    put_row(columns, to[i], to.column, true, [=](int64_t j) { return factor * from[i * columns + j]; });
  }
}

/// to = factor from as a dense matrix [rows, columns].
template <class T>
void pack(const Matrix<const T>& from, int64_t rows, int64_t columns, T factor, T* to) {
  for (int64_t i = 0; i < rows; ++i) {
    with_stride(from.column, [&](auto step) {
      const T* at = from[i];
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) to[i * columns + j] = factor * at[j * step];
    });
  }
}

/// The same as its transpose [columns, rows].
template <class T>
void pack_turned(const Matrix<const T>& from, int64_t rows, int64_t columns, T factor, T* to) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t i = 0; i < rows; i += W) {
    const int64_t high = std::min(W, rows - i);
    for (int64_t j = 0; j < columns; j += W) {
      const int64_t wide = std::min(W, columns - j);
      T* const block = to + j * rows + i;
      if (from.column == 1) {
        transpose_block(high, wide, from[i] + j, from.row, block, rows);
        continue;
      }
      for (int64_t c = 0; c < wide; ++c) {
        for (int64_t r = 0; r < high; ++r) block[c * rows + r] = from[i + r][(j + c) * from.column];
      }
    }
  }
  if (factor == 1) return;
#pragma omp simd
  for (int64_t i = 0; i < rows * columns; ++i) to[i] *= factor;
}

}  // namespace maml::MAML_ISA
