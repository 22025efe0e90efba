// Rows of a product by 2 x 2 windows: the order in which the four pixels of a window are four sums of one
// thread (arithmetic.h), so that a max-pool needs no other thread. A thread's rows 4 g .. 4 g + 3 are
// neighbours where a vector has four elements; where it has two, they are two pairs eight rows apart.
#pragma once

#include "cuda/run/platform.h"

namespace maml::cuda {

struct WindowRow {
  int window, member;  // member: 2 row + column within the window
};

/// Row `row` of the product; `vector`: elements of one.
__host__ __device__ constexpr WindowRow window_row(int vector, int row) {
  if (vector == 4) return {row >> 2, row & 3};
  return {(row >> 4 << 2) | (row >> 1 & 3), (row >> 2 & 2) | (row & 1)};
}

/// Rows of so many windows: whole groups of four windows, the last with rows that are none's.
constexpr int64_t window_rows(int64_t windows) { return (windows + 3) / 4 * 16; }

}  // namespace maml::cuda
