// Operations on strided operands, of which the layers on tensors of any shape are made (layers/loops.h):
//
//   assign      to[.] = factor from[.]
//   accumulate  to[.] += factor from[.], summed over the axes along which `to` has stride 0
//
// Both go over a Nest, whose axes are sorted such that `to` is written in its own order, and joined where
// they are one for all operands. The innermost loop is vectorised where strides are 1 or 0. A sum of many
// elements is split into blocks, which rounds less. Threads share the elements of `to` where the loops come
// to each of them once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <utility>

#include "cpu/run/share.h"
#include "cpu/simd.h"
#include "layers/loops.h"

namespace maml::MAML_ISA {

/// Nested loops over M operands: the axes with more than one step, and a stride for each operand.
template <int M>
struct Nest {
  int axes = 0;
  int64_t size[kMostAxes], stride[M][kMostAxes];

  void append(int64_t steps, const int64_t (&strides)[M]) {
    if (steps == 1) return;
    size[axes] = steps;
    for (int m = 0; m < M; ++m) stride[m][axes] = strides[m];
    ++axes;
  }
  int64_t iterations(int first, int last) const {
    int64_t count = 1;
    for (int a = first; a < last; ++a) count *= size[a];
    return count;
  }
  int64_t iterations() const { return iterations(0, axes); }
  /// Whether axis a and the next one are one axis with more steps.
  bool joins(int a) const {
    for (int m = 0; m < M; ++m) {
      if (stride[m][a] != stride[m][a + 1] * size[a + 1]) return false;
    }
    return true;
  }
  /// Joins axes where possible.
  void join() {
    for (int a = axes - 2; a >= 0; --a) {
      if (!joins(a)) continue;
      size[a] *= size[a + 1];
      for (int m = 0; m < M; ++m) stride[m][a] = stride[m][a + 1];
      --axes;
      for (int b = a + 1; b < axes; ++b) {
        size[b] = size[b + 1];
        for (int m = 0; m < M; ++m) stride[m][b] = stride[m][b + 1];
      }
    }
  }
  /// Sorts the axes by falling stride of the first operand, then of the second.
  void sort() {
    const auto before = [&](int a, int b) {
      for (int m = 0; m < M; ++m) {
        const int64_t of_a = std::abs(stride[m][a]), of_b = std::abs(stride[m][b]);
        if (of_a != of_b) return of_a > of_b;
      }
      return false;
    };
    for (int a = 1; a < axes; ++a) {
      for (int b = a; b > 0 && before(b, b - 1); --b) {
        std::swap(size[b], size[b - 1]);
        for (int m = 0; m < M; ++m) std::swap(stride[m][b], stride[m][b - 1]);
      }
    }
  }
};

/// The loops of a layer for n samples over some of its operands, in the order of the layer.
template <int M>
Nest<M> nest_of(const Loops& loops, int64_t n, const View* const (&views)[M]) {
  Nest<M> nest;
  for (int a = 0; a < loops.axes; ++a) {
    int64_t strides[M];
    for (int m = 0; m < M; ++m) strides[m] = views[m]->stride[a];
    nest.append(extent(loops, a, n), strides);
  }
  return nest;
}

/// The positions of the operands as the loops over the axes [first, last) go on from iteration `start`.
template <int M>
class Odometer {
 public:
  Odometer(const Nest<M>& nest, int first, int last, int64_t start = 0)
      : nest_(nest), first_(first), last_(last) {
    for (int a = last - 1; a >= first; --a) {
      index_[a] = start % nest.size[a];
      start /= nest.size[a];
      for (int m = 0; m < M; ++m) at_[m] += index_[a] * nest.stride[m][a];
    }
  }
  int64_t operator[](int m) const { return at_[m]; }
  void next() {
    for (int a = last_ - 1; a >= first_; --a) {
      for (int m = 0; m < M; ++m) at_[m] += nest_.stride[m][a];
      if (++index_[a] < nest_.size[a]) return;
      index_[a] = 0;
      for (int m = 0; m < M; ++m) at_[m] -= nest_.size[a] * nest_.stride[m][a];
    }
  }

