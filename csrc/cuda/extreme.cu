// y = the largest or the smallest x along the axes that y does not have, for all tasks. A NaN wins. amax and
// amin save how many elements are equal to y, and share the derivative among them; max and min save the place
// of the first one, numbered along those axes, which has all of it. With either, the layer is linear, and its
// tangent and adjoint are sums with these shares. Some threads of a block share an element of y (shares.h).
//
// As in torch, a NaN equals no element: the shares of amax and amin are then 0 / 0. Limits: the elements of x
// that one of y has are numbered in 32 bits. The twin on the CPU is cpu/extreme.cpp.
#include "cuda/implement.h"
#include "cuda/shares.h"

namespace maml::cuda {
namespace {

/// Operands of the nests.
enum : int { kX, kY, kPlace, kOperands };

__host__ __device__ constexpr bool takes_first(Reduction r) {
  return r == Reduction::max || r == Reduction::min;
}
__host__ __device__ constexpr bool takes_largest(Reduction r) {
  return r == Reduction::amax || r == Reduction::max;
}

/// Whether a replaces b as the extreme. Nothing replaces a NaN.
template <class T>
__device__ __forceinline__ bool beats(Reduction r, T a, T b) {
  return b == b && (a != a || (takes_largest(r) ? a > b : a < b));
}

/// The loops split by the axes of one operand; the operand kPlace numbers the elements that one of y has.
Split<kOperands> split_by(const Layer& l, const View& by) {
  const Loops& loops = *l.loops;
  View place;
  int64_t count = 1;
  for (int a = loops.axes - 1; a >= 0; --a) {
    if (loops.y.stride[a] != 0) continue;
    place.stride[a] = count;
    count *= extent(loops, a, l.n);
  }
  return split<kOperands>(loops, l.n, by, {&loops.x[0], &loops.y, &place});
}

/// The extreme of some elements, its first place, and how many are equal to it.
template <class T>
struct Found {
  T best;
  int32_t place, ties;
};

template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    forward_kernel(const __grid_constant__ Split<kOperands> loops, Shares shares, Reduction reduction,
                   const T* symbolic_x, T* symbolic_y, int32_t* symbolic_chosen, Deferred deferred) {
  const Memory memory = deferred.ready();
  const T* x = resolve(symbolic_x, memory, blockIdx.z);
  T* y = resolve(symbolic_y, memory, blockIdx.z);
  int32_t* chosen = resolve(symbolic_chosen, memory, blockIdx.z);
  Sharer sharer(shares);
  sharer.each(grid_team(), loops.outer.steps, [&](int64_t step) {
    const Offsets<kOperands> from = outer_step(loops, step);
    Found<T> own{x[from.of[kX]], INT32_MAX, 0};  // to begin with, at no place
    sharer.each_step(loops.inner, from, [&](const Offsets<kOperands>& at) {
      const T value = x[at.of[kX]];
      if (own.place == INT32_MAX || beats(reduction, value, own.best)) {
        own = {value, static_cast<int32_t>(at.of[kPlace]), 0};
      }
      own.ties += value == own.best;
    });
    const Found<T> found = sharer.combined(own, [&](const Found<T>& a, const Found<T>& b) {
      if (beats(reduction, a.best, b.best)) return a;
      if (beats(reduction, b.best, a.best)) return b;
      return Found<T>{a.best, a.place < b.place ? a.place : b.place, a.ties + b.ties};
    });
    if (!sharer.is_first()) return;
    y[from.of[kY]] = found.best;
    chosen[from.of[kY]] = takes_first(reduction) ? found.place : found.ties;
  });
}

/// The share of an element of x in the derivative of its y, times a number.
template <class T>
__device__ __forceinline__ T shared(Reduction reduction, const Offsets<kOperands>& at, const T* x, const T* y,
                                    const int32_t* chosen, T number) {
  const int32_t choice = chosen[at.of[kY]];
  if (takes_first(reduction)) return choice == at.of[kPlace] ? number : T(0);
  const bool tie = x[at.of[kX]] == y[at.of[kY]];
  return (tie ? number : T(0)) / static_cast<T>(choice);
}

/// y_dot = the sum of the shares of x_dot; split by y
template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    tangent_kernel(const __grid_constant__ Split<kOperands> loops, Shares shares, Reduction reduction,
                   const T* symbolic_x, const T* symbolic_y, const int32_t* symbolic_chosen,
                   const T* symbolic_x_dot, T* symbolic_y_dot, Deferred deferred) {
  const Memory memory = deferred.ready();
  const T *x = resolve(symbolic_x, memory, blockIdx.z), *y = resolve(symbolic_y, memory, blockIdx.z);
  const T* x_dot = resolve(symbolic_x_dot, memory, blockIdx.z);
  const int32_t* chosen = resolve(symbolic_chosen, memory, blockIdx.z);
  T* y_dot = resolve(symbolic_y_dot, memory, blockIdx.z);
  Sharer sharer(shares);
  sharer.each(grid_team(), loops.outer.steps, [&](int64_t step) {
    const Offsets<kOperands> to = outer_step(loops, step);
    Sum<T> own;
    sharer.each_step(loops.inner, to, [&](const Offsets<kOperands>& at) {
      own += shared(reduction, at, x, y, chosen, x_dot[at.of[kX]]);
    });
    const T sum = sharer.sum(own);
    if (sharer.is_first()) y_dot[to.of[kY]] = sum;
  });
}

/// grad_x (+)= the sum of the shares of g; split by x
template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    cotangent_kernel(const __grid_constant__ Split<kOperands> loops, Reduction reduction, const T* symbolic_x,
                     const T* symbolic_y, const int32_t* symbolic_chosen, const T* symbolic_g, bool add,
                     T* symbolic_grad_x, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  const T *x = resolve(symbolic_x, memory, blockIdx.z), *y = resolve(symbolic_y, memory, blockIdx.z);
  const T* g = resolve(symbolic_g, memory, blockIdx.z);
  const int32_t* chosen = resolve(symbolic_chosen, memory, blockIdx.z);
  T* grad_x = resolve(symbolic_grad_x, memory, blockIdx.z);
  for (int64_t step = team.first(); step < loops.outer.steps; step += team.step()) {
    const Offsets<kOperands> to = outer_step(loops, step);
    Sum<T> sum;
    each_step(loops.inner, to, [&](const Offsets<kOperands>& at) {
      sum += shared(reduction, at, x, y, chosen, g[at.of[kY]]);
    });
    put(grad_x, to.of[kX], sum.value(), add);
  }
}

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const Split<kOperands> loops = split_by(l, l.loops->y);
  const Shares shares = shares_of(loops, kX);
  launch("extreme forward", forward_kernel<T>, shared_grid(shares, loops.outer.steps), kElementThreads, 0,
         loops, shares, l.reduction, t.x[0], t.y, choice_of(t), launch.memory);
}

template <class T>
void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const Split<kOperands> loops = split_by(l, l.loops->y);
  const Shares shares = shares_of(loops, kX);
  launch("extreme forward tangent", tangent_kernel<T>, shared_grid(shares, loops.outer.steps),
         kElementThreads, 0, loops, shares, l.reduction, t.x[0], t.y, choice_of(t), t.x_dot[0], t.y_dot,
         launch.memory);
}

/// Of g, or of its tangent.
template <class T>
void give(const Launcher& launch, const char* name, const Layer& l, const Tensors<T>& t, const T* g,
          T* grad_x) {
  if (!grad_x) return;
  const View& x = l.loops->x[0];
  const Split<kOperands> loops = split_by(l, x);
  clear_unless_reached(launch, x, l.n, loops.outer.steps, t.add_x[0], grad_x);
  launch(name, cotangent_kernel<T>, step_grid(loops.outer.steps), kElementThreads, 0, loops, l.reduction,
         t.x[0], t.y, choice_of(t), g, t.add_x[0], grad_x, launch.memory);
}
template <class T>
void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  give(launch, "extreme backward", l, t, t.grad_y, t.grad_x[0]);
}
template <class T>
void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  give(launch, "extreme backward tangent", l, t, t.grad_y_dot, t.grad_x_dot[0]);
}

}  // namespace

template <>
struct OnGpu<Kind::extreme> {
  static Footprint footprint(const Layer& l) { return {elements(l.loops->y, l.n)}; }
  template <class T>
  static LaunchPasses<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::extreme>;

}  // namespace maml::cuda
