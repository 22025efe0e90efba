// y = a + b, the sum of a residual network.
#include "cpu/implement.h"
#include "cpu/run/share.h"

namespace maml::MAML_ISA {
namespace {

/// y = a + b, where an absent one is zero.
template <class T>
void sum(int64_t count, const T* a, const T* b, T* y) {
  share_elements(count, [=](int64_t first, int64_t last) {
    if (!a || !b) {
      const T* only = a ? a : b;
      for (int64_t i = first; i < last; ++i) y[i] = only[i];
      return;
    }
    for (int64_t i = first; i < last; ++i) y[i] = a[i] + b[i];
  });
}

template <class T>
void pass_on(int64_t count, const T* g, const bool* add, T* const* grad_x) {
  for (int j = 0; j < 2; ++j) {
    T* to = grad_x[j];
    if (!to) continue;
    share_elements(count, [=](int64_t first, int64_t last) {
      if (add[j]) {
        for (int64_t i = first; i < last; ++i) to[i] += g[i];
      } else {
        for (int64_t i = first; i < last; ++i) to[i] = g[i];
      }
    });
  }
}

}  // namespace

template <>
struct OnCpu<Kind::add> {
  template <class T>
  static void apply(const Layer& l, const T* const* x, T* y) {
    sum(l.n * size(l.in), x[0], x[1], y);
  }
  template <class T>
  static void adjoint(const Layer& l, const T* g, const bool* add, T* const* grad_x) {
    pass_on(l.n * size(l.in), g, add, grad_x);
  }
};
template struct Implementation<Kind::add>;

}  // namespace maml::MAML_ISA
