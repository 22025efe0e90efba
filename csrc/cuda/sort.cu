// y = the places of the elements of x in order along the last axis of the loops, for all tasks; it has no
// derivative. A thread takes an element of x, counts those that come before it, and so knows its place: there
// is no exchange between threads. The twin on the CPU is cpu/sort.cpp.
#include "cuda/lookup.h"

namespace maml::cuda {
namespace {

/// The operands of the nests.
enum : int { kX, kY, kOperands };

/// A row along the last axis.
struct Row {
  int64_t size, x_stride, y_stride;
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    sort_kernel(const __grid_constant__ Split<kOperands> loops, Row row, bool descends, const T* symbolic_x,
                T* symbolic_y, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  const T* x = resolve(symbolic_x, memory, blockIdx.z);
  T* y = resolve(symbolic_y, memory, blockIdx.z);
  const unsigned size = static_cast<unsigned>(row.size);
  for (int64_t step = team.first(); step < loops.outer.steps * row.size; step += team.step()) {
    const unsigned which = static_cast<unsigned>(step) / size,
                   own = static_cast<unsigned>(step) - which * size;
    const Offsets<kOperands> at = outer_step(loops, which);
    const T* elements = x + at.of[kX];
    const T value = elements[own * row.x_stride];
    unsigned before = 0;
    for (unsigned i = 0; i < size; ++i) {
      const T other = elements[i * row.x_stride];
      before += sorts_before(descends, other, value) || (i < own && !sorts_before(descends, value, other));
    }
    y[at.of[kY] + before * row.y_stride] = static_cast<T>(own);
  }
}

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  Loops rows = *l.loops;
  const int last = --rows.axes;
  const Split<kOperands> s = split<kOperands>(rows, l.n, rows.y, {&rows.x[0], &rows.y});
  const Row row{rows.size[last], rows.x[0].stride[last], rows.y.stride[last]};
  launch("sort forward", sort_kernel<T>, step_grid(s.outer.steps * row.size), kElementThreads, 0, s, row,
         l.a != 0, t.x[0], t.y, launch.memory);
}
template <class T>
void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  give_nothing(launch, l.loops->x[0], l.n, t.add_x[0], t.grad_x[0]);
}
template <class T>
void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  clear(launch, l.loops->y, l.n, t.y_dot);
}
template <class T>
void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  give_nothing(launch, l.loops->x[0], l.n, t.add_x[0], t.grad_x_dot[0]);
}

}  // namespace

template <>
struct OnGpu<Kind::sort> {
  static Footprint footprint(const Layer&) { return {}; }
  template <class T>
  static LaunchPasses<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::sort>;

}  // namespace maml::cuda
