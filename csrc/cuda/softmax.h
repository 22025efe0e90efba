// Softmax and its logarithm over the last axis of their loops, for all tasks; the formulas are in
// layers/softmax.h and layers/log_softmax.h. Some threads of a block share a row (shares.h). They read y and
// y_dot in place of x and x_dot, because the derivatives depend on them alone. Where x is broadcast, the
// threads of a row of x go over all rows of y that read it and add to the cotangent, in row-major order.
//
// Numerics: the largest element is subtracted before exp, so that nothing overflows. As in torch, a row of
// -inf alone gives NaN.
#pragma once

#include "cuda/implement.h"
#include "cuda/shares.h"

namespace maml::cuda {

/// What the two kinds do with an element of a row. below: x - the largest x. s: the probability. A: the sum
/// of `share` over the row; RA: its tangent. B: the sum of s x_dot.
struct Softmax {
  template <class T>
  static __device__ T scale(T sum) {
    return 1 / sum;
  }
  template <class T>
  static __device__ T value(T below, T scale) {
    return std::exp(below) * scale;
  }
  template <class T>
  static __device__ T probability(T y) {
    return y;
  }
  template <class T>
  static __device__ T share(T s, T g) {
    return s * g;
  }
  template <class T>
  static __device__ T share_dot(T s, T y_dot, T g, T g_dot) {
    return y_dot * g + s * g_dot;
  }
  template <class T>
  static __device__ T tangent(T s, T x_dot, T B) {
    return s * (x_dot - B);
  }
  template <class T>
  static __device__ T cotangent(T s, T g, T A) {
    return s * (g - A);
  }
  template <class T>
  static __device__ T cotangent_dot(T s, T y_dot, T g, T g_dot, T A, T RA) {
    return y_dot * (g - A) + s * (g_dot - RA);
  }
};

struct LogSoftmax {
  template <class T>
  static __device__ T scale(T sum) {
    return std::log(sum);
  }
  template <class T>
  static __device__ T value(T below, T scale) {
    return below - scale;
  }
  template <class T>
  static __device__ T probability(T y) {
    return std::exp(y);
  }
  template <class T>
  static __device__ T share(T, T g) {
    return g;
  }
  template <class T>
  static __device__ T share_dot(T, T, T, T g_dot) {
    return g_dot;
  }
  template <class T>
  static __device__ T tangent(T, T x_dot, T B) {
    return x_dot - B;
  }
  template <class T>
  static __device__ T cotangent(T s, T g, T A) {
    return g - s * A;
  }
  template <class T>
  static __device__ T cotangent_dot(T s, T y_dot, T, T g_dot, T A, T RA) {
    return g_dot - s * (y_dot * A + RA);
  }
};

/// Rows along the last axis of the loops.
struct Rows {
  Split<2> loops;  // the axes before the last, of x and y
  int64_t length = 1, x_stride = 0, y_stride = 0;
  Shares shares;

