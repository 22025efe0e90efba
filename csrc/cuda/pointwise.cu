// y = f(x) for all tasks: the passes of pointwise.h, with a kernel for each function, so that each has only
// its own registers and code.
#include "cuda/implement.h"
#include "cuda/pointwise.h"

namespace maml::cuda {
namespace {

template <Function F, class T>
__global__ void __launch_bounds__(kElementThreads)
    forward_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  pointwise_forward<F>(grid_team(), l, resolve(symbolic, memory, blockIdx.z));
}
template <Function F, class T>
__global__ void __launch_bounds__(kElementThreads)
    backward_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  pointwise_backward<F>(grid_team(), l, resolve(symbolic, memory, blockIdx.z));
}
template <Function F, class T>
__global__ void __launch_bounds__(kElementThreads)
    forward_tangent_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  pointwise_forward_tangent<F>(grid_team(), l, resolve(symbolic, memory, blockIdx.z));
}
template <Function F, class T>
__global__ void __launch_bounds__(kElementThreads)
    backward_tangent_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  pointwise_backward_tangent<F>(grid_team(), l, resolve(symbolic, memory, blockIdx.z));
}

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  with_activation(l.function, [&]<Function F>() {
    launch("pointwise forward", forward_kernel<F, T>, element_grid(l.n * size(l.in)), kElementThreads, 0, l,
           t, launch.memory);
  });
}

template <class T>
void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  if (!t.grad_x[0]) return;
  with_activation(l.function, [&]<Function F>() {
    launch("pointwise backward", backward_kernel<F, T>, element_grid(l.n * size(l.in)), kElementThreads, 0, l,
           t, launch.memory);
  });
}

template <class T>
void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  with_activation(l.function, [&]<Function F>() {
    launch("pointwise forward tangent", forward_tangent_kernel<F, T>, element_grid(l.n * size(l.in)),
           kElementThreads, 0, l, t, launch.memory);
  });
}

template <class T>
void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  if (!t.grad_x_dot[0]) return;
  with_activation(l.function, [&]<Function F>() {
    launch("pointwise backward tangent", backward_tangent_kernel<F, T>, element_grid(l.n * size(l.in)),
           kElementThreads, 0, l, t, launch.memory);
  });
}

}  // namespace

template <>
struct OnGpu<Kind::pointwise> {
  template <class T>
  static LaunchPasses<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::pointwise>;

}  // namespace maml::cuda
