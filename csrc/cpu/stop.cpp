// y = x, with tangent and cotangent 0. The twin on the GPU is cuda/stop.cu.
#include "cpu/implement.h"
#include "cpu/strided.h"

namespace maml::MAML_ISA {
namespace {

template <class T>
void pass_on_nothing(const Layer& l, bool add, T* grad_x) {
  if (grad_x && !add) set_to_zero(l.loops->x[0], l.n, grad_x);
}

}  // namespace

template <>
struct OnCpu<Kind::stop> {
  static Footprint footprint(const Layer&) { return {}; }

  template <class T>
  static Passes<T> passes() {
    return {
        [](const Layer& l, const Tensors<T>& t) {
          assign(*l.loops, l.n, l.loops->y, t.y, l.loops->x[0], t.x[0]);
        },
        [](const Layer& l, const Tensors<T>& t) { pass_on_nothing(l, t.add_x[0], t.grad_x[0]); },
        [](const Layer& l, const Tensors<T>& t) { set_to_zero(l.loops->y, l.n, t.y_dot); },
        [](const Layer& l, const Tensors<T>& t) { pass_on_nothing(l, t.add_x[0], t.grad_x_dot[0]); },
    };
  }
};
template struct Implementation<Kind::stop>;

}  // namespace maml::MAML_ISA
