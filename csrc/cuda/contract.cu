// y = the sum of x_0 x_1 along the axes that y does not have, for all tasks. y and the cotangents of both
// inputs are the same kind of sum, with the operands in other roles (contraction.h). The twin on the CPU is
// cpu/contract.cpp.
#include <algorithm>

#include "cuda/contraction.h"

namespace maml::cuda {
namespace {

Contraction contraction(const Layer& l, Operand result, const char* name) {
  const Loops& loops = *l.loops;
  const View &x0 = loops.x[0], &x1 = loops.x[1], &y = loops.y;
  switch (result) {
    case Operand::x0:
      return {name, loops, l.n, x0, y, x1, l.precision};
    case Operand::x1:
      return {name, loops, l.n, x1, x0, y, l.precision};
    default:
      return {name, loops, l.n, y, x0, x1, l.precision};
  }
}

}  // namespace

template <>
struct OnGpu<Kind::contract> {
  static Footprint footprint(const Layer& l) {
    int64_t scratch = 0;
    for (const Operand result : {Operand::x0, Operand::x1, Operand::y}) {
      scratch = std::max(scratch, contraction_scratch(contraction(l, result, "")));
    }
    return {0, scratch};
  }

  template <class T>
  static void product(const Launcher& launch, Tangent tangent, const Layer& l, Operand result,
                      const Factors<T>* factors, int count, bool add, T* out, T* scratch) {
    const char* name = tangent == Tangent::yes ? "contract tangent" : "contract";
    contract(launch, contraction(l, result, name), factors, count, T(1), add, out, scratch);
  }
};
template struct Implementation<Kind::contract>;

}  // namespace maml::cuda
