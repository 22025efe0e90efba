// The tiles of a small multilayer perceptron's products, and what becomes of a parameter's gradient. A phase
// deals its tiles out to the threads of a block: tile i to thread i, i + kMlpThreads, .. Operands are offsets
// into the block's shared memory.
#pragma once

#include "cuda/rows.h"
#include "cuda/run/small_mlp.h"

namespace maml::cuda {

inline constexpr int kMlpThreads = kSmallTiles ? 32 : 256;
inline constexpr int kTileRows = 2;

/// Writes C consecutive values from column j of a padded row; what is behind the row's values stays.
template <int C, class T>
__device__ __forceinline__ void put_columns(T* row, int j, int columns, const T (&values)[C]) {
  if constexpr (C > 1) {
    if (j + C <= columns) return store(row + j, values);
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (j + c < columns) row[j + c] = values[c];
  }
}

inline constexpr int kNone = -1;  // in place of an offset

/// A sum of products a b; the first comes first. With `second_a` kNone there is only one.
struct Terms {
  int first_a, first_b, second_a, second_b;
};

/// The two halves of a warp compute the same 16 tiles, each one part of the inner index: of two terms one
/// each; of a single term the first or the last `depth` vectors, from vector `from` on.
struct Part {
  int a, b, from, depth;
  __device__ __forceinline__ Part(const Terms& terms, int half, int vectors) {
    const bool splits = terms.second_a == kNone, second_term = half && !splits;
    const int first = (vectors + 1) / 2;
    a = second_term ? terms.second_a : terms.first_a, b = second_term ? terms.second_b : terms.first_b;
    from = splits && half ? first : 0;
    depth = !splits ? vectors : half ? vectors - first : first;
  }
};
inline constexpr int kHalfWarp = kWarp / 2;

/// The sums of both halves, in both.
template <int R, int C, class T>
__device__ __forceinline__ void add_halves(T (&sum)[R][C]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < C; ++c) sum[r][c] += __shfl_xor_sync(kWholeWarp, sum[r][c], kHalfWarp);
  }
}

/// What becomes of a gradient g of the parameters: value = from - g, from - rate g, or g where there is no
/// `from`. It goes to `to`, and rate value to `direction`, both in padded parameters; or without them to the
/// task's packed result.
template <class T>
struct Update {
  int from;
  bool times_rate;
  int to, direction;
  T* result;

  /// g: a tile from row i and column j of a layer's weight. Where it lies on padding it is zero, and so is
  /// what it is added to: the padding of parameters stays zero.
  __device__ __forceinline__ void operator()(T* memory, const MlpLayer& l, int i, int j,
                                             const T (&g)[kVector<T>][kVector<T>]) const {
    constexpr int V = kVector<T>;
    const T weight_rate = static_cast<T>(l.weight_rate), bias_rate = static_cast<T>(l.bias_rate);
    const int at = l.weight + i * l.out_stride + j;
#pragma unroll
    for (int r = 0; r < V; ++r) {
      const T rate = i + r == l.in ? bias_rate : weight_rate;
      const int here = at + r * l.out_stride;
      Vector<T> value{};
      if (from != kNone) value = load(memory + from + here);
      const T factor = times_rate ? -rate : from != kNone ? T(-1) : T(1);
#pragma unroll
      for (int c = 0; c < V; ++c) value.element[c] += factor * g[r][c];
      if (to == kNone) {
        give(l, i + r, j, value);
        continue;
      }
      store(memory + to + here, value.element);
      if (direction == kNone) continue;
#pragma unroll
      for (int c = 0; c < V; ++c) value.element[c] *= rate;
      store(memory + direction + here, value.element);
    }
  }

 private:
  __device__ __forceinline__ void give(const MlpLayer& l, int i, int j, const Vector<T>& value) const {
    if (i >= l.rows()) return;
    T* packed = result + (i == l.in ? l.bias_result : l.weight_result + i * l.out);
#pragma unroll
    for (int c = 0; c < kVector<T>; ++c) {
      if (j + c < l.out) packed[j + c] = value.element[c];
    }
  }
};

