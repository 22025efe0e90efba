// y[c] = the mean of x over the whole image: AdaptiveAvgPool2d(1), or a mean over the spatial axes.
//
// A thread works on a vector of channels (channels.h). A block takes one sample: each thread sums every
// `rows`-th pixel in ascending order, and a tree sums over the threads. Limits: the rows of one task, n h w,
// are numbered in 32 bits. The twin on the CPU is cpu/mean_pool.cpp.
#include "cuda/channel_view.h"
#include "cuda/implement.h"
#include "cuda/windows.h"

namespace maml::cuda {
namespace {

/// Block x computes sample x.
template <class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    mean_of_all_kernel(Layer l, const T* symbolic_x, T* symbolic_y, Deferred deferred) {
  const Memory memory = deferred.ready();
  using Values = typename ChannelView<T>::Values;
  const T* x = resolve(symbolic_x, memory, blockIdx.z);
  T* y = resolve(symbolic_y, memory, blockIdx.z);
  const ChannelView<T> view(grid_team(), channel_group(), l.in.c, aligned(x, y));
  const int pixels = static_cast<int>(l.in.h * l.in.w), sample = view.team.block;
  Values sum[1];
  channel_sums(view.threads, pixels, sum,
               [&](int pixel, Values(&s)[1]) { s[0] += view.row(x, sample * pixels + pixel); });
  if (view.threads.active && view.threads.row == 0) {
    view.put(y, view.element(sample), sum[0] * (1 / static_cast<T>(pixels)));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    spread_over_all_kernel(Layer l, const T* symbolic_g, bool add, T* symbolic_grad_x, Deferred deferred) {
  const Memory memory = deferred.ready();
  using Values = typename ChannelView<T>::Values;
  const T* g = resolve(symbolic_g, memory, blockIdx.z);
  T* grad_x = resolve(symbolic_grad_x, memory, blockIdx.z);
  const ChannelView<T> view(grid_team(), channel_group(), l.in.c, aligned(g, grad_x));
  const int pixels = static_cast<int>(l.in.h * l.in.w);
  const T weight = 1 / static_cast<T>(pixels);
  struct Loaded {
    Values g, before;
  };
  const Put put{add};
  each_row<2>(
      view.team, view.threads, static_cast<int>(l.n) * pixels,
      [&](int row) { return Loaded{view.row(g, row / pixels), view.row(put.before(grad_x), row)}; },
      [&](int row, const Loaded& of) { view.put(grad_x, view.element(row), put(of.before, of.g * weight)); });
}

}  // namespace

template <>
struct OnGpu<Kind::mean_pool> {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* x, T* y) {
    const Grid samples{l.n, channel_groups<kVector<T>>(l.in.c)};
    launch("mean_pool", mean_of_all_kernel<T>, samples, kThreads, 0, l, x, y, launch.memory);
  }
  template <class T>
  static void adjoint(const Launcher& launch, const Layer& l, const T* g, bool add, T* grad_x) {
    launch("mean_pool transposed", spread_over_all_kernel<T>, row_grid<T>(l.n * l.in.h * l.in.w, l.in.c),
           kThreads, 0, l, g, add, grad_x, launch.memory);
  }
};
template struct Implementation<Kind::mean_pool>;

}  // namespace maml::cuda
