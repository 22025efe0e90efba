// The mean over the whole image and its adjoint, by a team of one block (run/in_block.h): some lanes of a
// warp share an output, and a fixed tree of shuffles sums over them. mean_pool.cu has the kernels for large
// images.
#pragma once

#include "cuda/elementwise.h"
#include "cuda/rows.h"

namespace maml::cuda {

template <class T>
__device__ __forceinline__ void mean_of_all(Team team, const Layer& l, const T* x, T* y) {
  const int64_t c = l.in.c, pixels = l.in.h * l.in.w;
  each_row(team, l.n * c, pixels, [&](int64_t output, int lane, int width, bool exists) {
    const int64_t sample = static_cast<unsigned>(output) / static_cast<unsigned>(c);
    const T* image = x + sample * pixels * c + (output - sample * c);
    T sum = 0;
    for (int64_t pixel = exists ? lane : pixels; pixel < pixels; pixel += width) sum += image[pixel * c];
    sum = row_sum(sum, width);
    if (exists && lane == 0) y[output] = sum * (1 / static_cast<T>(pixels));
  });
}

template <class T>
__device__ __forceinline__ void spread_over_all(Team team, const Layer& l, const T* g, bool add, T* grad_x) {
  const int c = static_cast<int>(l.in.c), each = static_cast<int>(l.in.h * l.in.w) * c;
  const int count = static_cast<int>(l.n) * each, step = static_cast<int>(team.step());
  const T weight = 1 / static_cast<T>(l.in.h * l.in.w);
  for (int at = static_cast<int>(team.first()); at < count; at += step) {
    put(grad_x, at, weight * g[at / each * c + at % c], add);
  }
}

}  // namespace maml::cuda
