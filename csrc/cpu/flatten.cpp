// [n, h, w, c] -> [n, c h w]
#include "cpu/implement.h"
#include "cpu/reorder.h"

namespace maml::MAML_ISA {

template <>
struct OnCpu<Kind::flatten> {
  template <class T>
  static void apply(const Layer& l, const T* x, T* y) {
    reorder(l.n, l.in.h * l.in.w, l.in.c, x, false, y);
  }
  template <class T>
  static void adjoint(const Layer& l, const T* g, bool add, T* grad_x) {
    reorder(l.n, l.in.c, l.in.h * l.in.w, g, add, grad_x);
  }
};
template struct Implementation<Kind::flatten>;

}  // namespace maml::MAML_ISA
