// Appends a parameter's elements to the features of every sample (append.h), for all tasks.
#include "cuda/append.h"
#include "cuda/implement.h"

namespace maml::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    forward_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  append_forward(grid_team(), l, resolve(symbolic, memory, blockIdx.z));
}
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    backward_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  append_backward(grid_team(), l, resolve(symbolic, memory, blockIdx.z));
}
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    forward_tangent_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  append_forward_tangent(grid_team(), l, resolve(symbolic, memory, blockIdx.z));
}
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    backward_tangent_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  append_backward_tangent(grid_team(), l, resolve(symbolic, memory, blockIdx.z));
}

template <class T>
LaunchPasses<T> all_passes() {
  return {
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        launch("append forward", forward_kernel<T>, element_grid(l.n * l.out.c), kElementThreads, 0, l, t,
               launch.memory);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        launch("append backward", backward_kernel<T>, element_grid(l.n * l.out.c), kElementThreads, 0, l, t,
               launch.memory);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        launch("append forward tangent", forward_tangent_kernel<T>, element_grid(l.n * l.out.c),
               kElementThreads, 0, l, t, launch.memory);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        launch("append backward tangent", backward_tangent_kernel<T>, element_grid(l.n * l.out.c),
               kElementThreads, 0, l, t, launch.memory);
      },
  };
}

}  // namespace

template <>
struct OnGpu<Kind::append> {
  static Footprint footprint(const Layer&) { return {}; }
  template <class T>
  static LaunchPasses<T> passes() {
    return all_passes<T>();
  }
};
template struct Implementation<Kind::append>;

}  // namespace maml::cuda