  /// Calls f(i) for a thread's share of a row's elements.
  template <class F>
  __device__ __forceinline__ void each(const Sharer& sharer, F f) const {
#pragma unroll 4
    for (int64_t i = sharer.share(); i < length; i += sharer.sharers()) f(i);
  }
};

/// Rows by the axes that x or y has.
inline Rows rows_of(const Layer& l, const View& by) {
  const Loops& loops = *l.loops;
  const View &x = loops.x[0], &y = loops.y;
  Loops before = loops;
  before.axes = std::max(loops.axes - 1, 0);
  Rows rows;
  rows.loops = split<2>(before, l.n, by, {&x, &y});
  if (loops.axes > 0) {
    const int last = loops.axes - 1;
    rows.length = extent(loops, last, l.n), rows.x_stride = x.stride[last], rows.y_stride = y.stride[last];
  }
  // Where all elements of a row of x are one, a thread takes the whole row, so that it alone adds to its
  // cotangent.
  const bool alone = rows.x_stride == 0 && rows.length > 1;
  if (!alone) rows.shares = shares_of(rows.loops.outer.steps, rows.length, std::abs(rows.y_stride) == 1);
  return rows;
}

template <class Form, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    softmax_forward(const __grid_constant__ Rows rows, const T* symbolic_x, T* symbolic_y,
                    Deferred deferred) {
  const Memory memory = deferred.ready();
  const T* of_x = resolve(symbolic_x, memory, blockIdx.z);
  T* of_y = resolve(symbolic_y, memory, blockIdx.z);
  Sharer sharer(rows.shares);
  sharer.each(grid_team(), rows.loops.outer.steps, [&](int64_t row) {
    const Offsets<2> at = outer_step(rows.loops, row);
    const T* x = of_x + at.of[0];
    T* y = of_y + at.of[1];
    T own = x[sharer.share() * rows.x_stride];
    rows.each(sharer, [&](int64_t i) {
      if (x[i * rows.x_stride] > own) own = x[i * rows.x_stride];
    });
    const T largest = sharer.combined(own, [](T a, T b) { return b > a ? b : a; });
    Sum<T> sum;
    rows.each(sharer, [&](int64_t i) { sum += std::exp(x[i * rows.x_stride] - largest); });
    const T scale = Form::scale(sharer.sum(sum));
    if (!sharer.exists()) return;
    rows.each(sharer,
              [&](int64_t i) { y[i * rows.y_stride] = Form::value(x[i * rows.x_stride] - largest, scale); });
  });
}

template <class Form, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    softmax_tangent(const __grid_constant__ Rows rows, const T* symbolic_y, const T* symbolic_x_dot,
                    T* symbolic_y_dot, Deferred deferred) {
  const Memory memory = deferred.ready();
  const T* of_y = resolve(symbolic_y, memory, blockIdx.z);
  const T* of_x_dot = resolve(symbolic_x_dot, memory, blockIdx.z);
  T* of_y_dot = resolve(symbolic_y_dot, memory, blockIdx.z);
  Sharer sharer(rows.shares);
  sharer.each(grid_team(), rows.loops.outer.steps, [&](int64_t row) {
    const Offsets<2> at = outer_step(rows.loops, row);
    const T *y = of_y + at.of[1], *x_dot = of_x_dot + at.of[0];
    T* y_dot = of_y_dot + at.of[1];
    Sum<T> own;
    rows.each(sharer,
              [&](int64_t i) { own += Form::probability(y[i * rows.y_stride]) * x_dot[i * rows.x_stride]; });
    const T B = sharer.sum(own);
    if (!sharer.exists()) return;
    rows.each(sharer, [&](int64_t i) {
      const T s = Form::probability(y[i * rows.y_stride]);
      y_dot[i * rows.y_stride] = Form::tangent(s, x_dot[i * rows.x_stride], B);
    });
  });
}

/// grad_x (+)= what y and g give
template <class Form, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    softmax_cotangent(const __grid_constant__ Rows rows, const T* symbolic_y, const T* symbolic_g, bool add,
                      T* symbolic_grad_x, Deferred deferred) {
  const Memory memory = deferred.ready();
  const T *of_y = resolve(symbolic_y, memory, blockIdx.z), *of_g = resolve(symbolic_g, memory, blockIdx.z);
  T* grad_x = resolve(symbolic_grad_x, memory, blockIdx.z);
  Sharer sharer(rows.shares);
  sharer.each(grid_team(), rows.loops.outer.steps, [&](int64_t row) {
    each_step(rows.loops.inner, outer_step(rows.loops, row), [&](const Offsets<2>& at) {
      const T *y = of_y + at.of[1], *g = of_g + at.of[1];
      Sum<T> own;
      rows.each(sharer, [&](int64_t i) {
        own += Form::share(Form::probability(y[i * rows.y_stride]), g[i * rows.y_stride]);
      });
      const T A = sharer.sum(own);
      if (!sharer.exists()) return;
      rows.each(sharer, [&](int64_t i) {
        const int64_t from = i * rows.y_stride;
        put(grad_x, at.of[0] + i * rows.x_stride, Form::cotangent(Form::probability(y[from]), g[from], A),
            add);
      });
    });
  });
}

/// grad_x_dot (+)= what y, y_dot, g and g_dot give; y_dot and g may be absent.
template <class Form, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    softmax_cotangent_dot(const __grid_constant__ Rows rows, const T* symbolic_y, const T* symbolic_y_dot,
                          const T* symbolic_g, const T* symbolic_g_dot, bool add, T* symbolic_grad_x_dot,
                          Deferred deferred) {
  const Memory memory = deferred.ready();
  const T *y = resolve(symbolic_y, memory, blockIdx.z), *y_dot = resolve(symbolic_y_dot, memory, blockIdx.z);
  const T *g = resolve(symbolic_g, memory, blockIdx.z), *g_dot = resolve(symbolic_g_dot, memory, blockIdx.z);
  T* grad_x_dot = resolve(symbolic_grad_x_dot, memory, blockIdx.z);
  /// Calls f(s, y_dot, g, g_dot) at an element of y.
  const auto known = [&](int64_t at, auto f) {
    return f(Form::probability(y[at]), y_dot ? y_dot[at] : T(0), g ? g[at] : T(0), g_dot[at]);
  };
  Sharer sharer(rows.shares);
  sharer.each(grid_team(), rows.loops.outer.steps, [&](int64_t row) {
    each_step(rows.loops.inner, outer_step(rows.loops, row), [&](const Offsets<2>& at) {
      Sum<T> own, own_dot;
      rows.each(sharer, [&](int64_t i) {
        known(at.of[1] + i * rows.y_stride, [&](T s, T yd, T c, T cd) {
          own += Form::share(s, c);
          own_dot += Form::share_dot(s, yd, c, cd);
        });
      });
      const T A = sharer.sum(own), RA = sharer.sum(own_dot);
      if (!sharer.exists()) return;
      rows.each(sharer, [&](int64_t i) {
        const T value = known(at.of[1] + i * rows.y_stride,
                              [&](T s, T yd, T c, T cd) { return Form::cotangent_dot(s, yd, c, cd, A, RA); });
        put(grad_x_dot, at.of[0] + i * rows.x_stride, value, add);
      });
    });
  });
}

/// The passes of the kind whose form it is.
template <class Form>
struct SoftmaxPasses {
  template <class T>
  static void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    const Rows rows = rows_of(l, l.loops->y);
    launch("softmax forward", softmax_forward<Form, T>, shared_grid(rows.shares, rows.loops.outer.steps),
           kElementThreads, 0, rows, t.x[0], t.y, launch.memory);
  }
  template <class T>
  static void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    if (!t.grad_x[0]) return;
    const Rows rows = rows_of(l, l.loops->x[0]);
    const bool add = cleared(launch, l, t.add_x[0], t.grad_x[0]);
    launch("softmax backward", softmax_cotangent<Form, T>, shared_grid(rows.shares, rows.loops.outer.steps),
           kElementThreads, 0, rows, t.y, t.grad_y, add, t.grad_x[0], launch.memory);
  }
  template <class T>
  static void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    const Rows rows = rows_of(l, l.loops->y);
    launch("softmax forward tangent", softmax_tangent<Form, T>,
           shared_grid(rows.shares, rows.loops.outer.steps), kElementThreads, 0, rows, t.y, t.x_dot[0],
           t.y_dot, launch.memory);
  }
  template <class T>
  static void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    if (!t.grad_x_dot[0]) return;
    const Rows rows = rows_of(l, l.loops->x[0]);
    const bool add = cleared(launch, l, t.add_x[0], t.grad_x_dot[0]);
    launch("softmax backward tangent", softmax_cotangent_dot<Form, T>,
           shared_grid(rows.shares, rows.loops.outer.steps), kElementThreads, 0, rows, t.y,
           t.x_dot[0] ? t.y_dot : nullptr, t.grad_y, t.grad_y_dot, add, t.grad_x_dot[0], launch.memory);
  }

 private:
  /// Whether a pass adds to the cotangent: also where it comes to an element several times or not at all,
  /// and all elements have therefore been set to 0.
  template <class T>
  static bool cleared(const Launcher& launch, const Layer& l, bool add, T* grad_x) {
    const View& x = l.loops->x[0];
    if (!add && !x.whole) clear(launch, x, l.n, grad_x);
    return add || !x.whole;
  }
};

}  // namespace maml::cuda
