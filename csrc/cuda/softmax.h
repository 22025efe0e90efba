// Softmax and its logarithm over the last axis of their loops, for all tasks; the formulas are in
// layers/softmax.h and layers/log_softmax.h. A thread takes a row, and reads y and y_dot in place of x and
// x_dot, because the derivatives depend on them alone. Where x is broadcast, the thread of a row of x goes
// over all rows of y that read it and adds to the cotangent, in row-major order.
//
// Numerics: the largest element is subtracted before exp, so that nothing overflows. As in torch, a row of
// -inf alone gives NaN.
#pragma once

#include "cuda/implement.h"
#include "cuda/strided.h"

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
};

/// Rows by the axes that x or y has.
inline Rows rows_of(const Layer& l, const View& by) {
  const Loops& loops = *l.loops;
  const View &x = loops.x[0], &y = loops.y;
  Loops before = loops;
  before.axes = std::max(loops.axes - 1, 0);
  Rows rows{split<2>(before, l.n, by, {&x, &y})};
  if (loops.axes > 0) {
    const int last = loops.axes - 1;
    rows.length = extent(loops, last, l.n), rows.x_stride = x.stride[last], rows.y_stride = y.stride[last];
  }
  return rows;
}

template <class Form, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    softmax_forward(const __grid_constant__ Rows rows, const T* symbolic_x, T* symbolic_y,
                    Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  const int64_t length = rows.length;
  for (int64_t row = team.first(); row < rows.loops.outer.steps; row += team.step()) {
    const Offsets<2> at = outer_step(rows.loops, row);
    const T* x = resolve(symbolic_x, memory, blockIdx.z) + at.of[0];
    T* y = resolve(symbolic_y, memory, blockIdx.z) + at.of[1];
    T largest = x[0];
    Sum<T> sum;
    for (int64_t i = 1; i < length; ++i) {
      if (x[i * rows.x_stride] > largest) largest = x[i * rows.x_stride];
    }
    for (int64_t i = 0; i < length; ++i) sum += std::exp(x[i * rows.x_stride] - largest);
    const T scale = Form::scale(sum.value());
    for (int64_t i = 0; i < length; ++i) {
      y[i * rows.y_stride] = Form::value(x[i * rows.x_stride] - largest, scale);
    }
  }
}

template <class Form, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    softmax_tangent(const __grid_constant__ Rows rows, const T* symbolic_y, const T* symbolic_x_dot,
                    T* symbolic_y_dot, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  for (int64_t row = team.first(); row < rows.loops.outer.steps; row += team.step()) {
    const Offsets<2> at = outer_step(rows.loops, row);
    const T* y = resolve(symbolic_y, memory, blockIdx.z) + at.of[1];
    const T* x_dot = resolve(symbolic_x_dot, memory, blockIdx.z) + at.of[0];
    T* y_dot = resolve(symbolic_y_dot, memory, blockIdx.z) + at.of[1];
    Sum<T> B;
    for (int64_t i = 0; i < rows.length; ++i) {
      B += Form::probability(y[i * rows.y_stride]) * x_dot[i * rows.x_stride];
    }
    for (int64_t i = 0; i < rows.length; ++i) {
      const T s = Form::probability(y[i * rows.y_stride]);
      y_dot[i * rows.y_stride] = Form::tangent(s, x_dot[i * rows.x_stride], B.value());
    }
  }
}

/// grad_x (+)= what y and g give
template <class Form, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    softmax_cotangent(const __grid_constant__ Rows rows, const T* symbolic_y, const T* symbolic_g, bool add,
                      T* symbolic_grad_x, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  T* grad_x = resolve(symbolic_grad_x, memory, blockIdx.z);
  for (int64_t row = team.first(); row < rows.loops.outer.steps; row += team.step()) {
    each_step(rows.loops.inner, outer_step(rows.loops, row), [&](const Offsets<2>& at) {
      const T* y = resolve(symbolic_y, memory, blockIdx.z) + at.of[1];
      const T* g = resolve(symbolic_g, memory, blockIdx.z) + at.of[1];
      Sum<T> A;
      for (int64_t i = 0; i < rows.length; ++i) {
        A += Form::share(Form::probability(y[i * rows.y_stride]), g[i * rows.y_stride]);
      }
      for (int64_t i = 0; i < rows.length; ++i) {
        const int64_t from = i * rows.y_stride;
        put(grad_x, at.of[0] + i * rows.x_stride,
            Form::cotangent(Form::probability(y[from]), g[from], A.value()), add);
      }
    });
  }
}

