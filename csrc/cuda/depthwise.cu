// y = the sum over taps of x w, channel by channel, and its two adjoints, for all tasks, without windows in
// memory. y and the cotangent of w are sums of products at windows of x, over the taps and over all
// positions; where there are many, some threads of a block share an element (shares.h), and a warp takes
// consecutive channels. An element of x, which a thread takes, sums over the windows that contain it, in
// ascending order of their taps. The twin on the CPU is cpu/depthwise.cpp.
#include "cuda/implement.h"
#include "cuda/shares.h"
#include "cuda/slides.h"

namespace maml::cuda {
namespace {

/// The operands of the nests: x, y, w, and the place along each axis of x over which the window slides.
enum : int { kX, kY, kW, kPlace, kOperands = kPlace + kMostSlides };

/// A term without factors is null.
template <class T>
struct Terms {
  Factors<T> of[2];
};

/// out (+)= the sum of a b where a window is inside of x: y, of x and w, or the cotangent of w, of x and g.
template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    depthwise_kernel(const __grid_constant__ Split<kOperands> loops, const __grid_constant__ Slides slides,
                     Shares shares, Terms<T> terms, bool to_w, bool add, T* symbolic_out, Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  const T *a = resolve(terms.of[0].a, memory, task), *b = resolve(terms.of[0].b, memory, task);
  const T *a2 = resolve(terms.of[1].a, memory, task), *b2 = resolve(terms.of[1].b, memory, task);
  T* out = resolve(symbolic_out, memory, task);
  Sharer sharer(shares);
  sharer.each(grid_team(), loops.outer.steps, [&](int64_t step) {
    const Offsets<kOperands> to = outer_step(loops, step);
    Sum<T> own;
    sharer.each_step(loops.inner, to, [&](const Offsets<kOperands>& at) {
      if (!is_inside(slides, at.of + kPlace)) return;
      const int64_t x = at.of[kX], other = to_w ? at.of[kY] : at.of[kW];
      if (a) own += a[x] * b[other];
      if (a2) own += a2[x] * b2[other];
    });
    const T sum = sharer.sum(own);
    if (sharer.is_first()) put(out, to_w ? to.of[kW] : to.of[kY], sum, add);
  });
}

/// grad_x (+)= the sum of g w over the windows that contain an element of x.
template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    depthwise_transposed_kernel(const __grid_constant__ Split<kOperands> loops,
                                const __grid_constant__ Slides slides, Terms<T> terms, bool add,
                                T* symbolic_grad_x, Deferred deferred) {
  const Memory memory = deferred.ready();
  static_assert(kMostSlides == 3);
  const Team team = grid_team();
  const int64_t task = blockIdx.z;
  const T *g = resolve(terms.of[0].a, memory, task), *w = resolve(terms.of[0].b, memory, task);
  const T *g2 = resolve(terms.of[1].a, memory, task), *w2 = resolve(terms.of[1].b, memory, task);
  T* grad_x = resolve(symbolic_grad_x, memory, task);
  const Taps &outer = slides.of[0], &middle = slides.of[1], &inner = slides.of[2];
  for (int64_t step = team.first(); step < loops.outer.steps; step += team.step()) {
    const Offsets<kOperands> at = outer_step(loops, step);
    Sum<T> sum;
    each_tap(outer, at.of[kPlace], [&](int64_t p, int64_t i) {
      each_tap(middle, at.of[kPlace + 1], [&](int64_t q, int64_t j) {
        const int64_t of_y = at.of[kY] + p * outer.y_position + q * middle.y_position;
        const int64_t of_w = at.of[kW] + i * outer.w_tap + j * middle.w_tap;
        each_tap(inner, at.of[kPlace + 2], [&](int64_t r, int64_t k) {
          const int64_t from = of_y + r * inner.y_position, tap = of_w + k * inner.w_tap;
          if (g) sum += g[from] * w[tap];
          if (g2) sum += g2[from] * w2[tap];
        });
      });
    });
    put(grad_x, at.of[kX], sum.value(), add);
  }
}

}  // namespace

template <>
struct OnGpu<Kind::depthwise> {
  static Footprint footprint(const Layer&) { return {}; }

  template <class T>
  static void product(const Launcher& launch, Tangent tangent, const Layer& l, Operand result,
                      const Factors<T>* factors, int count, bool add, T* out, T*) {
    const bool to_x = result == Operand::x0, to_w = result == Operand::x1;
    const Placed at = to_x ? at_elements(*l.loops) : at_windows(*l.loops);
    const View &x = at.loops.x[0], &w = at.loops.x[1], &y = at.loops.y;
    const View& to = to_x ? x : to_w ? w : y;
    const Split<kOperands> s =
        split<kOperands>(at.loops, l.n, to, {&x, &y, &w, &at.place[0], &at.place[1], &at.place[2]});
    const Slides slides = slides_of(*l.loops);
    Terms<T> terms{};
    std::copy_n(factors, count, terms.of);
    clear_unless_reached(launch, to, l.n, s.outer.steps, add, out);
    if (to_x) {
      launch("depthwise transposed", depthwise_transposed_kernel<T>, step_grid(s.outer.steps),
             kElementThreads, 0, s, slides, terms, add, out, launch.memory);
    } else {
      const Shares shares = shares_of(s, to_w ? kX : kY);
      launch(tangent == Tangent::yes ? "depthwise tangent" : "depthwise", depthwise_kernel<T>,
             shared_grid(shares, s.outer.steps), kElementThreads, 0, s, slides, shares, terms, to_w, add, out,
             launch.memory);
    }
  }
};
template struct Implementation<Kind::depthwise>;

}  // namespace maml::cuda
