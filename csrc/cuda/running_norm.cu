// BatchNorm with given statistics mu and var [c], which are constants, over the m = n h w rows of x [m, c].
// Per channel, with g = grad_y:
//
//   s = (var + eps)^-1/2, xh = (x - mu) s,       y = gamma xh + beta
//   grad_gamma = sum g xh, grad_beta = sum g,    grad_x = gamma s g
//   y_dot = gamma s x_dot + gamma_dot xh + beta_dot
//   grad_gamma_dot = sum(g_dot xh + g s x_dot), grad_beta_dot = sum g_dot,
//   grad_x_dot = gamma s g_dot + gamma_dot s g
//
// Threads: a thread works on one channel (channels.h) and takes rows. One kernel computes the sums over tiles
// of rows (moments.h); in the next kernel, the first block of each channel group merges them in double. Where
// no gradient of gamma or beta is wanted, neither runs. Nothing is saved: every thread computes s from var.
// gamma and beta may be absent (1 and 0); x_dot is absent where the input has no tangent; grad_y may be
// absent in the backward tangent. The twin on the CPU is cpu/running_norm.cpp.
#include "cuda/elementwise.h"
#include "cuda/implement.h"
#include "cuda/moments.h"
#include "cuda/windows.h"

namespace maml::cuda {
namespace {

/// One thread's view of its task and channel.
template <class T>
struct View {
  ChannelThreads threads;
  Tensors<T> t;
  int64_t c;
  int channel;  // a thread without a channel reads the first
  T mu, s, gamma, gamma_dot;

  __device__ View(const Layer& l, const Tensors<T>& symbolic, const Memory& memory)
      : threads(channel_threads(l.in.c)),
        t(resolve(symbolic, memory, blockIdx.z)),
        c(l.in.c),
        channel(threads.active ? threads.channel : 0),
        mu(t.w[2][channel]),
        s(1 / std::sqrt(t.w[3][channel] + static_cast<T>(l.eps))),
        gamma(t.w[0] ? t.w[0][channel] : T(1)),
        gamma_dot(t.w_dot[0] ? t.w_dot[0][channel] : T(0)) {}

