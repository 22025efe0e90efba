// The kernels and launches of normalise.h, for all tasks. blockIdx.x is the block of a team, blockIdx.y the
// group of channels, blockIdx.z the task.
//
// Registers: 128 a thread in float32, so that two blocks are on a multiprocessor (channels.h).
#pragma once

#include "cuda/cotangent_sums.h"
#include "cuda/normalise.h"

namespace maml::cuda {

/// Of the backward tangent, in which ELU needs more registers than two blocks leave it.
template <class Activation, class T>
inline constexpr int kResidentTangents = kResidentVectors<T>;
template <class T>
inline constexpr int kResidentTangents<Activation<Function::elu>, T> = 1;

template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    normalise_forward_kernel(Layer l, Tensors<T> symbolic, Partials<T> statistics, Deferred deferred) {
  const Memory memory = deferred.ready();
  normalise_forward<Activation>(grid_team(), channel_group(), l, resolve(symbolic, memory, blockIdx.z),
                                resolve(statistics, memory, blockIdx.z));
}
template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    normalise_backward_sums_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  normalise_backward_sums<Activation>(grid_team(), channel_group(), l, resolve(symbolic, memory, blockIdx.z));
}
template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    normalise_backward_kernel(Layer l, Tensors<T> symbolic, Partials<T> partials, int cells,
                              Deferred deferred) {
  const Memory memory = deferred.ready();
  normalise_backward<Activation>(grid_team(), channel_group(), l, resolve(symbolic, memory, blockIdx.z),
                                 resolve(partials, memory, blockIdx.z), cells);
}
template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    normalise_forward_tangent_kernel(Layer l, Tensors<T> symbolic, Partials<T> statistics,
                                     Deferred deferred) {
  const Memory memory = deferred.ready();
  normalise_forward_tangent<Activation>(grid_team(), channel_group(), l,
                                        resolve(symbolic, memory, blockIdx.z),
                                        resolve(statistics, memory, blockIdx.z));
}
template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    normalise_backward_tangent_sums_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  normalise_backward_tangent_sums<Activation>(grid_team(), channel_group(), l,
                                              resolve(symbolic, memory, blockIdx.z));
}
template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kResidentTangents<Activation, T>)
    normalise_backward_tangent_kernel(Layer l, Tensors<T> symbolic, Partials<T> partials, int cells,
                                      Deferred deferred) {
  const Memory memory = deferred.ready();
  normalise_backward_tangent<Activation>(grid_team(), channel_group(), l,
                                         resolve(symbolic, memory, blockIdx.z),
                                         resolve(partials, memory, blockIdx.z), cells);
}

/// The four passes of y = pool(f(BatchNorm(x))), f = Activation.
template <class Activation>
struct Normalise {
  static int64_t rows_of(const Layer& l) { return l.n * l.in.h * l.in.w; }
  static int64_t output_rows(const Layer& l) { return l.n * l.out.h * l.out.w; }

  template <class T>
  static void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    const auto p =
        moments_of<1, T>(launch, rows_of(l), l.in.c, t.x[0], nullptr, t.statistics, t.scratch, t.x[1], l.n);
    launch("batch_norm forward", normalise_forward_kernel<Activation, T>, row_grid<T>(output_rows(l), l.in.c),
           kThreads, 0, l, t, p, launch.memory);
  }

  template <class T>
  static void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    backward(
        launch, l, t,
        sums_of("batch_norm backward, sums", normalise_backward_sums_kernel<Activation, T>, launch, l, t));
  }

  template <class T>
  static void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    Partials<T> p{};
    if (t.x_dot[0]) {
      p = moments_of<2, T>(launch, rows_of(l), l.in.c, t.x[0], t.x_dot[0], t.statistics_dot, t.scratch,
                           t.x[1], l.n);
    }
    launch("batch_norm forward tangent", normalise_forward_tangent_kernel<Activation, T>,
           row_grid<T>(output_rows(l), l.in.c), kThreads, 0, l, t, p, launch.memory);
  }

  template <class T>
  static void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    backward_tangent(launch, l, t,
                     sums_of("batch_norm backward tangent, sums",
                             normalise_backward_tangent_sums_kernel<Activation, T>, launch, l, t));
  }

  /// The backward pass or its tangent, where a convolution has computed the sums.
  template <class T>
  static void from_sums(const Launcher& launch, bool tangent, const Layer& l, const Tensors<T>& t,
                        const CotangentSums<T>& sums) {
    const Partials<T> all{sums.entries, sums.count, 0, output_rows(l), sums.step};
    const Partials<T> p = few_partials<Sums>(launch, l.in.c, all, sums.after);
    tangent ? backward_tangent(launch, l, t, p) : backward(launch, l, t, p);
  }

 private:
  template <class T>
  static void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t, const Partials<T>& p) {
    launch("batch_norm backward", normalise_backward_kernel<Activation, T>, input_grid<T>(l, t.grad_x[0]),
           kThreads, 0, l, t, p, static_cast<int>(input_cells(l)), launch.memory);
  }
  template <class T>
  static void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t,
                               const Partials<T>& p) {
    launch("batch_norm backward tangent", normalise_backward_tangent_kernel<Activation, T>,
           input_grid<T>(l, t.grad_x_dot[0]), kThreads, 0, l, t, p, static_cast<int>(input_cells(l)),
           launch.memory);
  }

  /// The sums of a cotangent over the rows of y, tile by tile; empty where there is one tile only.
  template <class T>
  static Partials<T> sums_of(const char* name, void (*kernel)(Layer, Tensors<T>, Deferred),
                             const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    const int64_t rows = output_rows(l), c = l.in.c;
    if (tiles_of(rows) == 1) return {};
    launch(name, kernel, Grid{tiles_of(rows), channel_groups<kVector<T>>(c)}, kThreads, 0, l, t,
           launch.memory);
    return few_partials<Sums>(launch, rows, c, t.scratch);
  }

  /// Where grad_x is not wanted, one block per channel group still writes the sums.
  template <class T>
  static Grid input_grid(const Layer& l, const T* grad_x) {
    return row_grid<T>(grad_x ? l.n * input_cells(l) : 1, l.in.c);
  }
};

/// What the passes save, without the chosen pixels of a max-pool, and their scratch.
inline Footprint normalise_footprint(const Layer& l) {
  const int64_t rows = l.n * std::max(l.in.h * l.in.w, l.out.h * l.out.w);
  return {6 * l.in.c, partials_scratch(rows, l.in.c)};
}

}  // namespace maml::cuda
