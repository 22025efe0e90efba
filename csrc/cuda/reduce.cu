// y = the sum or the mean of x along the axes that y does not have, for all tasks. Its adjoint gives each
// element of x the sum of the cotangents of the outputs that contain it (shares.h). The twin on the CPU is
// cpu/reduce.cpp.
#include "cuda/implement.h"
#include "cuda/shares.h"

namespace maml::cuda {
namespace {

/// What the sum is multiplied by: the mean is over all elements of x that one of y depends on.
template <class T>
T scale_of(const Layer& l) {
  if (l.reduction != Reduction::mean) return T(1);
  double count = 1;
  for (int a = 0; a < l.loops->axes; ++a) {
    if (l.loops->y.stride[a] == 0) count *= static_cast<double>(extent(*l.loops, a, l.n));
  }
  return static_cast<T>(1 / count);
}

}  // namespace

template <>
struct OnGpu<Kind::reduce> {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* x, T* y) {
    const Loops& loops = *l.loops;
    sum(launch, "reduce", loops, l.n, loops.x[0], loops.y, scale_of<T>(l), x, false, y);
  }
  template <class T>
  static void adjoint(const Launcher& launch, const Layer& l, const T* g, bool add, T* grad_x) {
    const Loops& loops = *l.loops;
    sum(launch, "reduce transposed", loops, l.n, loops.y, loops.x[0], scale_of<T>(l), g, add, grad_x);
  }
};
template struct Implementation<Kind::reduce>;

}  // namespace maml::cuda
