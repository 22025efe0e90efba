// y[i, j, c] = the mean of x over the window of (i, j); padding counts in the divisor where count_padding
// says so. mean_pool is the same over the whole image: AdaptiveAvgPool2d(1), and the mean over the spatial
// axes.
//
// A thread keeps its channel (channels.h). avg_pool: it takes outputs forward, cells of pixels backward
// (windows.h), each pixel summing over the windows that hold it in ascending order. mean_pool: a block takes
// one sample, its threads every `rows`-th pixel in ascending order, and a tree sums them. Rows of one task,
// n h w, are numbered in 32 bits.
#include "cuda/elementwise.h"
#include "cuda/linear_map.h"
#include "cuda/windows.h"

namespace maml::cuda {
namespace {

/// 1 / divisor of the window of an output.
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
__global__ void __launch_bounds__(kThreads, kResident<T>)
    mean_kernel(Layer l, const T* symbolic_x, T* symbolic_y, const Table* table) {
  const Lanes lanes = lanes_of(l.in.c);
  const Windows w(l);
  const int64_t c = l.in.c;
  const T* x = resolve(symbolic_x, *table, blockIdx.z) + lanes.channel;
  T* y = resolve(symbolic_y, *table, blockIdx.z) + lanes.channel;
  each_item(lanes, static_cast<int>(l.n), w.outputs(), [&](int sample, int output) {
    const T* image = x + sample * w.pixels() * c;
    T sum = 0;
    each_pixel_of(w, output, [&](int pixel) { sum += image[pixel * c]; });
    y[(sample * w.outputs() + output) * c] = sum * weight_of<T>(w, l.count_padding, output);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    spread_kernel(Layer l, int cells, const T* symbolic_g, bool add, T* symbolic_grad_x, const Table* table) {
  const Lanes lanes = lanes_of(l.in.c);
  const Windows w(l);
  const int64_t c = l.in.c;
  const T* g = resolve(symbolic_g, *table, blockIdx.z) + lanes.channel;
  T* grad_x = resolve(symbolic_grad_x, *table, blockIdx.z) + lanes.channel;
  each_item(lanes, static_cast<int>(l.n), cells, [&](int sample, int cell) {
    each_pixel_in(w, cell, [&](int pixel, const Seers& seers) {
      T sum = 0;
      each_output(w, seers, [&](int output) {
        sum += weight_of<T>(w, l.count_padding, output) * g[(sample * w.outputs() + output) * c];
      });
      put(grad_x, (sample * w.pixels() + pixel) * c, sum, add);
    });
  });
}

struct Mean {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* x, T* y) {
    launch("avg_pool", mean_kernel<T>, channel_grid(l.n * l.out.h * l.out.w, l.in.c, 1), kThreads, 0, l, x, y,
           launch.table);
  }
  template <class T>
  static void transposed(const Launcher& launch, const Layer& l, const T* g, bool add, T* grad_x) {
    const int64_t cells = cells_of(l);
    launch("avg_pool transposed", spread_kernel<T>, channel_grid(l.n * cells, l.in.c, 1), kThreads, 0, l,
           static_cast<int>(cells), g, add, grad_x, launch.table);
  }
};

/// Block x: one sample.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    mean_of_all_kernel(Layer l, const T* symbolic_x, T* symbolic_y, const Table* table) {
  const Lanes lanes = lanes_of(l.in.c);
  const int pixels = static_cast<int>(l.in.h * l.in.w);
  const int64_t c = l.in.c;
  const T* image = resolve(symbolic_x, *table, blockIdx.z) + blockIdx.x * (pixels * c) + lanes.channel;
  T* y = resolve(symbolic_y, *table, blockIdx.z) + blockIdx.x * c + lanes.channel;
  T sum[1];
  channel_sums(lanes, pixels, sum, [&](int pixel, T(&s)[1]) { s[0] += image[pixel * c]; });
  if (lanes.active && lanes.row == 0) *y = sum[0] * (1 / static_cast<T>(pixels));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    spread_over_all_kernel(Layer l, const T* symbolic_g, bool add, T* symbolic_grad_x, const Table* table) {
  const Lanes lanes = lanes_of(l.in.c);
  const int pixels = static_cast<int>(l.in.h * l.in.w);
  const int64_t c = l.in.c;
  const T* g = resolve(symbolic_g, *table, blockIdx.z) + lanes.channel;
  T* grad_x = resolve(symbolic_grad_x, *table, blockIdx.z) + lanes.channel;
  const T weight = 1 / static_cast<T>(pixels);
  each_item(lanes, static_cast<int>(l.n), pixels, [&](int sample, int pixel) {
    put(grad_x, (sample * pixels + pixel) * c, weight * g[sample * c], add);
  });
}

struct MeanOfAll {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* x, T* y) {
    const Grid samples{l.n, blocks_for(l.in.c, channel_width(l.in.c))};
    launch("mean_pool", mean_of_all_kernel<T>, samples, kThreads, 0, l, x, y, launch.table);
  }
  template <class T>
  static void transposed(const Launcher& launch, const Layer& l, const T* g, bool add, T* grad_x) {
    launch("mean_pool transposed", spread_over_all_kernel<T>, channel_grid(l.n * l.in.h * l.in.w, l.in.c, 2),
           kThreads, 0, l, g, add, grad_x, launch.table);
  }
};

}  // namespace

template <>
LaunchPasses<float> avg_pool<float>() {
  return linear_map<Mean, float>();
}
template <>
LaunchPasses<double> avg_pool<double>() {
  return linear_map<Mean, double>();
}
template <>
LaunchPasses<float> mean_pool<float>() {
  return linear_map<MeanOfAll, float>();
}
template <>
LaunchPasses<double> mean_pool<double>() {
  return linear_map<MeanOfAll, double>();
}

}  // namespace maml::cuda
