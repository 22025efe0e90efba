// Reading and writing an operand at places that another operand, the index, has along one axis of it
// (layers/loops.h, Axis):
//
//   look_up    to[.] (+)= of[., index[.]]
//   add_up     of[., index[.]] (+)= from[.]
//
// Sums are in the order of the loops. Threads share the axes of the operand that is written, so that one
// thread alone writes to an element. The twin on the GPU is cuda/lookup.h.
#pragma once

#include <limits>

#include "cpu/strided.h"

namespace maml::MAML_ISA {

/// The loops of a lookup over three operands: the one with the further axis, the index, and the third one.
class Lookup {
 public:
  enum Operand : int { kOf, kIndex, kOther, kOperands };

  /// `writes`: kOf or kOther. The loops over the axes that it does not have are inside.
  Lookup(const Loops& loops, int64_t n, const View& of, const View& other, Operand writes)
      : axis_(loops.axis) {
    const View* views[kOperands] = {&of, &loops.x[1], &other};
    for (int m = 0; m < kOperands; ++m) offset_[m] = views[m]->offset;
    const int columns = column_axis(loops, *views[writes]);
    for (int a = 0; a < loops.axes; ++a) {
      const int64_t strides[kOperands] = {of.stride[a], loops.x[1].stride[a], other.stride[a]};
      if (a == columns) {
        columns_ = extent(loops, a, n);
        of_column = strides[kOf], other_column = strides[kOther];
      } else {
        (strides[writes] != 0 ? apart_ : together_).append(extent(loops, a, n), strides);
      }
    }
  }

  /// f(place, first, other, count, r) for the rows of columns of all steps: where the columns are in `of`, in
  /// the place of the index (-1: it is outside) and in place 0; where they are in the third operand; and the
  /// number of the step inside. One thread takes all steps inside, in order.
  template <class T, class F>
  void each_row(const T* index, F f) const {
    const int64_t pieces = (columns_ - 1) / kPiece + 1;
    const int64_t count = apart_.iterations() * pieces, rows = together_.iterations();
    share(count, 1, kElementWork * apart_.iterations() * rows * columns_, [&](int64_t first, int64_t last) {
      Odometer<kOperands> outer(apart_, 0, apart_.axes, first / pieces);
      for (int64_t i = first; i < last; ++i) {
        const int64_t start = i % pieces * kPiece, length = std::min(kPiece, columns_ - start);
        const int64_t of = offset_[kOf] + outer[kOf] + start * of_column;
        const int64_t other = offset_[kOther] + outer[kOther] + start * other_column;
        Odometer<kOperands> row(together_, 0, together_.axes);
        for (int64_t r = 0; r < rows; ++r, row.next()) {
          const int64_t at = offset_[kIndex] + outer[kIndex] + row[kIndex];
          const int64_t place = place_along(axis_.size, index[at]);
          const int64_t from = of + row[kOf];
          f(place < 0 ? -1 : from + place * axis_.stride, from, other + row[kOther], length, r);
        }
        if ((i + 1) % pieces == 0) outer.next();
      }
    });
  }

  int64_t of_column = 0, other_column = 0;  // strides along the columns

 private:
  static constexpr int64_t kPiece = 64;

  /// The axis along which the index stays the same and the written operand has the smallest stride; -1:
  /// there is none.
  static int column_axis(const Loops& loops, const View& written) {
    int best = -1;
    for (int a = 0; a < loops.axes; ++a) {
      const int64_t stride = std::abs(written.stride[a]);
      if (loops.x[1].stride[a] != 0 || stride == 0 || loops.size[a] == kSamples) continue;
      if (best < 0 || stride < std::abs(written.stride[best])) best = a;
    }
    return best;
  }

  Axis axis_;
  Nest<kOperands> apart_, together_;  // the axes that the written operand has, but the columns; the others
  int64_t offset_[kOperands] = {}, columns_ = 1;
};

/// to[.] = the sum of of[., index[.]], NaN where the index is outside; with `add`, added to what is there.
template <class T>
void look_up(const Layer& l, const View& of_view, const T* of, const T* index, const View& to_view, bool add,
             T* to) {
  add = start(*l.loops, l.n, to_view, to, add);
  const Lookup lookup(*l.loops, l.n, of_view, to_view, Lookup::kOther);
  const int64_t step = lookup.of_column, to_step = lookup.other_column;
  lookup.each_row(index, [=](int64_t place, int64_t, int64_t at, int64_t count, int64_t r) {
    if (place < 0) {
      const T nan = std::numeric_limits<T>::quiet_NaN();
      return put_row(count, to + at, to_step, false, [=](int64_t) { return nan; });
    }
    put_row(count, to + at, to_step, add || r > 0, [=](int64_t i) { return of[place + i * step]; });
  });
}

/// of[., index[.]] = the sum of from[.]; with `add`, added to what is there. What is outside is left out, or
/// makes the first place NaN.
template <class T>
void add_up(const Layer& l, const T* from, const View& from_view, const T* index, const View& of_view,
            bool add, bool outside_is_nan, T* of) {
  if (!add) set_to_zero(of_view, l.n, of);
  const Lookup lookup(*l.loops, l.n, of_view, from_view, Lookup::kOf);
  const int64_t step = lookup.of_column, from_step = lookup.other_column;
  lookup.each_row(index, [=](int64_t place, int64_t first, int64_t at, int64_t count, int64_t) {
    if (place >= 0) {
      put_row(count, of + place, step, true, [=](int64_t i) { return from[at + i * from_step]; });
    } else if (outside_is_nan) {
      const T nan = std::numeric_limits<T>::quiet_NaN();
      put_row(count, of + first, step, false, [=](int64_t) { return nan; });
    }
  });
}

}  // namespace maml::MAML_ISA
