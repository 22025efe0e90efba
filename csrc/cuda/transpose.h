// Conversion between channels first, the order of the user's images, and channels last, the order of the
// layers: a transpose of each sample's matrix, out[s, j, i] (+)= in[s, i, j].
//
// A block transposes one kTile x kTile tile through shared memory, so that its global reads and writes are
// coalesced. A row of the tile has one element more than needed, so that the threads that read a column
// access different banks. If the matrix has only a few rows or columns (an image of 3 channels), most of a
// tile would be empty; then each thread moves one element after the other, writes are coalesced, and reads
// come from a few contiguous rows. With one row or one column it is a copy, in vectors (elementwise.h).
#pragma once

#include <algorithm>

#include "cuda/elementwise.h"

namespace maml::cuda {

inline constexpr int kTile = kSmallTiles ? 8 : 32;
inline constexpr int kTileThreads = kSmallTiles ? 32 : 256;
inline constexpr int64_t kFew = kTile / 4;

struct Transpose {
  int64_t n, rows, columns;
  bool add;
};

/// Block x transposes tile (s, i, j), columns fastest. Six resident blocks: with eight, ptxas spills.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 6)
    transpose_tiles(Transpose p, const T* symbolic_in, T* symbolic_out, Deferred deferred) {
  const Memory memory = deferred.ready();
  __shared__ T tile[kTile][kTile + 1];
  const int64_t across = (p.columns + kTile - 1) / kTile, down = (p.rows + kTile - 1) / kTile;
  const int64_t block = blockIdx.x;
  const int64_t s = block / (across * down), i0 = block / across % down * kTile, j0 = block % across * kTile;
  const T* in = resolve(symbolic_in, memory, blockIdx.z) + s * p.rows * p.columns;
  T* out = resolve(symbolic_out, memory, blockIdx.z) + s * p.rows * p.columns;
  const int lane = static_cast<int>(threadIdx.x) % kTile, first = static_cast<int>(threadIdx.x) / kTile;
  for (int k = first; k < kTile; k += kTileThreads / kTile) {
    if (i0 + k < p.rows && j0 + lane < p.columns) tile[k][lane] = in[(i0 + k) * p.columns + j0 + lane];
  }
  __syncthreads();
  for (int k = first; k < kTile; k += kTileThreads / kTile) {
    if (j0 + k < p.columns && i0 + lane < p.rows)
      put(out, (j0 + k) * p.rows + i0 + lane, tile[lane][k], p.add);
  }
}

/// Element after element, numbered by Index: a division of 64 bits is a function call on a GPU.
template <class Index, class T>
__device__ __forceinline__ void move_elements(Team team, const Transpose& p, const T* in, T* out) {
  const Index rows = static_cast<Index>(p.rows), columns = static_cast<Index>(p.columns);
  const Index each = rows * columns, count = static_cast<Index>(p.n) * each;
  for (Index at = static_cast<Index>(team.first()); at < count; at += static_cast<Index>(team.step())) {
    const Index s = at / each, within = at - s * each, j = within / rows, i = within - j * rows;
    put(out, at, in[s * each + i * columns + j], p.add);
  }
}

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    transpose_elements(Transpose p, const T* symbolic_in, T* symbolic_out, Deferred deferred) {
  const Memory memory = deferred.ready();
  move_elements<int64_t>(grid_team(), p, resolve(symbolic_in, memory, blockIdx.z),
                         resolve(symbolic_out, memory, blockIdx.z));
}

/// Where there is one row or one column, nothing changes its place.
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    transpose_vectors(Transpose p, const T* symbolic_in, T* symbolic_out, Deferred deferred) {
  const Memory memory = deferred.ready();
  const T* in = resolve(symbolic_in, memory, blockIdx.z);
  T* out = resolve(symbolic_out, memory, blockIdx.z);
  const Put put{p.add};
  map_elements(
      grid_team(), p.n * p.rows * p.columns, [&](T x, T before) { return put(before, x); }, out, in,
      put.before(out));
}

/// [n, rows, columns] -> [n, columns, rows]
template <class T>
void transpose(const Launcher& launch, const char* name, const Transpose& p, const T* in, T* out) {
  if (std::min(p.rows, p.columns) == 1) {
    launch(name, transpose_vectors<T>, element_grid(p.n * p.rows * p.columns), kElementThreads, 0, p, in, out,
           launch.memory);
  } else if (std::min(p.rows, p.columns) <= kFew) {
    launch(name, transpose_elements<T>, element_grid(p.n * p.rows * p.columns), kElementThreads, 0, p, in,
           out, launch.memory);
  } else {
    const Grid tiles{p.n * blocks_for(p.rows, kTile) * blocks_for(p.columns, kTile)};
    launch(name, transpose_tiles<T>, tiles, kTileThreads, 0, p, in, out, launch.memory);
  }
}

}  // namespace maml::cuda
