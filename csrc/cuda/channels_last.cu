// [n, c, h, w] -> [n, h, w, c]
#include "cuda/implement.h"
#include "cuda/transpose.h"

namespace maml::cuda {

template <>
struct OnGpu<Kind::channels_last> {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* x, T* y) {
    transpose(launch, "channels_last", {l.n, l.in.c, l.in.h * l.in.w, false}, x, y);
  }
  template <class T>
  static void adjoint(const Launcher& launch, const Layer& l, const T* g, bool add, T* grad_x) {
    transpose(launch, "channels_last transposed", {l.n, l.in.h * l.in.w, l.in.c, add}, g, grad_x);
  }
};
template struct Implementation<Kind::channels_last>;

}  // namespace maml::cuda
