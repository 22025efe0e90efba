// y[i, j, c] = the mean of x over the window of (i, j); count_padding decides whether padding counts in the
// divisor.
//
// A thread works on a vector of channels (channels.h). In the forward passes it takes outputs, in the
// backward passes cells of pixels (windows.h); each pixel sums over the windows that contain it, in ascending
// order. Limits: the rows of one task, n h w, are numbered in 32 bits. The twin on the CPU is cpu/avg_pool.h.
#include "cuda/channel_view.h"
#include "cuda/implement.h"
#include "cuda/windows.h"

namespace maml::cuda {
namespace {

/// 1 / divisor for the window of an output.
template <class T>
__device__ __forceinline__ T weight_of(const Windows& w, bool count_padding, int output) {
  if (count_padding) return 1 / static_cast<T>(w.kernel_h * w.kernel_w);
  const int i = output / w.out_w, j = output - i * w.out_w;
  const int r0 = i * w.stride_h - w.pad_top, q0 = j * w.stride_w - w.pad_left;
  const int rows = std::min(w.in_h, r0 + w.kernel_h) - std::max(0, r0),
            columns = std::min(w.in_w, q0 + w.kernel_w) - std::max(0, q0);
  return 1 / static_cast<T>(rows * columns);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    mean_kernel(Layer l, const T* symbolic_x, T* symbolic_y, Deferred deferred) {
  const Memory memory = deferred.ready();
  using Values = typename ChannelView<T>::Values;
  const T* x = resolve(symbolic_x, memory, blockIdx.z);
  T* y = resolve(symbolic_y, memory, blockIdx.z);
  const ChannelView<T> view(grid_team(), channel_group(), l.in.c, aligned(x, y));
  const Windows w(l);
  each_item(view.team, view.threads, static_cast<int>(l.n), w.outputs(), [&](int sample, int output) {
    Values sum = T(0);
    each_pixel_of(w, output, [&](int pixel) { sum += view.row(x, sample * w.pixels() + pixel); });
    view.put(y, view.element(sample * w.outputs() + output), sum * weight_of<T>(w, l.count_padding, output));
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    spread_kernel(Layer l, int cells, const T* symbolic_g, bool add, T* symbolic_grad_x, Deferred deferred) {
  const Memory memory = deferred.ready();
  using Values = typename ChannelView<T>::Values;
  const T* g = resolve(symbolic_g, memory, blockIdx.z);
  T* grad_x = resolve(symbolic_grad_x, memory, blockIdx.z);
  const ChannelView<T> view(grid_team(), channel_group(), l.in.c, aligned(g, grad_x));
  const Windows w(l);
  const Put put{add};
  each_item(view.team, view.threads, static_cast<int>(l.n), cells, [&](int sample, int cell) {
    each_pixel_in(w, cell, [&](int pixel, const Readers& readers) {
      const int row = sample * w.pixels() + pixel;
      const Values before = view.row(put.before(grad_x), row);
      Values sum = T(0);
      each_output(w, readers, [&](int output) {
        sum += view.row(g, sample * w.outputs() + output) * weight_of<T>(w, l.count_padding, output);
      });
      view.put(grad_x, view.element(row), put(before, sum));
    });
  });
}

}  // namespace

template <>
struct OnGpu<Kind::avg_pool> {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* x, T* y) {
    launch("avg_pool", mean_kernel<T>, row_grid<T>(l.n * l.out.h * l.out.w, l.in.c), kThreads, 0, l, x, y,
           launch.memory);
  }
  template <class T>
  static void adjoint(const Launcher& launch, const Layer& l, const T* g, bool add, T* grad_x) {
    const int64_t cells = cells_of(l);
    launch("avg_pool transposed", spread_kernel<T>, row_grid<T>(l.n * cells, l.in.c), kThreads, 0, l,
           static_cast<int>(cells), g, add, grad_x, launch.memory);
  }
};
template struct Implementation<Kind::avg_pool>;

}  // namespace maml::cuda