 private:
  const Nest<M>& nest_;
  int first_, last_;
  int64_t index_[kMostAxes], at_[M] = {};
};

/// Whether loops with these strides come to no element of an operand twice; a sufficient condition.
template <int M>
bool injective(const Nest<M>& nest, int operand = 0) {
  Nest<1> own;
  for (int a = 0; a < nest.axes; ++a) own.append(nest.size[a], {nest.stride[operand][a]});
  own.sort();
  int64_t reach = 0;
  for (int a = own.axes - 1; a >= 0; --a) {
    const int64_t stride = std::abs(own.stride[0][a]);
    if (stride <= reach) return false;
    reach += (own.size[a] - 1) * stride;
  }
  return true;
}

/// Whether the loops over the axes that an operand has come to each of its elements, to each once.
inline bool covers(const Loops& loops, int64_t n, const View& view) {
  if (view.whole) return true;
  Nest<1> own;
  for (int a = 0; a < loops.axes; ++a) {
    if (view.stride[a] != 0) own.append(extent(loops, a, n), {view.stride[a]});
  }
  return own.iterations() == elements(view, n) && injective(own);
}

/// f(stride) with a compile-time 1 or 0 where the stride is that.
template <class F>
inline void with_stride(int64_t stride, F f) {
  if (stride == 1) {
    f(std::integral_constant<int64_t, 1>());
  } else if (stride == 0) {
    f(std::integral_constant<int64_t, 0>());
  } else {
    f(stride);
  }
}

/// to[i] (+)= value(i) along one axis. A stride of 0: the values are added up.
template <class T, class F>
inline void put_row(int64_t count, T* to, int64_t stride, bool add, F value) {
  if (stride == 0) {
    T sum = add ? *to : T(0);
    for (int64_t i = 0; i < count; ++i) sum += value(i);
    *to = sum;
    return;
  }
  with_stride(stride, [&](auto step) {
    if (add) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) to[i * step] += value(i);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) to[i * step] = value(i);
    }
  });
}

/// The most elements in one sum.
constexpr int64_t kSumBlock = 256;

/// The sum of term(i), i < count, in blocks.
template <class T, class F>
inline T sum_of(int64_t count, F term) {
  double total = 0;
  for (int64_t start = 0; start < count; start += kSumBlock) {
    const int64_t end = std::min(count, start + kSumBlock);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; ++i) sum += term(i);
    total += static_cast<double>(sum);
  }
  return static_cast<T>(total);
}

namespace strided {

/// Columns whose sums are computed together.
constexpr int64_t kColumns = 64;

/// to[i] (+)= factor times the sum of from[row + i] over the axes [first, nest.axes), for `count` columns.
template <class T>
void add_rows(const Nest<2>& nest, int first, int64_t count, const T* from, int64_t from_stride, T* to,
              int64_t to_stride, bool add, T factor) {
  const int64_t rows = nest.iterations(first, nest.axes);
  Odometer<2> row(nest, first, nest.axes);
  T total[kColumns] = {};
  for (int64_t start = 0; start < rows; start += kSumBlock) {
    const int64_t end = std::min(rows, start + kSumBlock);
    T sum[kColumns] = {};
    with_stride(from_stride, [&](auto step) {
      for (int64_t r = start; r < end; ++r, row.next()) {
        const T* at = from + row[1];
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) sum[i] += at[i * step];
      }
    });
    for (int64_t i = 0; i < count; ++i) total[i] += sum[i];
  }
  put_row(count, to, to_stride, add, [&](int64_t i) { return factor * total[i]; });
}

/// The sum over the axes [first, nest.axes).
template <class T>
T sum_all(const Nest<2>& nest, int first, const T* from) {
  const int inner = nest.axes - 1;
  const int64_t rows = nest.iterations(first, inner), stride = nest.stride[1][inner];
  Odometer<2> row(nest, first, inner);
  double total = 0;
  for (int64_t r = 0; r < rows; ++r, row.next()) {
    const T* at = from + row[1];
    with_stride(stride, [&](auto step) {
      total += static_cast<double>(sum_of<T>(nest.size[inner], [=](int64_t i) { return at[i * step]; }));
    });
  }
  return static_cast<T>(total);
}

/// to (+)= factor from, with one operand contiguous along the axis p and the other one along q: blocks are
/// turned in registers.
template <class T>
void turned(int64_t size_p, int64_t size_q, const T* from, int64_t from_p, T* to, int64_t to_q, bool add,
            T factor) {
  constexpr int64_t W = kLanes<T>;
  alignas(64) T block[W * W];
  for (int64_t j = 0; j < size_q; j += W) {
    const int64_t columns = std::min(W, size_q - j);
    for (int64_t i = 0; i < size_p; i += W) {
      const int64_t rows = std::min(W, size_p - i);
      transpose_block(rows, columns, from + i * from_p + j, from_p, block, W);
      for (int64_t c = 0; c < columns; ++c) {
        const T* row = block + c * W;
        put_row(rows, to + (j + c) * to_q + i, 1, add, [=](int64_t r) { return factor * row[r]; });
      }
    }
  }
}

/// The loops of to (+)= factor from, prepared for many calls. The axes along which `to` has stride 0 are
/// summed over.
class Copy {
 public:
  explicit Copy(Nest<2> nest) : nest_(nest), rows_(nest) {
    nest_.sort();  // the axes to sum over come last
    nest_.join();
    while (kept_ < nest_.axes && nest_.stride[0][kept_] != 0) ++kept_;
    Nest<2> of_to = nest_;
    of_to.axes = kept_;
    apart_ = injective(of_to, 0);
    rows_ = nest_;
    rows_.axes = 0;
    turns_ = turned_axis();
    for (int a = 0; a + 1 < kept_; ++a) {
      if (a != turns_) rows_.append(nest_.size[a], {nest_.stride[0][a], nest_.stride[1][a]});
    }
  }