  __device__ __forceinline__ int64_t element(int row) const { return row * c + channel; }
  __device__ __forceinline__ T xh(int64_t at) const { return (t.x[0][at] - mu) * s; }
};

int64_t rows_of(const Layer& l) { return l.n * l.in.h * l.in.w; }

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    running_norm_forward(Layer l, Tensors<T> symbolic, int rows, Deferred deferred) {
  const Memory memory = deferred.ready();
  const View<T> view(l, symbolic, memory);
  const T beta = view.t.w[1] ? view.t.w[1][view.channel] : T(0);
  each_row(view.threads, rows, [&](int row) {
    const int64_t at = view.element(row);
    view.t.y[at] = view.gamma * view.xh(at) + beta;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    running_norm_forward_tangent(Layer l, Tensors<T> symbolic, int rows, Deferred deferred) {
  const Memory memory = deferred.ready();
  const View<T> view(l, symbolic, memory);
  const T beta_dot = view.t.w_dot[1] ? view.t.w_dot[1][view.channel] : T(0);
  each_row(view.threads, rows, [&](int row) {
    const int64_t at = view.element(row);
    T y_dot = view.gamma_dot * view.xh(at) + beta_dot;
    if (view.t.x_dot[0]) y_dot += view.gamma * view.s * view.t.x_dot[0][at];
    view.t.y_dot[at] = y_dot;
  });
}

/// Block x computes the entry of tile x: the sums for gamma and beta, of the cotangents or of their tangents.
template <bool kTangent, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    running_norm_sums(Layer l, Tensors<T> symbolic, int rows, Deferred deferred) {
  const Memory memory = deferred.ready();
  const View<T> view(l, symbolic, memory);
  const Tensors<T>& t = view.t;
  const int first = static_cast<int>(blockIdx.x) * kTileRows;
  T sums[2];
  channel_sums(view.threads, std::min(int{kTileRows}, rows - first), sums, [&](int i, T(&sum)[2]) {
    const int64_t at = view.element(first + i);
    const T g = kTangent ? t.grad_y_dot[at] : t.grad_y[at];
    sum[0] += g * view.xh(at);
    if (kTangent && t.x_dot[0]) sum[0] += t.grad_y[at] * view.s * t.x_dot[0][at];
    sum[1] += g;
  });
  write_entry(view.threads, view.c, t.scratch, sums);
}

/// Merges the entries, if any, into the gradients of gamma and beta, and computes grad_x where wanted.
template <bool kTangent, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    running_norm_backward(Layer l, Tensors<T> symbolic, Partials<T> partials, int rows, Deferred deferred) {
  const Memory memory = deferred.ready();
  const View<T> view(l, symbolic, memory);
  const Tensors<T>& t = view.t;
  if (partials.count > 0 && blockIdx.x == 0) {
    const Partials<T> p = resolve(partials, memory, blockIdx.z);
    double sums[2];
    Sums::merge(view.threads, view.c, p, 0, p.count, sums);
    for (int q = 0; q < 2; ++q) {
      T* out = kTangent ? t.grad_w_dot[q] : t.grad_w[q];
      if (out && view.threads.row == 0 && view.threads.active)
        put(out, view.channel, static_cast<T>(sums[q]), t.add_w[q]);
    }
  }
  T* to = kTangent ? t.grad_x_dot[0] : t.grad_x[0];
  if (!to) return;
  each_row(view.threads, rows, [&](int row) {
    const int64_t at = view.element(row);
    T value = view.gamma * view.s * (kTangent ? t.grad_y_dot[at] : t.grad_y[at]);
    if (kTangent && t.grad_y) value += view.gamma_dot * view.s * t.grad_y[at];
    put(to, at, value, t.add_x[0]);
  });
}

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const int64_t rows = rows_of(l);
  launch("running_norm forward", running_norm_forward<T>, channel_grid(rows, l.in.c, 4), kThreads, 0, l, t,
         static_cast<int>(rows), launch.memory);
}

template <class T>
void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const int64_t rows = rows_of(l);
  launch("running_norm forward tangent", running_norm_forward_tangent<T>, channel_grid(rows, l.in.c, 4),
         kThreads, 0, l, t, static_cast<int>(rows), launch.memory);
}

template <bool kTangent, class T>
void backwards(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const int64_t rows = rows_of(l), c = l.in.c;
  const bool sums = kTangent ? t.grad_w_dot[0] || t.grad_w_dot[1] : t.grad_w[0] || t.grad_w[1];
  Partials<T> p{};
  if (sums) {
    launch("running_norm sums", running_norm_sums<kTangent, T>,
           Grid{tiles_of(rows), blocks_for(c, channel_width(c))}, kThreads, 0, l, t, static_cast<int>(rows),
           launch.memory);
    p = few_partials<Sums>(launch, rows, c, kTileRows, t.scratch, t.scratch);
  }
  const bool wanted = (kTangent ? t.grad_x_dot[0] : t.grad_x[0]) != nullptr;
  if (!sums && !wanted) return;
  launch("running_norm backward", running_norm_backward<kTangent, T>, channel_grid(wanted ? rows : 1, c, 4),
         kThreads, 0, l, t, p, static_cast<int>(rows), launch.memory);
}

template <class T>
LaunchPasses<T> all_passes() {
  return {forward<T>, backwards<false, T>, forward_tangent<T>, backwards<true, T>};
}

}  // namespace

template <>
struct OnGpu<Kind::running_norm> {
  static Footprint footprint(const Layer& l) { return {0, partials_scratch(rows_of(l), l.in.c)}; }
  template <class T>
  static LaunchPasses<T> passes() {
    return all_passes<T>();
  }
};
template struct Implementation<Kind::running_norm>;

}  // namespace maml::cuda
