// y = parts of x_0, x_1, ..., each at its place in y, which is 0 elsewhere. The adjoint takes each part from
// the cotangent of y. The twin on the GPU is cuda/move.cu.
#include "cpu/implement.h"
#include "cpu/strided.h"

namespace maml::MAML_ISA {

template <>
struct OnCpu<Kind::move> {
  template <class T>
  static void apply(const Layer& l, const T* const* x, T* y) {
    int64_t written = 0;
    for (int j = 0; j < kMostInputs; ++j) {
      if (x[j]) written += iterations(l.loops[j], l.n);
    }
    const View& of_y = l.loops->y;
    if (written < elements(of_y, l.n)) set_to_zero(of_y, l.n, y);
    for (int j = 0; j < kMostInputs; ++j) {
      if (x[j]) assign(l.loops[j], l.n, l.loops[j].y, y, l.loops[j].x[0], x[j]);
    }
  }
  template <class T>
  static void adjoint(const Layer& l, const T* g, const bool* add, T* const* grad_x) {
    for (int j = 0; j < kMostInputs; ++j) {
      if (grad_x[j]) accumulate(l.loops[j], l.n, l.loops[j].x[0], grad_x[j], l.loops[j].y, g, add[j]);
    }
  }
};
template struct Implementation<Kind::move>;

}  // namespace maml::MAML_ISA
