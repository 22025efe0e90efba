// [n, c, h, w] -> [n, h, w, c]
#include "cpu/implement.h"
#include "cpu/reorder.h"

namespace maml::MAML_ISA {

template <>
struct OnCpu<Kind::channels_last> {
  template <class T>
  static void apply(const Layer& l, const T* x, T* y) {
    reorder(l.n, l.in.c, l.in.h * l.in.w, x, false, y);
  }
  template <class T>
  static void adjoint(const Layer& l, const T* g, bool add, T* grad_x) {
    reorder(l.n, l.in.h * l.in.w, l.in.c, g, add, grad_x);
  }
};
template struct Implementation<Kind::channels_last>;

}  // namespace maml::MAML_ISA
