// y = a x.
#include "cpu/implement.h"
#include "cpu/run/share.h"

namespace maml::MAML_ISA {

template <>
struct OnCpu<Kind::scale> {
  template <class T>
  static void apply(const Layer& l, const T* x, T* y) {
    const T a = static_cast<T>(l.a);
    share_elements(l.n * size(l.in), [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) y[i] = a * x[i];
    });
  }
  template <class T>
  static void adjoint(const Layer& l, const T* g, bool add, T* grad_x) {
    const T a = static_cast<T>(l.a);
    share_elements(l.n * size(l.in), [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) grad_x[i] = add ? grad_x[i] + a * g[i] : a * g[i];
    });
  }
};
template struct Implementation<Kind::scale>;

}  // namespace maml::MAML_ISA
