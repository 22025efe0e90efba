// y = the sum of x_0 x_1 along the axes that y does not have, for all tasks, with plain multiply-adds in
// row-major order. y and the cotangents of both inputs are the same kind of sum, with the operands in other
// roles: a thread takes an element of the result and sums along the axes that the result does not have. The
// twin on the CPU is cpu/contract.cpp.
#include "cuda/implement.h"
#include "cuda/strided.h"

namespace maml::cuda {
namespace {

/// The operands of the nests: both factors and the result.
enum : int { kA, kB, kResult, kOperands };

/// A term without factors is null.
template <class T>
struct Terms {
  Factors<T> of[2];
};

/// out (+)= the sum of a b over the terms, one term after the other at each step
template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    product_kernel(const __grid_constant__ Split<kOperands> loops, Terms<T> terms, bool add, T* symbolic_out,
                   const Table* table) {
  const Team team = grid_team();
  const int64_t task = blockIdx.z;
  const T *a = resolve(terms.of[0].a, *table, task), *b = resolve(terms.of[0].b, *table, task);
  const T *a2 = resolve(terms.of[1].a, *table, task), *b2 = resolve(terms.of[1].b, *table, task);
  T* out = resolve(symbolic_out, *table, task);
  for (int64_t step = team.first(); step < loops.outer.steps; step += team.step()) {
    const Offsets<kOperands> to = outer_step(loops, step);
    Sum<T> sum;
    each_step(loops.inner, to, [&](const Offsets<kOperands>& at) {
      if (a) sum += a[at.of[kA]] * b[at.of[kB]];
      if (a2) sum += a2[at.of[kA]] * b2[at.of[kB]];
    });
    put(out, to.of[kResult], sum.value(), add);
  }
}

const View& view_of(const Loops& loops, Operand operand) {
  return operand == Operand::y ? loops.y : loops.x[operand == Operand::x1];
}

}  // namespace

template <>
struct OnGpu<Kind::contract> {
  static Footprint footprint(const Layer&) { return {}; }

  template <class T>
  static void product(const Launcher& launch, Tangent tangent, const Layer& l, Operand result,
                      const Factors<T>* factors, int count, bool add, T* out) {
    const Loops& loops = *l.loops;
    const View& to = view_of(loops, result);
    const View& a = view_of(loops, result == Operand::x0 ? Operand::y : Operand::x0);
    const View& b = view_of(loops, result == Operand::x1 ? Operand::y : Operand::x1);
    const Split<kOperands> s = split<kOperands>(loops, l.n, to, {&a, &b, &to});
    clear_unless_reached(launch, to, l.n, s.outer.steps, add, out);
    Terms<T> terms{};
    std::copy_n(factors, count, terms.of);
    launch(tangent == Tangent::yes ? "contract tangent" : "contract", product_kernel<T>,
           step_grid(s.outer.steps), kElementThreads, 0, s, terms, add, out, launch.table);
  }
};
template struct Implementation<Kind::contract>;

}  // namespace maml::cuda
