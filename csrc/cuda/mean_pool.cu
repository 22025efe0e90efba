// y[c] = the mean of x over the whole image: AdaptiveAvgPool2d(1), or a mean over the spatial axes.
//
// A thread works on one channel (channels.h). A block takes one sample: each thread sums every `rows`-th
// pixel in ascending order, and a tree sums over the threads. Limits: the rows of one task, n h w, are
// numbered in 32 bits. The twin on the CPU is cpu/mean_pool.cpp.
#include "cuda/elementwise.h"
#include "cuda/implement.h"
#include "cuda/windows.h"

namespace maml::cuda {
namespace {

/// Block x computes sample x.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    mean_of_all_kernel(Layer l, const T* symbolic_x, T* symbolic_y, Deferred deferred) {
  const Memory memory = deferred.ready();
  const ChannelThreads threads = channel_threads(l.in.c);
  const int pixels = static_cast<int>(l.in.h * l.in.w);
  const int64_t c = l.in.c;
  const T* image = resolve(symbolic_x, memory, blockIdx.z) + blockIdx.x * (pixels * c) + threads.channel;
  T* y = resolve(symbolic_y, memory, blockIdx.z) + blockIdx.x * c + threads.channel;
  T sum[1];
  channel_sums(threads, pixels, sum, [&](int pixel, T(&s)[1]) { s[0] += image[pixel * c]; });
  if (threads.active && threads.row == 0) *y = sum[0] * (1 / static_cast<T>(pixels));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    spread_over_all_kernel(Layer l, const T* symbolic_g, bool add, T* symbolic_grad_x, Deferred deferred) {
  const Memory memory = deferred.ready();
  const ChannelThreads threads = channel_threads(l.in.c);
  const int pixels = static_cast<int>(l.in.h * l.in.w);
  const int64_t c = l.in.c;
  const T* g = resolve(symbolic_g, memory, blockIdx.z) + threads.channel;
  T* grad_x = resolve(symbolic_grad_x, memory, blockIdx.z) + threads.channel;
  const T weight = 1 / static_cast<T>(pixels);
  each_item(threads, static_cast<int>(l.n), pixels, [&](int sample, int pixel) {
    put(grad_x, (sample * pixels + pixel) * c, weight * g[sample * c], add);
  });
}

}  // namespace

template <>
struct OnGpu<Kind::mean_pool> {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* x, T* y) {
    const Grid samples{l.n, blocks_for(l.in.c, channel_width(l.in.c))};
    launch("mean_pool", mean_of_all_kernel<T>, samples, kThreads, 0, l, x, y, launch.memory);
  }
  template <class T>
  static void adjoint(const Launcher& launch, const Layer& l, const T* g, bool add, T* grad_x) {
    launch("mean_pool transposed", spread_over_all_kernel<T>, channel_grid(l.n * l.in.h * l.in.w, l.in.c, 2),
           kThreads, 0, l, g, add, grad_x, launch.memory);
  }
};
template struct Implementation<Kind::mean_pool>;

}  // namespace maml::cuda
