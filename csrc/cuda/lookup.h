// Reading and writing an operand at places that another operand, the index, has along one axis of it
// (layers/loops.h, Axis), for all tasks. A thread takes one step of the axes that the written operand has in
// the loops, and goes over the others in order: it alone writes to these elements, so there are no atomics,
// and sums are in the order of the loops. The twin on the CPU is cpu/lookup.h.
#pragma once

#include "cuda/implement.h"
#include "cuda/strided.h"

namespace maml::cuda {

/// The operands of the nests.
enum : int { kOf, kIndex, kOther, kLookupOperands };

inline Split<kLookupOperands> lookup_loops(const Layer& l, const View& of, const View& by,
                                           const View& other) {
  return split<kLookupOperands>(*l.loops, l.n, by, {&of, &l.loops->x[1], &other});
}

/// to[.] (+)= the sum of of[., index[.]], NaN where the index is outside
template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    look_up_kernel(const __grid_constant__ Split<kLookupOperands> loops, Axis axis, const T* symbolic_of,
                   const T* symbolic_index, bool add, T* symbolic_to, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  const T* of = resolve(symbolic_of, memory, blockIdx.z);
  const T* index = resolve(symbolic_index, memory, blockIdx.z);
  T* to = resolve(symbolic_to, memory, blockIdx.z);
  for (int64_t step = team.first(); step < loops.outer.steps; step += team.step()) {
    const Offsets<kLookupOperands> first = outer_step(loops, step);
    Sum<T> sum;
    each_step(loops.inner, first, [&](const Offsets<kLookupOperands>& at) {
      const int64_t place = place_along(axis.size, index[at.of[kIndex]]);
      sum += place < 0 ? std::numeric_limits<T>::quiet_NaN() : of[at.of[kOf] + place * axis.stride];
    });
    put(to, first.of[kOther], sum.value(), add);
  }
}

/// of[., index[.]] += from[.]; what is outside is left out, or makes the first place NaN
template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    add_up_kernel(const __grid_constant__ Split<kLookupOperands> loops, Axis axis, const T* symbolic_from,
                  const T* symbolic_index, bool outside_is_nan, T* symbolic_of, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  const T* from = resolve(symbolic_from, memory, blockIdx.z);
  const T* index = resolve(symbolic_index, memory, blockIdx.z);
  T* of = resolve(symbolic_of, memory, blockIdx.z);
  for (int64_t step = team.first(); step < loops.outer.steps; step += team.step()) {
    const Offsets<kLookupOperands> first = outer_step(loops, step);
    each_step(loops.inner, first, [&](const Offsets<kLookupOperands>& at) {
      const int64_t place = place_along(axis.size, index[at.of[kIndex]]);
      if (place >= 0) {
        of[at.of[kOf] + place * axis.stride] += from[at.of[kOther]];
      } else if (outside_is_nan) {
        of[at.of[kOf]] = std::numeric_limits<T>::quiet_NaN();
      }
    });
  }
}

/// A thread takes a step of the axes that `to` has in the loops.
template <class T>
void look_up(const Launcher& launch, const char* name, const Layer& l, const View& of_view, const T* of,
             const T* index, const View& to_view, bool add, T* to) {
  const Split<kLookupOperands> s = lookup_loops(l, of_view, to_view, to_view);
  clear_unless_reached(launch, to_view, l.n, s.outer.steps, add, to);
  launch(name, look_up_kernel<T>, step_grid(s.outer.steps), kElementThreads, 0, s, l.loops->axis, of, index,
         add, to, launch.memory);
}

/// A thread takes a step of the axes that `of` has in the loops.
template <class T>
void add_up(const Launcher& launch, const char* name, const Layer& l, const T* from, const View& from_view,
            const T* index, const View& of_view, bool add, bool outside_is_nan, T* of) {
  if (!add) clear(launch, of_view, l.n, of);
  const Split<kLookupOperands> s = lookup_loops(l, of_view, of_view, from_view);
  launch(name, add_up_kernel<T>, step_grid(s.outer.steps), kElementThreads, 0, s, l.loops->axis, from, index,
         outside_is_nan, of, launch.memory);
}

/// The cotangent of an operand that has no derivative.
template <class T>
void give_nothing(const Launcher& launch, const View& view, int64_t n, bool add, T* grad_x) {
  if (grad_x && !add) clear(launch, view, n, grad_x);
}

}  // namespace maml::cuda
