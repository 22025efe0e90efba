// y = the sums of x_0 at the places x_1 along an axis of y, in the order of the loops (cpu/lookup.h). The
// twin on the GPU is cuda/scatter.cu.
#include "cpu/implement.h"
#include "cpu/lookup.h"

namespace maml::MAML_ISA {
namespace {

template <class T>
void apply(const Layer& l, const Tensors<T>& t, const T* x, T* y) {
  if (!x) return set_to_zero(l.loops->y, l.n, y);
  add_up(l, x, l.loops->x[0], t.x[1], l.loops->y, false, true, y);
}
template <class T>
void adjoint(const Layer& l, const Tensors<T>& t, const T* g, T* const* grad_x) {
  if (grad_x[0]) look_up(l, l.loops->y, g, t.x[1], l.loops->x[0], t.add_x[0], grad_x[0]);
  give_nothing(l.loops->x[1], l.n, t.add_x[1], grad_x[1]);
}

}  // namespace

template <>
struct OnCpu<Kind::scatter> {
  static Footprint footprint(const Layer&) { return {}; }

  template <class T>
  static Passes<T> passes() {
    return {
        [](const Layer& l, const Tensors<T>& t) { apply(l, t, t.x[0], t.y); },
        [](const Layer& l, const Tensors<T>& t) { adjoint(l, t, t.grad_y, t.grad_x); },
        [](const Layer& l, const Tensors<T>& t) { apply(l, t, t.x_dot[0], t.y_dot); },
        [](const Layer& l, const Tensors<T>& t) { adjoint(l, t, t.grad_y_dot, t.grad_x_dot); },
    };
  }
};
template struct Implementation<Kind::scatter>;

}  // namespace maml::MAML_ISA
