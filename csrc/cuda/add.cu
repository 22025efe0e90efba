// y = a + b for all tasks (add.h).
#include "cuda/add.h"
#include "cuda/implement.h"

namespace maml::cuda {
namespace {

/// Values for the two inputs.
template <class P>
struct Two {
  P of[2];
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    sum_kernel(int64_t count, Two<const T*> symbolic, T* symbolic_y, Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  const T *a = resolve(symbolic.of[0], memory, task), *b = resolve(symbolic.of[1], memory, task);
  sum_of(grid_team(), count, a, b, resolve(symbolic_y, memory, task));
}

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    pass_on_kernel(int64_t count, const T* symbolic_g, Two<bool> add, Two<T*> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  T* const grad_x[2] = {resolve(symbolic.of[0], memory, task), resolve(symbolic.of[1], memory, task)};
  pass_on(grid_team(), count, resolve(symbolic_g, memory, task), add.of, grad_x);
}

}  // namespace

template <>
struct OnGpu<Kind::add> {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* const* x, T* y) {
    const int64_t count = l.n * size(l.in);
    launch("add", sum_kernel<T>, element_grid(count), kElementThreads, 0, count, Two<const T*>{x[0], x[1]}, y,
           launch.memory);
  }
  template <class T>
  static void adjoint(const Launcher& launch, const Layer& l, const T* g, const bool* add, T* const* grad_x) {
    const int64_t count = l.n * size(l.in);
    launch("add transposed", pass_on_kernel<T>, element_grid(count), kElementThreads, 0, count, g,
           Two<bool>{add[0], add[1]}, Two<T*>{grad_x[0], grad_x[1]}, launch.memory);
  }
};
template struct Implementation<Kind::add>;

}  // namespace maml::cuda
