// A parameter's elements behind the features of every sample (append.h), for all tasks.
#include "cuda/append.h"
#include "cuda/layers.h"

namespace maml::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    forward_kernel(Layer l, Tensors<T> symbolic, const Table* table) {
  append_forward(grid_team(), l, resolve(symbolic, *table, blockIdx.z));
}
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    backward_kernel(Layer l, Tensors<T> symbolic, const Table* table) {
  append_backward(grid_team(), l, resolve(symbolic, *table, blockIdx.z));
}
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    forward_tangent_kernel(Layer l, Tensors<T> symbolic, const Table* table) {
  append_forward_tangent(grid_team(), l, resolve(symbolic, *table, blockIdx.z));
}
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    backward_tangent_kernel(Layer l, Tensors<T> symbolic, const Table* table) {
  append_backward_tangent(grid_team(), l, resolve(symbolic, *table, blockIdx.z));
}

template <class T>
LaunchPasses<T> passes() {
  return {
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        launch("append forward", forward_kernel<T>, element_grid(l.n * l.out.c), kElementThreads, 0, l, t,
               launch.table);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        launch("append backward", backward_kernel<T>, element_grid(l.n * l.out.c), kElementThreads, 0, l, t,
               launch.table);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        launch("append forward tangent", forward_tangent_kernel<T>, element_grid(l.n * l.out.c),
               kElementThreads, 0, l, t, launch.table);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        launch("append backward tangent", backward_tangent_kernel<T>, element_grid(l.n * l.out.c),
               kElementThreads, 0, l, t, launch.table);
      },
  };
}

}  // namespace

template <>
LaunchPasses<float> append<float>() {
  return passes<float>();
}
template <>
LaunchPasses<double> append<double>() {
  return passes<double>();
}

}  // namespace maml::cuda