/// grad_x_dot (+)= what y, y_dot, g and g_dot give; y_dot and g may be absent.
template <class Form, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    softmax_cotangent_dot(const __grid_constant__ Rows rows, const T* symbolic_y, const T* symbolic_y_dot,
                          const T* symbolic_g, const T* symbolic_g_dot, bool add, T* symbolic_grad_x_dot,
                          Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  const T *y = resolve(symbolic_y, memory, blockIdx.z), *y_dot = resolve(symbolic_y_dot, memory, blockIdx.z);
  const T *g = resolve(symbolic_g, memory, blockIdx.z), *g_dot = resolve(symbolic_g_dot, memory, blockIdx.z);
  T* grad_x_dot = resolve(symbolic_grad_x_dot, memory, blockIdx.z);
  /// Calls f(s, y_dot, g, g_dot) at an element of y.
  const auto known = [&](int64_t at, auto f) {
    return f(Form::probability(y[at]), y_dot ? y_dot[at] : T(0), g ? g[at] : T(0), g_dot[at]);
  };
  for (int64_t row = team.first(); row < rows.loops.outer.steps; row += team.step()) {
    each_step(rows.loops.inner, outer_step(rows.loops, row), [&](const Offsets<2>& at) {
      Sum<T> A, RA;
      for (int64_t i = 0; i < rows.length; ++i) {
        known(at.of[1] + i * rows.y_stride, [&](T s, T yd, T c, T cd) {
          A += Form::share(s, c);
          RA += Form::share_dot(s, yd, c, cd);
        });
      }
      for (int64_t i = 0; i < rows.length; ++i) {
        const T value = known(at.of[1] + i * rows.y_stride, [&](T s, T yd, T c, T cd) {
          return Form::cotangent_dot(s, yd, c, cd, A.value(), RA.value());
        });
        put(grad_x_dot, at.of[0] + i * rows.x_stride, value, add);
      }
    });
  }
}

/// The passes of the kind whose form it is.
template <class Form>
struct SoftmaxPasses {
  template <class T>
  static void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    const Rows rows = rows_of(l, l.loops->y);
    launch("softmax forward", softmax_forward<Form, T>, step_grid(rows.loops.outer.steps), kElementThreads, 0,
           rows, t.x[0], t.y, launch.memory);
  }
  template <class T>
  static void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    if (!t.grad_x[0]) return;
    const Rows rows = rows_of(l, l.loops->x[0]);
    const bool add = cleared(launch, l, t.add_x[0], t.grad_x[0]);
    launch("softmax backward", softmax_cotangent<Form, T>, step_grid(rows.loops.outer.steps), kElementThreads,
           0, rows, t.y, t.grad_y, add, t.grad_x[0], launch.memory);
  }
  template <class T>
  static void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    const Rows rows = rows_of(l, l.loops->y);
    launch("softmax forward tangent", softmax_tangent<Form, T>, step_grid(rows.loops.outer.steps),
           kElementThreads, 0, rows, t.y, t.x_dot[0], t.y_dot, launch.memory);
  }
  template <class T>
  static void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    if (!t.grad_x_dot[0]) return;
    const Rows rows = rows_of(l, l.loops->x[0]);
    const bool add = cleared(launch, l, t.add_x[0], t.grad_x_dot[0]);
    launch("softmax backward tangent", softmax_cotangent_dot<Form, T>, step_grid(rows.loops.outer.steps),
           kElementThreads, 0, rows, t.y, t.x_dot[0] ? t.y_dot : nullptr, t.grad_y, t.grad_y_dot, add,
           t.grad_x_dot[0], launch.memory);
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
