// y = a x for all tasks, in vectors of 16 bytes (vectors.h). No shared memory.
#include "cuda/elementwise.h"
#include "cuda/implement.h"

namespace maml::cuda {
namespace {

/// out (+)= a in
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    scale_kernel(int64_t count, T a, const T* symbolic_in, bool add, T* symbolic_out, Deferred deferred) {
  const Memory memory = deferred.ready();
  const T* in = resolve(symbolic_in, memory, blockIdx.z);
  T* out = resolve(symbolic_out, memory, blockIdx.z);
  const Put put{add};
  map_elements(
      grid_team(), count, [&](T x, T before) { return put(before, a * x); }, out, in, put.before(out));
}

template <class T>
void scale(const Launcher& launch, const char* name, const Layer& l, const T* in, bool add, T* out) {
  const int64_t count = l.n * size(l.in);
  launch(name, scale_kernel<T>, element_grid(count), kElementThreads, 0, count, static_cast<T>(l.a), in, add,
         out, launch.memory);
}

}  // namespace

template <>
struct OnGpu<Kind::scale> {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* x, T* y) {
    scale(launch, "scale", l, x, false, y);
  }
  template <class T>
  static void adjoint(const Launcher& launch, const Layer& l, const T* g, bool add, T* grad_x) {
    scale(launch, "scale transposed", l, g, add, grad_x);
  }
};
template struct Implementation<Kind::scale>;

}  // namespace maml::cuda
