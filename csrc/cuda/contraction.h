// out = the sum of a b along the axes that out does not have, for all tasks, with plain multiply-adds in
// row-major order: a thread takes an element of the result and sums along the axes that the result does not
// have (strided.h). Any of the products of a contraction, and of an attention, is such a sum.
#pragma once

#include "cuda/implement.h"
#include "cuda/strided.h"

namespace maml::cuda {

/// The operands of the nests of a product: both factors and the result.
enum : int { kFactorA, kFactorB, kResult, kProductOperands };

/// A term without factors is null.
template <class T>
struct Terms {
  Factors<T> of[2];
};

/// out (+)= scale times the sum of a b over the terms, one term after the other at each step
template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    product_kernel(const __grid_constant__ Split<kProductOperands> loops, Terms<T> terms, T scale, bool add,
                   T* symbolic_out, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  const int64_t task = blockIdx.z;
  const T *a = resolve(terms.of[0].a, memory, task), *b = resolve(terms.of[0].b, memory, task);
  const T *a2 = resolve(terms.of[1].a, memory, task), *b2 = resolve(terms.of[1].b, memory, task);
  T* out = resolve(symbolic_out, memory, task);
  for (int64_t step = team.first(); step < loops.outer.steps; step += team.step()) {
    const Offsets<kProductOperands> to = outer_step(loops, step);
    Sum<T> sum;
    each_step(loops.inner, to, [&](const Offsets<kProductOperands>& at) {
      if (a) sum += a[at.of[kFactorA]] * b[at.of[kFactorB]];
      if (a2) sum += a2[at.of[kFactorA]] * b2[at.of[kFactorB]];
    });
    put(out, to.of[kResult], scale * sum.value(), add);
  }
}

/// out, seen as `to`, (+)= scale times the sum of the terms, whose factors are seen as `a` and `b`.
template <class T>
void product(const Launcher& launch, const char* name, const Loops& loops, int64_t n, const View& to,
             const View& a, const View& b, const Terms<T>& terms, T scale, bool add, T* out) {
  const Split<kProductOperands> s = split<kProductOperands>(loops, n, to, {&a, &b, &to});
  clear_unless_reached(launch, to, n, s.outer.steps, add, out);
  launch(name, product_kernel<T>, step_grid(s.outer.steps), kElementThreads, 0, s, terms, scale, add, out,
         launch.memory);
}

}  // namespace maml::cuda
