// y = a m x with a random mask m (layers/dropout.h). The twin on the GPU is cuda/dropout.cu.
#include "cpu/implement.h"
#include "cpu/strided.h"

namespace maml::MAML_ISA {
namespace {

/// Elements of a mask that are computed together.
constexpr int64_t kPiece = 256;

/// a m for `count` <= kPiece elements of the mask.
template <class T>
void fill(const Layer& l, int64_t first, int64_t stride, int64_t count, T* factor) {
  const T a = static_cast<T>(l.a);
  const uint64_t keep = l.mask->keep;
  const uint32_t number = l.mask->number;
  if (stride != 1) {  // all the same, or each from a block of its own
    const int64_t different = stride == 0 ? 1 : count;
    for (int64_t i = 0; i < different; ++i) {
      const int64_t element = first + i * stride;
      factor[i] = block_of(l.stream, number, element / 4).word[element % 4] < keep ? a : T(0);
    }
    std::fill(factor + different, factor + count, factor[0]);
    return;
  }
  uint32_t word[kPiece + 8];
  const int64_t b = first / 4, blocks = (first % 4 + count + 3) / 4;
  for (int64_t i = 0; i < blocks; ++i) {
    const PhiloxBlock block = block_of(l.stream, number, b + i);
    for (int j = 0; j < 4; ++j) word[4 * i + j] = block.word[j];
  }
  for (int64_t i = 0; i < count; ++i) factor[i] = word[first % 4 + i] < keep ? a : T(0);
}

/// to (+)= a m from, summed over the axes along which `to` has stride 0.
template <class T>
void masked(const Layer& l, const View& to_view, T* to, const View& from_view, const T* from, bool add) {
  const View of_mask = numbers_of_mask(l);
  Nest<3> nest = nest_of<3>(*l.loops, l.n, {&to_view, &from_view, &of_mask});
  nest.sort();
  nest.join();
  const bool once = injective(nest, 0);
  add = start(*l.loops, l.n, to_view, to, add);
  if (!once && !add) {
    set_to_zero(to_view, l.n, to);
    add = true;
  }
  to += to_view.offset, from += from_view.offset;
  const int inner = std::max(nest.axes - 1, 0);
  const int64_t size = nest.axes > 0 ? nest.size[inner] : 1;
  int64_t stride[3] = {};
  for (int m = 0; m < 3 && nest.axes > 0; ++m) stride[m] = nest.stride[m][inner];
  const auto rows = [&](int64_t first, int64_t last) {
    T factor[kPiece];
    Odometer<3> at(nest, 0, inner, first);
    for (int64_t row = first; row < last; ++row, at.next()) {
      for (int64_t i = 0; i < size; i += kPiece) {
        const int64_t count = std::min(kPiece, size - i);
        fill(l, of_mask.offset + at[2] + i * stride[2], stride[2], count, factor);
        const T* x = from + at[1] + i * stride[1];
        with_stride(stride[1], [&](auto step) {
          put_row(count, to + at[0] + i * stride[0], stride[0], add,
                  [&](int64_t j) { return factor[j] * x[j * step]; });
        });
      }
    }
  };
  const int64_t count = nest.iterations(0, inner);
  once ? share(count, 1, 2 * kElementWork * nest.iterations(), rows) : rows(int64_t{0}, count);
}

}  // namespace

template <>
struct OnCpu<Kind::dropout> {
  template <class T>
  static void apply(const Layer& l, const T* x, T* y) {
    masked(l, l.loops->y, y, l.loops->x[0], x, false);
  }
  template <class T>
  static void adjoint(const Layer& l, const T* g, bool add, T* grad_x) {
    masked(l, l.loops->x[0], grad_x, l.loops->y, g, add);
  }
};
template struct Implementation<Kind::dropout>;

}  // namespace maml::MAML_ISA
