// [n, h, w, c] -> [n, c h w]
#include "cuda/implement.h"
#include "cuda/transpose.h"

namespace maml::cuda {

template <>
struct OnGpu<Kind::flatten> {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* x, T* y) {
    transpose(launch, "flatten", {l.n, l.in.h * l.in.w, l.in.c, false}, x, y);
  }
  template <class T>
  static void adjoint(const Launcher& launch, const Layer& l, const T* g, bool add, T* grad_x) {
    transpose(launch, "flatten transposed", {l.n, l.in.c, l.in.h * l.in.w, add}, g, grad_x);
  }
};
template struct Implementation<Kind::flatten>;

}  // namespace maml::cuda
