// y = x_j, each input seen through its own loops, for all tasks: one copy a part (strided.h). The cotangent
// of an element that a part reads several times is the sum in row-major order. The twin on the CPU is
// cpu/move.cpp.
#include "cuda/implement.h"
#include "cuda/shares.h"

namespace maml::cuda {

template <>
struct OnGpu<Kind::move> {
  /// The parts write different elements; where no part writes, y is 0.
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* const* x, T* y) {
    int64_t written = 0;
    for (int j = 0; j < kMostInputs; ++j) written += x[j] ? iterations(l.loops[j], l.n) : 0;
    const View& whole = l.loops[0].y;
    clear_unless_reached(launch, whole, l.n, written, false, y);
    for (int j = 0; j < kMostInputs; ++j) {
      if (x[j]) copy(launch, l.loops[j], l.n, x[j], y);
    }
  }
  template <class T>
  static void adjoint(const Launcher& launch, const Layer& l, const T* g, const bool* add, T* const* grad_x) {
    for (int j = 0; j < kMostInputs; ++j) {
      if (!grad_x[j]) continue;
      const Loops& loops = l.loops[j];
      sum(launch, "move transposed", loops, l.n, loops.y, loops.x[0], T(1), g, add[j], grad_x[j]);
    }
  }

 private:
  template <class T>
  static void copy(const Launcher& launch, const Loops& loops, int64_t n, const T* x, T* y) {
    const Split<2> s = split<2>(loops, n, loops.y, {&loops.x[0], &loops.y});
    launch("move", sum_kernel<T>, step_grid(s.outer.steps), kElementThreads, 0, s, Shares{}, T(1), x, false,
           y, launch.memory);
  }
};
template struct Implementation<Kind::move>;

}  // namespace maml::cuda
