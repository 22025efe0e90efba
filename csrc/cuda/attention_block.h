// One block of the attention's kernels (attention.cu): tiles of scores, weights and cotangents in shared
// memory and registers.
//
// Threads: kThreads; thread t has rows 2 (t / kLanes), + 1, and columns 4 (t % kLanes), ..., + 3 of a tile. A
// row belongs to kLanes neighbours of a warp. Shared memory: four tiles. Products are plain multiply-adds,
// whatever the precision asked for. Every sum has one order: over columns, then over tiles, then over the
// batch.
#pragma once

#include <limits>

#include "cuda/implement.h"
#include "cuda/strided.h"

namespace maml::cuda::attention {

constexpr int kSide = kSmallTiles ? 4 : 32;             // of a tile
constexpr int kChunks = 2, kColumns = kChunks * kSide;  // of the result, in a block's registers
constexpr int kLanes = kSide / 4, kThreads = kSide / 2 * kLanes;
constexpr int kPitch = kSide + 4;  // a multiple of 4: four neighbours are one load

/// Blocks that a multiprocessor holds, with the registers that a thread needs. Without a number, nvcc spills.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 2 : 3;

enum class Pass { forward, backward, forward_tangent, backward_tangent };
enum Operand : int { kQ, kK, kV, kBias, kY, kSaved, kOut, kOperands };  // kSaved: the row of m, r and E

/// A matrix [i, j] in memory, at at + i row + j column.
template <class T>
struct Matrix {
  T* at;
  int64_t row, column;
};

/// The tensors of a launch, as symbolic addresses. x_dot, g and y_dot of a backward tangent may be absent,
/// then together, and each x_dot by itself.
template <class T>
struct Attend {
  Split<kOperands> batch;                     // outer: the axes that the result has
  int64_t row[kOperands], column[kOperands];  // the strides of the matrices
  int queries, keys, depth, width;
  int column_blocks;  // of the result
  T scale;
  bool empty_is_zero;
  const T *x[4], *x_dot[4];
  T *y, *y_dot;
  const T *g, *g_dot;
  T *saved, *saved_dot;
  T* out;
  bool add;  // to what out holds
};

template <class T>
struct Tile {
  T at[kSide][kPitch];
};
template <class T>
struct Shared {
  Tile<T> a, b, first, second;
};

/// A thread's elements of a tile.
template <class T>
struct Part {
  T at[2][4] = {};
};

template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
  T of[4];
};
template <class T>
struct alignas(2 * sizeof(T)) Two {
  T of[2];
};

/// One block: its place, its registers, and the tensors at one index of the batch.
template <class T>
class Block {
 public:
  __device__ __forceinline__ Block(const Attend<T>& p, const Memory& memory, int64_t task, Shared<T>& shared)
      : p_(p), memory_(memory), task_(task), shared_(shared) {
    const int thread = static_cast<int>(threadIdx.x);
    row_ = 2 * (thread / kLanes), column_ = 4 * (thread % kLanes);
  }

  __device__ __forceinline__ void at_index(const Offsets<kOperands>& offsets) { offset_ = offsets; }

  /// The tensors of a task at the index of the batch; null for null.
  template <class X>
  __device__ __forceinline__ Matrix<X> matrix(X* symbolic, Operand o) const {
    X* const start = resolve(symbolic, memory_, task_);
    return {start ? start + offset_.of[o] : nullptr, p_.row[o], p_.column[o]};
  }
  __device__ __forceinline__ int rows_of(Operand o) const {
    return o == kK || o == kV ? p_.keys : p_.queries;
  }
  __device__ __forceinline__ int columns_of(Operand o) const {
    return o == kQ || o == kK ? p_.depth : p_.width;
  }

