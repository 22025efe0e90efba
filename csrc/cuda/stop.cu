// y = x for all tasks, without a derivative: its tangent is 0, and the cotangent that it gives is 0. The twin
// on the CPU is cpu/stop.cpp.
#include "cuda/implement.h"
#include "cuda/shares.h"

namespace maml::cuda {
namespace {

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const Loops& loops = *l.loops;
  sum(launch, "stop", loops, l.n, loops.x[0], loops.y, T(1), t.x[0], false, t.y);
}
template <class T>
void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  if (t.grad_x[0] && !t.add_x[0]) clear(launch, l.loops->x[0], l.n, t.grad_x[0]);
}
template <class T>
void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  clear(launch, l.loops->y, l.n, t.y_dot);
}
template <class T>
void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  if (t.grad_x_dot[0] && !t.add_x[0]) clear(launch, l.loops->x[0], l.n, t.grad_x_dot[0]);
}

}  // namespace

template <>
struct OnGpu<Kind::stop> {
  static Footprint footprint(const Layer&) { return {}; }
  template <class T>
  static LaunchPasses<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::stop>;

}  // namespace maml::cuda