  template <class T>
  void operator()(T* to, const T* from, bool add, T factor) const {
    const bool sums = kept_ < nest_.axes;
    if (kept_ == 0 || (sums && std::abs(nest_.stride[1][kept_ - 1]) != 1)) {
      return each(nest_.iterations(0, kept_), [&](int64_t first, int64_t last) {
        Odometer<2> at(nest_, 0, kept_, first);
        for (int64_t i = first; i < last; ++i, at.next()) {
          const T value = factor * (sums ? sum_all(nest_, kept_, from + at[1]) : from[at[1]]);
          T& element = to[at[0]];
          element = add ? element + value : value;
        }
      });
    }
    // Rows along the last axis of `to`, in pieces.
    const int inner = kept_ - 1;
    const int64_t size = nest_.size[inner], to_stride = nest_.stride[0][inner];
    const int64_t from_stride = nest_.stride[1][inner];
    const int64_t piece = sums ? kColumns : turns_ >= 0 ? kTurned : size, pieces = (size + piece - 1) / piece;
    each(rows_.iterations() * pieces, [&](int64_t first, int64_t last) {
      Odometer<2> at(rows_, 0, rows_.axes, first / pieces);
      for (int64_t i = first; i < last; ++i) {
        const int64_t start = i % pieces * piece, count = std::min(piece, size - start);
        T* row = to + at[0] + start * to_stride;
        const T* source = from + at[1] + start * from_stride;
        if (sums) {
          add_rows(nest_, kept_, count, source, from_stride, row, to_stride, add, factor);
        } else if (turns_ >= 0) {
          turned(count, nest_.size[turns_], source, from_stride, row, nest_.stride[0][turns_], add, factor);
        } else {
          with_stride(from_stride, [&](auto step) {
            put_row(count, row, to_stride, add, [=](int64_t j) { return factor * source[j * step]; });
          });
        }
        if ((i + 1) % pieces == 0) at.next();
      }
    });
  }

 private:
  static constexpr int64_t kTurned = 64;

  /// The axis along which `from` is contiguous where `to` is not, if both axes are long; otherwise -1.
  int turned_axis() const {
    constexpr int64_t kLong = 4;
    const int inner = nest_.axes - 1;
    if (kept_ < nest_.axes || nest_.axes < 2 || !apart_ || nest_.stride[0][inner] != 1 ||
        std::abs(nest_.stride[1][inner]) <= 1 || nest_.size[inner] < kLong)
      return -1;
    for (int a = 0; a < inner; ++a) {
      if (nest_.stride[1][a] == 1 && nest_.size[a] >= kLong) return a;
    }
    return -1;
  }

  /// Threads share [0, count) where they write to different elements.
  template <class F>
  void each(int64_t count, F f) const {
    apart_ ? share(count, 1, kElementWork * nest_.iterations(), f) : f(int64_t{0}, count);
  }

  Nest<2> nest_, rows_;  // rows_: the outer axes of `to`
  int kept_ = 0, turns_ = -1;
  bool apart_;
};

}  // namespace strided

template <class T>
void set_to_zero(const View& view, int64_t n, T* to) {
  std::fill_n(to, elements(view, n), T(0));
}

/// The cotangent of an operand that has no derivative.
template <class T>
void give_nothing(const View& view, int64_t n, bool add, T* grad_x) {
  if (grad_x && !add) set_to_zero(view, n, grad_x);
}

/// Prepares `to` for values that are written once to each element to which the loops come: sets it to 0 where
/// there are others. Returns whether the values are to be added.
template <class T>
bool start(const Loops& loops, int64_t n, const View& view, T* to, bool add) {
  if (add || covers(loops, n, view)) return add;
  set_to_zero(view, n, to);
  return true;
}

/// to = factor from; elements to which the loops do not come keep their values.
template <class T>
void assign(const Loops& loops, int64_t n, const View& to_view, T* to, const View& from_view, const T* from,
            T factor = 1) {
  const strided::Copy copy(nest_of<2>(loops, n, {&to_view, &from_view}));
  copy(to + to_view.offset, from + from_view.offset, false, factor);
}

/// to (+)= factor from. Without `add`, elements to which the loops do not come are set to 0.
template <class T>
void accumulate(const Loops& loops, int64_t n, const View& to_view, T* to, const View& from_view,
                const T* from, bool add, T factor = 1) {
  add = start(loops, n, to_view, to, add);
  const strided::Copy copy(nest_of<2>(loops, n, {&to_view, &from_view}));
  copy(to + to_view.offset, from + from_view.offset, add, factor);
}

}  // namespace maml::MAML_ISA