  /// to [kSide, kSide] = elements [i0, ...) x [j0, ...) of a matrix of rows x columns, 0 outside; transposed
  /// if `turned`. Neighbours read neighbours of a row.
  __device__ __forceinline__ void fill(Tile<T>& to, const Matrix<const T>& from, int i0, int rows, int j0,
                                       int columns, bool turned) const {
    for (int e = static_cast<int>(threadIdx.x); e < kSide * kSide; e += kThreads) {
      const int i = e / kSide, j = e % kSide;
      const bool inside = i0 + i < rows && j0 + j < columns;
      const T value = inside ? from.at[(i0 + i) * from.row + (j0 + j) * from.column] : T(0);
      (turned ? to.at[j][i] : to.at[i][j]) = value;
    }
  }
  /// c += a' b over the first index of both tiles.
  __device__ __forceinline__ void multiply(const Tile<T>& a, const Tile<T>& b, Part<T>& c) const {
#pragma unroll 4
    for (int k = 0; k < kSide; ++k) {
      const Two<T> x = *reinterpret_cast<const Two<T>*>(&a.at[k][row_]);
      const Four<T> z = *reinterpret_cast<const Four<T>*>(&b.at[k][column_]);
      for (int r = 0; r < 2; ++r)
        for (int s = 0; s < 4; ++s) c.at[r][s] += x.of[r] * z.of[s];
    }
  }
  /// c [queries, keys] += a b' for rows of a and b from i0 and j0 on, over all their columns. Null: zero.
  __device__ __forceinline__ void rows_times_rows(Operand oa, const T* a, int i0, Operand ob, const T* b,
                                                  int j0, Part<T>& c) {
    if (!a || !b) return;
    const Matrix<const T> of_a = matrix(a, oa), of_b = matrix(b, ob);
    const int columns = columns_of(oa);
    for (int d = 0; d < columns; d += kSide) {
      __syncthreads();
      fill(shared_.a, of_a, i0, rows_of(oa), d, columns, true);
      fill(shared_.b, of_b, j0, rows_of(ob), d, columns, true);
      __syncthreads();
      multiply(shared_.a, shared_.b, c);
    }
  }

  /// The scores, or their tangent; -infinity at keys that do not exist.
  __device__ __forceinline__ Part<T> scores(int i0, int j0) {
    Part<T> s;
    rows_times_rows(kQ, p_.x[kQ], i0, kK, p_.x[kK], j0, s);
    add_bias(p_.x[kBias], i0, j0, s);
    for (int r = 0; r < 2; ++r)
      for (int c = 0; c < 4; ++c)
        if (j0 + column_ + c >= p_.keys) s.at[r][c] = -std::numeric_limits<T>::infinity();
    return s;
  }
  __device__ __forceinline__ Part<T> scores_dot(int i0, int j0) {
    Part<T> s;
    rows_times_rows(kQ, p_.x_dot[kQ], i0, kK, p_.x[kK], j0, s);
    rows_times_rows(kQ, p_.x[kQ], i0, kK, p_.x_dot[kK], j0, s);
    add_bias(p_.x_dot[kBias], i0, j0, s);
    return s;
  }
  /// g v', or its tangent.
  __device__ __forceinline__ Part<T> weights_gradient(int i0, int j0) {
    Part<T> dp;
    rows_times_rows(kY, p_.g, i0, kV, p_.x[kV], j0, dp);
    return dp;
  }
  __device__ __forceinline__ Part<T> weights_gradient_dot(int i0, int j0) {
    Part<T> dp;
    rows_times_rows(kY, p_.g_dot, i0, kV, p_.x[kV], j0, dp);
    rows_times_rows(kY, p_.g, i0, kV, p_.x_dot[kV], j0, dp);
    return dp;
  }

