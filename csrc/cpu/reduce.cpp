// y = the sum or the mean of x over the axes along which y has stride 0. The twin on the GPU is
// cuda/reduce.cu.
#include "cpu/implement.h"
#include "cpu/strided.h"

namespace maml::MAML_ISA {
namespace {

/// 1 for a sum; for a mean, 1 / the number of elements that are summed.
template <class T>
T factor_of(const Layer& l) {
  if (l.reduction == Reduction::sum) return 1;
  int64_t count = 1;
  for (int a = 0; a < l.loops->axes; ++a) {
    if (l.loops->y.stride[a] == 0) count *= extent(*l.loops, a, l.n);
  }
  return T(1) / static_cast<T>(count);
}

}  // namespace

template <>
struct OnCpu<Kind::reduce> {
  template <class T>
  static void apply(const Layer& l, const T* x, T* y) {
    assign(*l.loops, l.n, l.loops->y, y, l.loops->x[0], x, factor_of<T>(l));
  }
  template <class T>
  static void adjoint(const Layer& l, const T* g, bool add, T* grad_x) {
    accumulate(*l.loops, l.n, l.loops->x[0], grad_x, l.loops->y, g, add, factor_of<T>(l));
  }
};
template struct Implementation<Kind::reduce>;

}  // namespace maml::MAML_ISA