/// put(row, j, z) for every tile of z [n, out], the sum of the terms x w: R rows, C columns from j. Rows are
/// dealt out one by one, so that consecutive lanes have consecutive rows. Whole warps call.
template <int R, int C, class T, class Put>
__device__ __forceinline__ void forward_tiles(const T* memory, const MlpLayer& l, int n, const Terms& terms,
                                              Put put) {
  const int row_tiles = (n + R - 1) / R, columns = C == 1 ? l.out : l.out_vectors;
  const int thread = static_cast<int>(threadIdx.x), half = thread % kWarp / kHalfWarp;
  const int tiles = row_tiles * columns;
#pragma unroll 1
  for (int first = thread / kWarp * kHalfWarp; first < tiles; first += kMlpThreads / 2) {
    const int wanted = first + thread % kHalfWarp, i = std::min(wanted, tiles - 1);
    const int tile = C == 1 ? l.by_out(i) : l.by_out_vectors(i), j = (i - tile * columns) * C;
    const Part part(terms, half, l.depth);
    const T* x[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      x[r] = memory + part.a + std::min(tile + r * row_tiles, n - 1) * l.in_stride + part.from * kVector<T>;
    }
    T sum[R][C] = {};
    add_forward_product(x, memory + part.b + part.from * kVector<T> * l.out_stride + j, l.out_stride,
                        part.depth, sum);
    add_halves(sum);
    const int row = tile + half * row_tiles;  // each half of the warp finishes one row
    if (half >= R || wanted >= tiles || row >= n) continue;
    T z[C];
#pragma unroll
    for (int c = 0; c < C; ++c) z[c] = half ? sum[R - 1][c] : sum[0][c];
    put(row, j, z);
  }
}

/// put(at, e) for the elements of one tile of e [n, in], the sum of the terms g w^T. Rows and columns are
/// dealt out one by one: consecutive lanes read consecutive rows of w. Whole warps call; `i` counts threads.
template <class T, class Put>
__device__ __forceinline__ void input_tile(const T* memory, const MlpLayer& l, int n, int i,
                                           const Terms& terms, Put put) {
  constexpr int V = kVector<T>;
  const int row_tiles = (n + kTileRows - 1) / kTileRows, columns = l.in_vectors, tiles = row_tiles * columns;
  const int half = i % kWarp / kHalfWarp, wanted = i / kWarp * kHalfWarp + i % kHalfWarp;
  const int tile = l.by_in_vectors(std::min(wanted, tiles - 1));
  const int column = std::min(wanted, tiles - 1) - tile * columns;
  const Part part(terms, half, l.out_vectors);
  const T *g[kTileRows], *w[V];
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    g[r] = memory + part.a + std::min(tile + r * row_tiles, n - 1) * l.out_stride + part.from * V;
  }
#pragma unroll
  for (int c = 0; c < V; ++c) w[c] = memory + part.b + (column + c * columns) * l.out_stride + part.from * V;
  T sum[kTileRows][V] = {};
  add_input_product(g, w, part.depth, sum);
  add_halves(sum);
  const int row = tile + half * row_tiles;
#pragma unroll
  for (int c = 0; c < V; ++c) {
    if (wanted < tiles && row < n && column + c * columns < l.in) {
      put(row * l.in_stride + column + c * columns, half ? sum[1][c] : sum[0][c]);
    }
  }
}

/// One tile of the gradient of the weight and its bias, the sum of the terms x^T g.
template <class T>
__device__ __forceinline__ void weight_tile(T* memory, const MlpLayer& l, int n, int tile, const Terms& terms,
                                            const Update<T>& update) {
  constexpr int V = kVector<T>;
  const int row = l.by_out_vectors(tile), i = row * V, j = (tile - row * l.out_vectors) * V;
  T sum[V][V] = {};
  int a = terms.first_a, b = terms.first_b;
#pragma unroll 1
  for (int t = terms.second_a == kNone ? 1 : 0; t < 2; ++t) {
    add_weight_product(memory + a + i, l.in_stride, memory + b + j, l.out_stride, n, sum);
    a = terms.second_a, b = terms.second_b;
  }
  update(memory, l, i, j, sum);
}

/// The threads of a layer's backward phase. Input and weight gradients have warps of their own.
struct BackwardThreads {
  int inputs, count;
  __host__ __device__ BackwardThreads(const MlpLayer& l, bool has_before, int n) {
    const int input_tiles = has_before ? (n + kTileRows - 1) / kTileRows * l.in_vectors : 0;
    inputs = (input_tiles + kHalfWarp - 1) / kHalfWarp * kWarp;
    count = inputs + l.depth * l.out_vectors;
  }
};

}  // namespace maml::cuda