  /// What the rows of a tile of queries need: m, r, E, D and R{D}.
  struct Row {
    T largest = 0, factor = 0, shift = 0, mean = 0, mean_dot = 0;
  };
  __device__ __forceinline__ void load_rows(int i0, bool tangent, bool of_scores) {
    const T* const saved = resolve(p_.saved, memory_, task_);
    const T* const saved_dot = resolve(p_.saved_dot, memory_, task_);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Row row;
      const int i = i0 + row_ + r;
      const int64_t at = offset_.of[kSaved] + i;
      if (i < p_.queries) row.largest = saved[2 * at], row.factor = saved[2 * at + 1];
      if (i < p_.queries && tangent) row.shift = saved_dot[at];
      if (of_scores) {
        row.mean = row_product(p_.g, p_.y, i);
        row.mean_dot = row_product(p_.g_dot, p_.y, i) + row_product(p_.g, p_.y_dot, i);
      }
      of_row_[r] = row;
    }
  }

  /// The weights p of a tile, from its scores.
  __device__ __forceinline__ Part<T> weights(int i0, int j0) {
    Part<T> p = scores(i0, j0);
    for (int r = 0; r < 2; ++r)
      for (int c = 0; c < 4; ++c) p.at[r][c] = std::exp(p.at[r][c] - of_row_[r].largest) * of_row_[r].factor;
    return p;
  }
  __device__ __forceinline__ Part<T> times(const Part<T>& p, Part<T> other,
                                           bool dot) const {  // p (other - a mean of the row)
    for (int r = 0; r < 2; ++r)
      for (int c = 0; c < 4; ++c)
        other.at[r][c] = p.at[r][c] * (other.at[r][c] - (dot ? of_row_[r].mean_dot : of_row_[r].mean));
    return other;
  }

  /// Tiles of what the result is a product of: `first` with values, and `second` with their tangents.
  struct Tiles {
    Part<T> first, second;
  };
  /// backward: dS; backward_tangent: R{dS} and dS.
  template <Pass pass>
  __device__ __forceinline__ Tiles cotangents_of_scores(int i0, int j0) {
    Tiles t;
    const Part<T> p = weights(i0, j0);
    if constexpr (pass == Pass::backward) {
      t.first = times(p, weights_gradient(i0, j0), false);
    } else {
      t.first = times(p, weights_gradient_dot(i0, j0), true);
      if (p_.g) {
        t.second = times(p, weights_gradient(i0, j0), false);
        const Part<T> s = scores_dot(i0, j0);
        for (int r = 0; r < 2; ++r)
          for (int c = 0; c < 4; ++c)  // Rp (dp - D) = (Rs - E) ds
            t.first.at[r][c] += (s.at[r][c] - of_row_[r].shift) * t.second.at[r][c];
      }
    }
    return t;
  }
  /// backward: P; backward_tangent: Rg goes with P and g with Rp.
  template <Pass pass>
  __device__ __forceinline__ Tiles weights_of_values(int i0, int j0) {
    Tiles t;
    t.first = weights(i0, j0);
    if (pass == Pass::backward_tangent && p_.g) {
      const Part<T> s = scores_dot(i0, j0);
      for (int r = 0; r < 2; ++r)
        for (int c = 0; c < 4; ++c) t.second.at[r][c] = t.first.at[r][c] * (s.at[r][c] - of_row_[r].shift);
    }
    return t;
  }

  /// to [i, j] or, turned, [j, i] = this thread's part of a tile of queries and keys.
  __device__ __forceinline__ void put(Tile<T>& to, const Part<T>& c, bool turned) const {
    for (int r = 0; r < 2; ++r)
      for (int s = 0; s < 4; ++s)
        (turned ? to.at[column_ + s][row_ + r] : to.at[row_ + r][column_ + s]) = c.at[r][s];
  }
  /// sums += tile' x for the rows of x from k0 on: tile [k, rows of the result].
  __device__ __forceinline__ void accumulate(const Tile<T>& tile, Operand o, const T* x, int k0,
                                             int first_column) {
    if (!x) return;
    const Matrix<const T> of_x = matrix(x, o);
    const int columns = columns_of(o == kY ? kV : o);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      __syncthreads();
      fill(shared_.b, of_x, k0, rows_of(o), first_column + c * kSide, columns, false);
      __syncthreads();
      multiply(tile, shared_.b, sums[c]);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void accumulate(const Tiles& t, bool turned, Operand o, const T* x,
                                             const T* x_dot, int k0, int first_column) {
    __syncthreads();
    put(shared_.first, t.first, turned);
    if (x_dot) put(shared_.second, t.second, turned);
    accumulate(shared_.first, o, x, k0, first_column);
    accumulate(shared_.second, o, x_dot, k0, first_column);
  }

  /// A sum or the largest over the lanes that share a row.
  template <class F>
  __device__ __forceinline__ T over_row(T value, F combine) const {
    for (int lanes = 1; lanes < kLanes; lanes *= 2)
      value = combine(value, __shfl_xor_sync(0xffffffff, value, lanes));
    return value;
  }
  __device__ __forceinline__ T sum_of_row(const T (&values)[4]) const {
    return over_row((values[0] + values[1]) + (values[2] + values[3]), [](T a, T b) { return a + b; });
  }

  /// y and the rows' m and r: the softmax with a running maximum.
  __device__ __forceinline__ void forward(int i0, int first_column) {
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    T largest[2] = {kNone, kNone};
    double sum[2] = {};
    for (int j0 = 0; j0 < p_.keys; j0 += kSide) {
      Tiles t;
      t.first = scores(i0, j0);
      for (int r = 0; r < 2; ++r) {
        T(&s)[4] = t.first.at[r];
        T most = largest[r];
        for (int c = 0; c < 4; ++c) most = s[c] > most ? s[c] : most;
        most = over_row(most, [](T a, T b) { return b > a ? b : a; });
        const T shrinks = most == largest[r] ? T(1) : std::exp(largest[r] - most);
        // Where a row has had nothing but -infinity so far, and no NaN, its weights are 0 so far.
        for (int c = 0; c < 4; ++c) s[c] = s[c] == kNone && most == kNone ? T(0) : std::exp(s[c] - most);
        largest[r] = most;
        sum[r] = sum[r] * static_cast<double>(shrinks) + static_cast<double>(sum_of_row(s));
        for (int k = 0; k < kChunks; ++k)
          for (int c = 0; c < 4; ++c) sums[k].at[r][c] *= shrinks;
      }
      accumulate(t, true, kV, p_.x[kV], nullptr, j0, first_column);
    }
    T* const saved = resolve(p_.saved, memory_, task_);
    for (int r = 0; r < 2; ++r) {
      const bool zero = p_.empty_is_zero && sum[r] == 0;
      const T factor = zero ? T(0) : static_cast<T>(1 / sum[r]);
      for (int k = 0; k < kChunks; ++k)
        for (int c = 0; c < 4; ++c) sums[k].at[r][c] *= factor;
      const int i = i0 + row_ + r;
      if (first_column > 0 || column_ > 0 || i >= p_.queries) continue;
      T* const of_row = saved + 2 * (offset_.of[kSaved] + i);
      of_row[0] = zero ? T(0) : largest[r], of_row[1] = factor;
    }
  }

  /// y_dot and the rows' E.
  __device__ __forceinline__ void forward_tangent(int i0, int first_column) {
    load_rows(i0, false, false);
    double shift[2] = {};
    for (int j0 = 0; j0 < p_.keys; j0 += kSide) {
      Tiles t;
      t.second = weights(i0, j0);
      t.first = scores_dot(i0, j0);
      for (int r = 0; r < 2; ++r) {
        for (int c = 0; c < 4; ++c) t.first.at[r][c] *= t.second.at[r][c];
        shift[r] += static_cast<double>(sum_of_row(t.first.at[r]));
      }
      accumulate(t, true, kV, p_.x[kV], p_.x_dot[kV], j0, first_column);
    }
    T* const saved_dot = resolve(p_.saved_dot, memory_, task_);
    const Matrix<const T> y = matrix(static_cast<const T*>(p_.y), kY);
    for (int r = 0; r < 2; ++r) {
      const int i = i0 + row_ + r;
      if (i >= p_.queries) continue;
      const T mean = static_cast<T>(shift[r]);
      for (int k = 0; k < kChunks; ++k)
        for (int c = 0; c < 4; ++c) {
          const int j = first_column + k * kSide + column_ + c;
          if (j < p_.width) sums[k].at[r][c] -= mean * y.at[i * y.row + j * y.column];
        }
      if (first_column == 0 && column_ == 0) saved_dot[offset_.of[kSaved] + i] = mean;
    }
  }

  /// out (+)= scale times the sums: rows [i0, ...) of `rows`, columns [first_column, ...) of `columns`.
  __device__ __forceinline__ void write(T scale, int i0, int rows, int first_column, int columns) const {
    const Matrix<T> out = matrix(p_.out, kOut);
    for (int r = 0; r < 2; ++r) {
      for (int k = 0; k < kChunks; ++k) {
        for (int c = 0; c < 4; ++c) {
          const int i = i0 + row_ + r, j = first_column + k * kSide + column_ + c;
          if (i >= rows || j >= columns) continue;
          cuda::put(out.at, i * out.row + j * out.column, scale * sums[k].at[r][c], p_.add);
        }
      }
    }
  }

  Part<T> sums[kChunks];  // of the result

 private:
  __device__ __forceinline__ void add_bias(const T* symbolic, int i0, int j0, Part<T>& s) const {
    const Matrix<const T> bias = matrix(symbolic, kBias);
    for (int r = 0; r < 2; ++r) {
      for (int c = 0; c < 4; ++c) {
        s.at[r][c] *= p_.scale;
        const int i = i0 + row_ + r, j = j0 + column_ + c;
        if (bias.at && i < p_.queries && j < p_.keys) s.at[r][c] += bias.at[i * bias.row + j * bias.column];
      }
    }
  }
  /// <a, b> of row i, over the width; 0 where one is absent.
  __device__ __forceinline__ T row_product(const T* symbolic_a, const T* symbolic_b, int i) const {
    T sum = 0;
    if (symbolic_a && symbolic_b && i < p_.queries) {
      const Matrix<const T> a = matrix(symbolic_a, kY), b = matrix(symbolic_b, kY);
      for (int j = column_ / 4; j < p_.width; j += kLanes)
        sum += a.at[i * a.row + j * a.column] * b.at[i * b.row + j * b.column];
    }
    return over_row(sum, [](T x, T z) { return x + z; });
  }

  const Attend<T>& p_;
  const Memory& memory_;
  const int64_t task_;
  Shared<T>& shared_;
  Offsets<kOperands> offset_{};
  Row of_row_[2];
  int row_, column_;
};

}  // namespace maml::cuda::attention
