// y = the sums of x_0 at the places x_1 along an axis of y, for all tasks (cuda/lookup.h). The twin on the
// CPU is cpu/scatter.cpp.
#include "cuda/lookup.h"

namespace maml::cuda {
namespace {

template <class T>
void apply(const Launcher& launch, const char* name, const Layer& l, const Tensors<T>& t, const T* x, T* y) {
  if (!x) return clear(launch, l.loops->y, l.n, y);
  add_up(launch, name, l, x, l.loops->x[0], t.x[1], l.loops->y, false, true, y);
}
template <class T>
void adjoint(const Launcher& launch, const char* name, const Layer& l, const Tensors<T>& t, const T* g,
             T* const* grad_x) {
  const View* x = l.loops->x;
  if (grad_x[0]) look_up(launch, name, l, l.loops->y, g, t.x[1], x[0], t.add_x[0], grad_x[0]);
  give_nothing(launch, x[1], l.n, t.add_x[1], grad_x[1]);
}

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  apply(launch, "scatter forward", l, t, t.x[0], t.y);
}
template <class T>
void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  adjoint(launch, "scatter backward", l, t, t.grad_y, t.grad_x);
}
template <class T>
void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  apply(launch, "scatter forward tangent", l, t, t.x_dot[0], t.y_dot);
}
template <class T>
void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  adjoint(launch, "scatter backward tangent", l, t, t.grad_y_dot, t.grad_x_dot);
}

}  // namespace

template <>
struct OnGpu<Kind::scatter> {
  static Footprint footprint(const Layer&) { return {}; }
  template <class T>
  static LaunchPasses<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::scatter>;

}  // namespace maml::cuda
