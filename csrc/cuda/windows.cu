// y = the windows of x, 0 where they leave it, for all tasks (strided.h). A thread takes an element of y.
// In the adjoint a thread takes an element of x and sums the cotangents of the windows that contain it, in
// ascending order of their taps. The twin on the CPU is cpu/windows.cpp.
#include "cuda/implement.h"
#include "cuda/slides.h"

namespace maml::cuda {
namespace {

/// The operands of the nests: x, y, and the place along each axis of x over which the window slides.
enum : int { kX, kY, kPlace, kOperands = kPlace + kMostSlides };

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    windows_kernel(const __grid_constant__ Split<kOperands> loops, const __grid_constant__ Slides slides,
                   const T* symbolic_x, T* symbolic_y, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  const T* x = resolve(symbolic_x, memory, blockIdx.z);
  T* y = resolve(symbolic_y, memory, blockIdx.z);
  for (int64_t step = team.first(); step < loops.outer.steps; step += team.step()) {
    const Offsets<kOperands> at = outer_step(loops, step);
    y[at.of[kY]] = is_inside(slides, at.of + kPlace) ? x[at.of[kX]] : T(0);
  }
}

/// f(offset in y) for each tap of the windows over one axis that is at this place of x.
template <class F>
__device__ __forceinline__ void each_window(const Taps& s, int64_t place, int64_t offset, F f) {
  each_tap(s, place,
           [&](int64_t position, int64_t tap) { f(offset + position * s.y_position + tap * s.y_tap); });
}

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    windows_transposed_kernel(const __grid_constant__ Split<kOperands> loops,
                              const __grid_constant__ Slides slides, const T* symbolic_g, bool add,
                              T* symbolic_grad_x, Deferred deferred) {
  const Memory memory = deferred.ready();
  static_assert(kMostSlides == 3);
  const Team team = grid_team();
  const T* g = resolve(symbolic_g, memory, blockIdx.z);
  T* grad_x = resolve(symbolic_grad_x, memory, blockIdx.z);
  for (int64_t step = team.first(); step < loops.outer.steps; step += team.step()) {
    const Offsets<kOperands> at = outer_step(loops, step);
    Sum<T> sum;
    each_window(slides.of[0], at.of[kPlace], at.of[kY], [&](int64_t first) {
      each_window(slides.of[1], at.of[kPlace + 1], first, [&](int64_t second) {
        each_window(slides.of[2], at.of[kPlace + 2], second, [&](int64_t third) { sum += g[third]; });
      });
    });
    put(grad_x, at.of[kX], sum.value(), add);
  }
}

Split<kOperands> split(const Placed& at, int64_t n, const View& by) {
  const auto& place = at.place;
  return cuda::split<kOperands>(at.loops, n, by,
                                {&at.loops.x[0], &at.loops.y, &place[0], &place[1], &place[2]});
}
/// The loops over all elements of y.
Split<kOperands> over_y(const Loops& loops, int64_t n) {
  const Placed at = at_windows(loops);
  return split(at, n, at.loops.y);
}
/// The loops over all elements of x; y is where position and tap are 0.
Split<kOperands> over_x(const Loops& loops, int64_t n) {
  const Placed at = at_elements(loops);
  return split(at, n, at.loops.x[0]);
}

}  // namespace

template <>
struct OnGpu<Kind::windows> {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* x, T* y) {
    const Split<kOperands> s = over_y(*l.loops, l.n);
    launch("windows", windows_kernel<T>, step_grid(s.outer.steps), kElementThreads, 0, s, slides_of(*l.loops),
           x, y, launch.memory);
  }
  template <class T>
  static void adjoint(const Launcher& launch, const Layer& l, const T* g, bool add, T* grad_x) {
    const Split<kOperands> s = over_x(*l.loops, l.n);
    clear_unless_reached(launch, l.loops->x[0], l.n, s.outer.steps, add, grad_x);
    launch("windows transposed", windows_transposed_kernel<T>, step_grid(s.outer.steps), kElementThreads, 0,
           s, slides_of(*l.loops), g, add, grad_x, launch.memory);
  }
};
template struct Implementation<Kind::windows>;

}  // namespace maml::cuda
