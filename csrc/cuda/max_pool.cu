// y[i, j, c] = the largest x in the window of (i, j), for all tasks, channels last. The forward pass saves
// the position of the maximum (a pixel numbered within its sample; the first of equal values; a NaN wins, as
// in torch), and all other passes read the same positions. Backward, each pixel sums the cotangents of the
// outputs that chose it, in ascending order: no two threads write the same element, and there are no atomics.
//
// Threads: a thread works on a vector of channels (channels.h) and takes outputs in the forward passes, cells
// of pixels in the backward passes (windows.h). Limits: the rows of one task, n h w, are numbered in 32 bits.
// The twin on the CPU is cpu/max_pool.cpp.
#include "cuda/channel_view.h"
#include "cuda/implement.h"
#include "cuda/windows.h"

namespace maml::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    forward_kernel(Layer l, const T* symbolic_x, T* symbolic_y, int32_t* symbolic_places, Deferred deferred) {
  const Memory memory = deferred.ready();
  const T* x = resolve(symbolic_x, memory, blockIdx.z);
  T* y = resolve(symbolic_y, memory, blockIdx.z);
  int32_t* places = resolve(symbolic_places, memory, blockIdx.z);
  const ChannelView<T> view(grid_team(), channel_group(), l.in.c, aligned(x, y, places));
  const Windows w(l);
  each_item(view.team, view.threads, static_cast<int>(l.n), w.outputs(), [&](int sample, int output) {
    const auto best = largest_of<T, kVector<T>>(
        w, output, [&](int pixel) { return view.row(x, sample * w.pixels() + pixel); });
    const int64_t to = view.element(sample * w.outputs() + output);
    view.put(y, to, best.value);
    view.put(places, to, best.place);
  });
}

/// y = x at the saved positions
template <class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    gather_kernel(Layer l, const int32_t* symbolic_places, const T* symbolic_x, T* symbolic_y,
                  Deferred deferred) {
  const Memory memory = deferred.ready();
  const int32_t* places = resolve(symbolic_places, memory, blockIdx.z);
  const T* x = resolve(symbolic_x, memory, blockIdx.z);
  T* y = resolve(symbolic_y, memory, blockIdx.z);
  const ChannelView<T> view(grid_team(), channel_group(), l.in.c, aligned(y, places));
  const Windows w(l);
  each_item(view.team, view.threads, static_cast<int>(l.n), w.outputs(), [&](int sample, int output) {
    const int64_t at = view.element(sample * w.outputs() + output);
    view.put(y, at, view.chosen(x, sample * w.pixels(), view.at(places, at)));
  });
}

/// grad_x (+)= the sum of g over the outputs that chose each pixel
template <class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    scatter_kernel(Layer l, int cells, const int32_t* symbolic_places, const T* symbolic_g, bool add,
                   T* symbolic_grad_x, Deferred deferred) {
  const Memory memory = deferred.ready();
  constexpr int N = kVector<T>;
  const int32_t* places = resolve(symbolic_places, memory, blockIdx.z);
  const T* g = resolve(symbolic_g, memory, blockIdx.z);
  T* grad_x = resolve(symbolic_grad_x, memory, blockIdx.z);
  const ChannelView<T> view(grid_team(), channel_group(), l.in.c, aligned(g, grad_x, places));
  const Put put{add};
  each_place<N>(Windows(l), view.team, view.threads, static_cast<int>(l.n), cells, view.c,
                places + view.channel, [&](int64_t from, auto choosing) {
                  const int64_t at = from + view.channel;
                  const Numbers<T, N> before = put.add ? view.at(grad_x, at) : Numbers<T, N>(T(0));
                  Numbers<T, N> sum = T(0);
                  choosing([&](int64_t output, const Numbers<bool, N>& chosen) {
                    sum += where(chosen, view.at(g, output + view.channel));
                  });
                  view.put(grad_x, at, put(before, sum));
                });
}

}  // namespace

template <>
struct OnGpu<Kind::max_pool> {
  static int64_t choices(const Layer& l) { return l.n * size(l.out); }

  template <class T>
  static void choose(const Launcher& launch, const Layer& l, const T* x, T* y, int32_t* places) {
    launch("max_pool forward", forward_kernel<T>, row_grid<T>(l.n * l.out.h * l.out.w, l.in.c), kThreads, 0,
           l, x, y, places, launch.memory);
  }
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, int32_t* places, const T* x, T* y) {
    launch("max_pool forward tangent", gather_kernel<T>, row_grid<T>(l.n * l.out.h * l.out.w, l.in.c),
           kThreads, 0, l, places, x, y, launch.memory);
  }
  template <class T>
  static void adjoint(const Launcher& launch, Tangent tangent, const Layer& l, int32_t* places, const T* g,
                      bool add, T* grad_x) {
    const int64_t cells = cells_of(l);
    launch(tangent == Tangent::no ? "max_pool backward" : "max_pool backward tangent", scatter_kernel<T>,
           row_grid<T>(l.n * cells, l.in.c), kThreads, 0, l, static_cast<int>(cells), places, g, add, grad_x,
           launch.memory);
  }
};
template struct Implementation<Kind::max_pool>;

}  // namespace maml::cuda
