// The mean over the whole image: AdaptiveAvgPool2d(1), or a mean over the spatial axes. The twin on the GPU
// is cuda/mean_pool.cu.
#include "cpu/avg_pool.h"
#include "cpu/implement.h"

namespace maml::MAML_ISA {
namespace {

/// The layer as an average pool with one window.
Layer one_window(const Layer& l) {
  Layer pool = l;
  pool.window = {l.in.h, l.in.w, 1, 1, 0, 0};
  pool.count_padding = true;
  return pool;
}

}  // namespace

template <>
struct OnCpu<Kind::mean_pool> {
  template <class T>
  static void apply(const Layer& l, const T* x, T* y) {
    MeanOverWindows::apply(one_window(l), x, y);
  }
  template <class T>
  static void adjoint(const Layer& l, const T* g, bool add, T* grad_x) {
    MeanOverWindows::adjoint(one_window(l), g, add, grad_x);
  }
};
template struct Implementation<Kind::mean_pool>;

}  // namespace maml::MAML_ISA
