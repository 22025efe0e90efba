// y = x_0 at the places x_1 along an axis (cpu/lookup.h). The cotangents of an element that is read several
// times are summed in the order of the loops. The twin on the GPU is cuda/gather.cu.
#include "cpu/implement.h"
#include "cpu/lookup.h"

namespace maml::MAML_ISA {
namespace {

template <class T>
void apply(const Layer& l, const Tensors<T>& t, const T* table, T* y) {
  if (!table) return set_to_zero(l.loops->y, l.n, y);
  look_up(l, l.loops->x[0], table, t.x[1], l.loops->y, false, y);
}
template <class T>
void adjoint(const Layer& l, const Tensors<T>& t, const T* g, T* const* grad_x) {
  if (grad_x[0]) add_up(l, g, l.loops->y, t.x[1], l.loops->x[0], t.add_x[0], false, grad_x[0]);
  give_nothing(l.loops->x[1], l.n, t.add_x[1], grad_x[1]);
}

}  // namespace

template <>
struct OnCpu<Kind::gather> {
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
template struct Implementation<Kind::gather>;

}  // namespace maml::MAML_ISA
