// y = x, with tangent and cotangent 0. The twin on the GPU is cuda/stop.cu.
#include "cpu/implement.h"
#include "cpu/strided.h"

namespace maml::MAML_ISA {
template <>
struct OnCpu<Kind::stop> {
  static Footprint footprint(const Layer&) { return {}; }

  template <class T>
  static Passes<T> passes() {
    return {
        [](const Layer& l, const Tensors<T>& t) {
          assign(*l.loops, l.n, l.loops->y, t.y, l.loops->x[0], t.x[0]);
        },
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
template struct Implementation<Kind::stop>;

}  // namespace maml::MAML_ISA
