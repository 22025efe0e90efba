// y = the windows of x, 0 where they leave it. Each tap of a window is a copy: its elements of x, for all
// positions at which it is inside, form a strided view. The adjoint adds the taps in ascending order. The
// twin on the GPU is cuda/windows.cu.
#include "cpu/implement.h"
#include "cpu/slides.h"
#include "cpu/strided.h"

namespace maml::MAML_ISA {
namespace {

/// Narrows the loops to one tap of a slide and the positions at which it is inside x. Returns whether there
/// are any.
bool narrow(Loops& loops, const Slide& s, int64_t tap) {
  const int64_t start = tap * s.dilation - s.padding;  // of position 0
  const auto [first, end] = inside(start, s.stride, s.size, loops.size[s.position]);
  loops.size[s.position] = end - first, loops.size[s.tap] = 1;
  loops.x[0].stride[s.position] = s.stride * s.x_stride;
  loops.x[0].offset += (first * s.stride + start) * s.x_stride;
  loops.y.offset += first * loops.y.stride[s.position] + tap * loops.y.stride[s.tap];
  return first < end;
}

/// f(the loops over the positions at which it is inside) for each tap of the window, in ascending order.
template <class F>
void each_tap(const Loops& loops, F f) {
  int64_t taps = 1;
  for (int i = 0; i < loops.slides; ++i) taps *= loops.size[loops.slide[i].tap];
  for (int64_t tap = 0; tap < taps; ++tap) {
    Loops own = loops;
    bool any = true;
    for (int64_t i = loops.slides - 1, rest = tap; i >= 0; --i) {
      const int64_t kernel = loops.size[loops.slide[i].tap];
      any &= narrow(own, loops.slide[i], rest % kernel);
      rest /= kernel;
    }
    if (any) f(own);
  }
}

/// Whether no window leaves x.
bool all_inside(const Loops& loops) {
  for (int i = 0; i < loops.slides; ++i) {
    const Slide& s = loops.slide[i];
    const int64_t last =
        (loops.size[s.position] - 1) * s.stride + (loops.size[s.tap] - 1) * s.dilation - s.padding;
    if (s.padding > 0 || last >= s.size) return false;
  }
  return true;
}

}  // namespace

template <>
struct OnCpu<Kind::windows> {
  template <class T>
  static void apply(const Layer& l, const T* x, T* y) {
    const Loops& loops = *l.loops;
    if (!all_inside(loops)) set_to_zero(loops.y, l.n, y);
    each_tap(loops, [&](const Loops& tap) { assign(tap, l.n, tap.y, y, tap.x[0], x); });
  }
  template <class T>
  static void adjoint(const Layer& l, const T* g, bool add, T* grad_x) {
    const Loops& loops = *l.loops;
    if (!add) set_to_zero(loops.x[0], l.n, grad_x);
    each_tap(loops, [&](const Loops& tap) { accumulate(tap, l.n, tap.x[0], grad_x, tap.y, g, true); });
  }
};
template struct Implementation<Kind::windows>;

}  // namespace maml::MAML_ISA
