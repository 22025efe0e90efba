// y = the windows of x, 0 where they leave it, for all tasks (strided.h). A thread takes an element of y.
// In the adjoint a thread takes an element of x and sums the cotangents of the windows that contain it, in
// ascending order of their taps. The twin on the CPU is cpu/windows.cpp.
#include "cuda/implement.h"
#include "cuda/strided.h"

namespace maml::cuda {
namespace {

/// The operands of the nests: x, y, and the place along each axis of x over which the window slides.
enum : int { kX, kY, kPlace, kOperands = kPlace + kMostSlides };

/// One such axis as the adjoint sees it.
struct Taps {
  int64_t taps = 1, positions = 1, stride = 1, dilation = 1, padding = 0;
  int64_t of_position = 0, of_tap = 0;  // strides of y
};

struct Slides {
  int64_t size[kMostSlides] = {1, 1, 1};  // of the axes of x
  Taps of[kMostSlides];
};

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    windows_kernel(const __grid_constant__ Split<kOperands> loops, const __grid_constant__ Slides slides,
                   const T* symbolic_x, T* symbolic_y, const Table* table) {
  const Team team = grid_team();
  const T* x = resolve(symbolic_x, *table, blockIdx.z);
  T* y = resolve(symbolic_y, *table, blockIdx.z);
  for (int64_t step = team.first(); step < loops.outer.steps; step += team.step()) {
    const Offsets<kOperands> at = outer_step(loops, step);
    bool inside = true;
    for (int s = 0; s < kMostSlides; ++s) {
      inside &= 0 <= at.of[kPlace + s] && at.of[kPlace + s] < slides.size[s];
    }
    y[at.of[kY]] = inside ? x[at.of[kX]] : T(0);
  }
}

/// f(offset in y) for each tap of the windows over one axis that is at this place of x.
template <class F>
__device__ __forceinline__ void each_tap(const Taps& s, int64_t place, int64_t offset, F f) {
  for (int64_t tap = 0; tap < s.taps; ++tap) {
    const int64_t from = place + s.padding - tap * s.dilation, position = from / s.stride;
    if (from < 0 || position >= s.positions || position * s.stride != from) continue;
    f(offset + position * s.of_position + tap * s.of_tap);
  }
}

template <class T>
__global__ void __launch_bounds__(kElementThreads)
    windows_transposed_kernel(const __grid_constant__ Split<kOperands> loops,
                              const __grid_constant__ Slides slides, const T* symbolic_g, bool add,
                              T* symbolic_grad_x, const Table* table) {
  static_assert(kMostSlides == 3);
  const Team team = grid_team();
  const T* g = resolve(symbolic_g, *table, blockIdx.z);
  T* grad_x = resolve(symbolic_grad_x, *table, blockIdx.z);
  for (int64_t step = team.first(); step < loops.outer.steps; step += team.step()) {
    const Offsets<kOperands> at = outer_step(loops, step);
    Sum<T> sum;
    each_tap(slides.of[0], at.of[kPlace], at.of[kY], [&](int64_t first) {
      each_tap(slides.of[1], at.of[kPlace + 1], first, [&](int64_t second) {
        each_tap(slides.of[2], at.of[kPlace + 2], second, [&](int64_t third) { sum += g[third]; });
      });
    });
    put(grad_x, at.of[kX], sum.value(), add);
  }
}

Slides slides_of(const Loops& loops) {
  Slides slides;
  for (int i = 0; i < loops.slides; ++i) {
    const Slide& s = loops.slide[i];
    slides.size[i] = s.size;
    slides.of[i] = {loops.size[s.tap],          loops.size[s.position], s.stride, s.dilation, s.padding,
                    loops.y.stride[s.position], loops.y.stride[s.tap]};
  }
  return slides;
}

/// The loops over all elements of y.
Split<kOperands> over_y(const Loops& loops, int64_t n) {
  View x = loops.x[0], place[kMostSlides];
  for (int i = 0; i < loops.slides; ++i) {
    const Slide& s = loops.slide[i];
    x.stride[s.position] = s.stride * s.x_stride;
    x.stride[s.tap] = s.dilation * s.x_stride;
    x.offset -= s.padding * s.x_stride;
    place[i].stride[s.position] = s.stride;
    place[i].stride[s.tap] = s.dilation;
    place[i].offset = -s.padding;
  }
  return split<kOperands>(loops, n, loops.y, {&x, &loops.y, &place[0], &place[1], &place[2]});
}

/// The loops over all elements of x; y is where position and tap are 0.
Split<kOperands> over_x(Loops loops, int64_t n) {
  View &x = loops.x[0], y = loops.y, place[kMostSlides];
  for (int i = 0; i < loops.slides; ++i) {
    const Slide& s = loops.slide[i];
    loops.size[s.position] = s.size, loops.size[s.tap] = 1;
    x.stride[s.position] = s.x_stride;
    y.stride[s.position] = 0;
    place[i].stride[s.position] = 1;
  }
  return split<kOperands>(loops, n, x, {&x, &y, &place[0], &place[1], &place[2]});
}

}  // namespace

template <>
struct OnGpu<Kind::windows> {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* x, T* y) {
    const Split<kOperands> s = over_y(*l.loops, l.n);
    launch("windows", windows_kernel<T>, step_grid(s.outer.steps), kElementThreads, 0, s, slides_of(*l.loops),
           x, y, launch.table);
  }
  template <class T>
  static void adjoint(const Launcher& launch, const Layer& l, const T* g, bool add, T* grad_x) {
    const Split<kOperands> s = over_x(*l.loops, l.n);
    clear_unless_reached(launch, l.loops->x[0], l.n, s.outer.steps, add, grad_x);
    launch("windows transposed", windows_transposed_kernel<T>, step_grid(s.outer.steps), kElementThreads, 0,
           s, slides_of(*l.loops), g, add, grad_x, launch.table);
  }
};
template struct Implementation<Kind::windows>;

}  // namespace maml::cuda
