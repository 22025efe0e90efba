// y[i, j, c] = the largest x in the window of (i, j), for all tasks, channels last. The forward pass saves
// the position of the maximum (a pixel numbered within its sample; the first of equal values; a NaN wins, as
// in torch), and all other passes read the same positions. Backward, each pixel sums the cotangents of the
// outputs that chose it, in ascending order: no two threads write the same element, and there are no atomics.
//
// Threads: a thread works on one channel (channels.h) and takes outputs in the forward passes, cells of
// pixels in the backward passes (windows.h). Limits: the rows of one task, n h w, are numbered in 32 bits.
// The twin on the CPU is cpu/max_pool.cpp.
#include "cuda/elementwise.h"
#include "cuda/implement.h"
#include "cuda/windows.h"

namespace maml::cuda {
namespace {

constexpr int64_t kItemsPerThread = 2;

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    forward_kernel(Layer l, const T* symbolic_x, T* symbolic_y, int32_t* symbolic_places, Deferred deferred) {
  const Memory memory = deferred.ready();
  const ChannelThreads threads = channel_threads(l.in.c);
  const Windows w(l);
  const int64_t c = l.in.c;
  const T* x = resolve(symbolic_x, memory, blockIdx.z) + threads.channel;
  T* y = resolve(symbolic_y, memory, blockIdx.z) + threads.channel;
  int32_t* places = resolve(symbolic_places, memory, blockIdx.z) + threads.channel;
  each_item(threads, static_cast<int>(l.n), w.outputs(), [&](int sample, int output) {
    const T* image = x + sample * w.pixels() * c;
    const Largest<T> best = largest_of<T>(w, output, [&](int pixel) { return image[pixel * c]; });
    const int64_t at = (sample * w.outputs() + output) * c;
    y[at] = best.value;
    places[at] = best.place;
  });
}

/// y = x at the saved positions
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    gather_kernel(Layer l, const int32_t* symbolic_places, const T* symbolic_x, T* symbolic_y,
                  Deferred deferred) {
  const Memory memory = deferred.ready();
  const ChannelThreads threads = channel_threads(l.in.c);
  const Windows w(l);
  const int64_t c = l.in.c;
  const int32_t* places = resolve(symbolic_places, memory, blockIdx.z) + threads.channel;
  const T* x = resolve(symbolic_x, memory, blockIdx.z) + threads.channel;
  T* y = resolve(symbolic_y, memory, blockIdx.z) + threads.channel;
  each_item(threads, static_cast<int>(l.n), w.outputs(), [&](int sample, int output) {
    const int64_t at = (sample * w.outputs() + output) * c;
    y[at] = x[(sample * w.pixels() + places[at]) * c];
  });
}

/// grad_x (+)= the sum of g over the outputs that chose each pixel
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    scatter_kernel(Layer l, int cells, const int32_t* symbolic_places, const T* symbolic_g, bool add,
                   T* symbolic_grad_x, Deferred deferred) {
  const Memory memory = deferred.ready();
  const ChannelThreads threads = channel_threads(l.in.c);
  const Windows w(l);
  const int64_t c = l.in.c;
  const int32_t* places = resolve(symbolic_places, memory, blockIdx.z) + threads.channel;
  const T* g = resolve(symbolic_g, memory, blockIdx.z) + threads.channel;
  T* grad_x = resolve(symbolic_grad_x, memory, blockIdx.z) + threads.channel;
  each_place(w, threads, static_cast<int>(l.n), cells, c, places, [&](int64_t at, auto chosen) {
    T sum = 0;
    chosen([&](int64_t output) { sum += g[output]; });
    put(grad_x, at, sum, add);
  });
}

Grid output_grid(const Layer& l) { return channel_grid(l.n * l.out.h * l.out.w, l.in.c, kItemsPerThread); }

}  // namespace

template <>
struct OnGpu<Kind::max_pool> {
  static int64_t choices(const Layer& l) { return l.n * size(l.out); }

  template <class T>
  static void choose(const Launcher& launch, const Layer& l, const T* x, T* y, int32_t* places) {
    launch("max_pool forward", forward_kernel<T>, output_grid(l), kThreads, 0, l, x, y, places,
           launch.memory);
  }
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, int32_t* places, const T* x, T* y) {
    launch("max_pool forward tangent", gather_kernel<T>, output_grid(l), kThreads, 0, l, places, x, y,
           launch.memory);
  }
  template <class T>
  static void adjoint(const Launcher& launch, Tangent tangent, const Layer& l, int32_t* places, const T* g,
                      bool add, T* grad_x) {
    const int64_t cells = cells_of(l);
    launch(tangent == Tangent::no ? "max_pool backward" : "max_pool backward tangent", scatter_kernel<T>,
           channel_grid(l.n * cells, l.in.c, 1), kThreads, 0, l, static_cast<int>(cells), places, g, add,
           grad_x, launch.memory);
  }
};
template struct Implementation<Kind::max_pool>;

}  // namespace maml::cuda
