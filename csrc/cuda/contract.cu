// y = the sum of x_0 x_1 along the axes that y does not have, for all tasks. y and the cotangents of both
// inputs are the same kind of sum, with the operands in other roles (contraction.h). The twin on the CPU is
// cpu/contract.cpp.
#include "cuda/contraction.h"

namespace maml::cuda {
namespace {

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
    const View& a = view_of(loops, result == Operand::x0 ? Operand::y : Operand::x0);
    const View& b = view_of(loops, result == Operand::x1 ? Operand::y : Operand::x1);
    Terms<T> terms{};
    std::copy_n(factors, count, terms.of);
    cuda::product(launch, tangent == Tangent::yes ? "contract tangent" : "contract", loops, l.n,
                  view_of(loops, result), a, b, terms, T(1), add, out);
  }
};
template struct Implementation<Kind::contract>;

}  // namespace maml::cuda
