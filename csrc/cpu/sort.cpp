// y = the places of the elements of x in order, along the last axis of the loops; it has no derivative. The
// twin on the GPU is cuda/sort.cu.
#include <algorithm>

#include "cpu/implement.h"
#include "cpu/strided.h"

namespace maml::MAML_ISA {
namespace {

/// Sorts `count` places, in y, by the elements of x.
template <class T>
void sort_row(int64_t count, bool descends, const T* x, int64_t stride, T* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = static_cast<T>(i);
  std::sort(y, y + count, [=](T a, T b) {
    const T p = x[static_cast<int64_t>(a) * stride], q = x[static_cast<int64_t>(b) * stride];
    return sorts_before(descends, p, q) || (!sorts_before(descends, q, p) && a < b);
  });
}

template <class T>
void forward(const Layer& l, const Tensors<T>& t) {
  const Loops& loops = *l.loops;
  const int last = loops.axes - 1;
  Loops rows = loops;
  rows.axes = last;
  const Nest<2> nest = nest_of<2>(rows, l.n, {&loops.x[0], &loops.y});
  const int64_t count = nest.iterations(), size = loops.size[last];
  share(count, 1, kElementWork * count * size, [&](int64_t first, int64_t end) {
    Odometer<2> at(nest, 0, nest.axes, first);
    for (int64_t i = first; i < end; ++i, at.next()) {
      sort_row(size, l.a != 0, t.x[0] + loops.x[0].offset + at[0], loops.x[0].stride[last], t.y + at[1]);
    }
  });
}

}  // namespace

template <>
struct OnCpu<Kind::sort> {
  static Footprint footprint(const Layer&) { return {}; }

  template <class T>
  static Passes<T> passes() {
    return {
        forward<T>,
        [](const Layer& l, const Tensors<T>& t) {
          give_nothing(l.loops->x[0], l.n, t.add_x[0], t.grad_x[0]);
        },
        [](const Layer& l, const Tensors<T>& t) { set_to_zero(l.loops->y, l.n, t.y_dot); },
        [](const Layer& l, const Tensors<T>& t) {
          give_nothing(l.loops->x[0], l.n, t.add_x[0], t.grad_x_dot[0]);
        },
    };
  }
};
template struct Implementation<Kind::sort>;

}  // namespace maml::MAML_ISA
