// An operand of a map, whose elements are visited in the order of the elements of y.
#pragma once

#include "cpu/strided.h"

namespace maml::MAML_ISA {

class MapOperand {
 public:
  MapOperand() = default;
  MapOperand(const Loops& loops, int64_t n, const View& view)
      : offset(view.offset), nest_(nest_of<1>(loops, n, {&view})) {
    nest_.join();
    if (nest_.axes > 0)
      inner_ = nest_.axes - 1, steps_ = nest_.size[inner_], stride_ = nest_.stride[0][inner_];
  }

  int64_t offset = 0;
  /// Whether the elements lie in the order of y.
  bool dense() const { return nest_.axes == 0 || (nest_.axes == 1 && stride_ == 1); }
  /// The number of elements of y after which it repeats; all of them if it does not.
  int64_t period() const {
    const int64_t all = nest_.iterations();
    return nest_.axes > 0 && nest_.stride[0][0] == 0 ? all / nest_.size[0] : all;
  }
  /// Whether no element is visited twice.
  bool injective() const { return MAML_ISA::injective(nest_); }
  /// How many elements are visited.
  int64_t places() const {
    int64_t count = 1;
    for (int a = 0; a < nest_.axes; ++a) count *= nest_.stride[0][a] == 0 ? 1 : nest_.size[a];
    return count;
  }

  /// to = the elements of x for [first, last).
  template <class T>
  void gather(const T* x, int64_t first, int64_t last, T* to) const {
    each_segment(first, last, [&](int64_t at, int64_t count) {
      const T* from = x + at;
      with_stride(stride_, [&](auto step) {
        for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
      });
      to += count;
    });
  }
  /// x (+)= from, for [first, last).
  template <class T>
  void scatter(const T* from, int64_t first, int64_t last, T* x, bool add) const {
    each_segment(first, last, [&](int64_t at, int64_t count) {
      if (stride_ == 0) {
        const T sum = sum_of<T>(count, [=](int64_t i) { return from[i]; });
        x[at] = add ? x[at] + sum : sum;
      } else {
        put_row(count, x + at, stride_, add, [=](int64_t i) { return from[i]; });
      }
      from += count;
    });
  }

 private:
  /// Calls f(position, count) for runs along the innermost axis.
  template <class F>
  void each_segment(int64_t first, int64_t last, F f) const {
    Odometer<1> row(nest_, 0, inner_, first / steps_);
    for (int64_t i = first % steps_; first < last; i = 0, row.next()) {
      const int64_t count = std::min(steps_ - i, last - first);
      f(offset + row[0] + i * stride_, count);
      first += count;
    }
  }

  Nest<1> nest_;
  int inner_ = 0;
  int64_t steps_ = 1, stride_ = 1;  // along the innermost axis
};

}  // namespace maml::MAML_ISA
