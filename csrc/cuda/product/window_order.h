// An order of a product's rows in which the four pixels of a 2 x 2 window are four sums of one thread
// (arithmetic.h): a max-pool then needs no exchange between threads. A thread's rows 4 g .. 4 g + 3 are one
// window where a vector has four elements. Where it has two, they are two pairs, eight rows apart.
#pragma once

#include "cuda/run/platform.h"

namespace maml::cuda {

struct WindowRow {
  int window, member;  // member: 2 row + column within the window
};

/// The window and its pixel in row `row` of the product; `vector`: how many elements a vector has.
__host__ __device__ constexpr WindowRow window_row(int vector, int row) {
  if (vector == 4) return {row >> 2, row & 3};
  return {(row >> 4 << 2) | (row >> 1 & 3), (row >> 2 & 2) | (row & 1)};
}

/// The rows that `windows` windows take: whole groups of four windows. The rows of missing windows are empty.
constexpr int64_t window_rows(int64_t windows) { return (windows + 3) / 4 * 16; }

}  // namespace maml::cuda
