// BatchNorm with given statistics mu and var [c], which are constants, over the m = n h w rows of x [m, c].
// Per channel, with g = grad_y:
//
//   s = (var + eps)^-1/2, xh = (x - mu) s,       y = gamma xh + beta
//   grad_gamma = sum g xh, grad_beta = sum g,    grad_x = gamma s g
//   y_dot = gamma s x_dot + gamma_dot xh + beta_dot
//   grad_gamma_dot = sum(g_dot xh + g s x_dot), grad_beta_dot = sum g_dot,
//   grad_x_dot = gamma s g_dot + gamma_dot s g
//
// Threads: a thread works on a vector of channels (channels.h) and takes rows. One kernel computes the sums
// over tiles of rows (moments.h); in the next kernel, the first block of each channel group merges them in
// double. Where no gradient of gamma or beta is wanted, neither runs. Nothing is saved: every thread computes
// s from var. gamma and beta may be absent (1 and 0); x_dot is absent where the input has no tangent; grad_y
// may be absent in the backward tangent. The twin on the CPU is cpu/running_norm.cpp.
#include "cuda/channel_view.h"
#include "cuda/implement.h"
#include "cuda/moments.h"
#include "cuda/windows.h"

namespace maml::cuda {
namespace {

/// One thread's view of its task and channels.
template <class T>
struct View : ChannelView<T> {
  using typename ChannelView<T>::Values;
  const Tensors<T>& t;
  Values mu, s, gamma, gamma_dot;

  __device__ __forceinline__ View(const Layer& l, const Tensors<T>& t, bool whole_rows)
      : ChannelView<T>(grid_team(), channel_group(), l.in.c,
                       whole_rows && aligned(t.w[0], t.w[2], t.w[3], t.w_dot[0])),
        t(t),
        mu(this->of_channels(t.w[2], 0)),
        s(lanewise(this->of_channels(t.w[3], 0),
                   [&](T variance) { return 1 / std::sqrt(variance + static_cast<T>(l.eps)); })),
        gamma(this->of_channels(t.w[0], 1)),
        gamma_dot(this->of_channels(t.w_dot[0], 0)) {}

  __device__ __forceinline__ Values xh(const Values& x) const { return (x - mu) * s; }
};

int64_t rows_of(const Layer& l) { return l.n * l.in.h * l.in.w; }

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    running_norm_forward(Layer l, Tensors<T> symbolic, int rows, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Tensors<T> t = resolve(symbolic, memory, blockIdx.z);
  const View<T> view(l, t, aligned(t.x[0], t.y, t.w[1]));
  const auto beta = view.of_channels(t.w[1], 0);
  each_row<4>(
      view.team, view.threads, rows, [&](int row) { return view.row(t.x[0], row); },
      [&](int row, const auto& x) { view.put(t.y, view.element(row), view.gamma * view.xh(x) + beta); });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    running_norm_forward_tangent(Layer l, Tensors<T> symbolic, int rows, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Tensors<T> t = resolve(symbolic, memory, blockIdx.z);
  const View<T> view(l, t, aligned(t.x[0], t.x_dot[0], t.y_dot, t.w_dot[1]));
  const auto beta_dot = view.of_channels(t.w_dot[1], 0);
  struct Loaded {
    typename View<T>::Values x, x_dot;
  };
  each_row<2>(
      view.team, view.threads, rows,
      [&](int row) { return Loaded{view.row(t.x[0], row), view.row(t.x_dot[0], row)}; },
      [&](int row, const Loaded& of) {
        auto y_dot = view.gamma_dot * view.xh(of.x) + beta_dot;
        if (t.x_dot[0]) y_dot += view.gamma * view.s * of.x_dot;
        view.put(t.y_dot, view.element(row), y_dot);
      });
}

/// Block x computes the entry of tile x: the sums for gamma and beta, of the cotangents or of their tangents.
template <bool kTangent, class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    running_norm_sums(Layer l, Tensors<T> symbolic, int rows, Deferred deferred) {
  const Memory memory = deferred.ready();
  using Values = typename View<T>::Values;
  const Tensors<T> t = resolve(symbolic, memory, blockIdx.z);
  const View<T> view(l, t, aligned(t.x[0], t.x_dot[0], t.grad_y, t.grad_y_dot, t.scratch));
  const int first = view.team.block * kTileRows;
  Values sums[2];
  channel_sums(view.threads, std::min(int{kTileRows}, rows - first), sums, [&](int i, Values(&sum)[2]) {
    const int row = first + i;
    const Values g = view.row(kTangent ? t.grad_y_dot : t.grad_y, row);
    sum[0] += g * view.xh(view.row(t.x[0], row));
    if (kTangent && t.x_dot[0]) sum[0] += view.row(t.grad_y, row) * view.s * view.row(t.x_dot[0], row);
    sum[1] += g;
  });
  write_entry(view.threads, view.team.block, view.c, t.scratch, sums);
}

/// Merges the entries, if any, into the gradients of gamma and beta, and computes grad_x where wanted.
template <bool kTangent, class T>
__global__ void __launch_bounds__(kThreads, kResidentVectors<T>)
    running_norm_backward(Layer l, Tensors<T> symbolic, Partials<T> partials, int rows, Deferred deferred) {
  const Memory memory = deferred.ready();
  using Values = typename View<T>::Values;
  const Tensors<T> t = resolve(symbolic, memory, blockIdx.z);
  const Partials<T> p = resolve(partials, memory, blockIdx.z);
  T* const to = kTangent ? t.grad_x_dot[0] : t.grad_x[0];
  T* const grad_w[2] = {kTangent ? t.grad_w_dot[0] : t.grad_w[0], kTangent ? t.grad_w_dot[1] : t.grad_w[1]};
  const View<T> view(l, t, aligned(t.grad_y, t.grad_y_dot, to, grad_w[0], grad_w[1], p.at));
  if (p.count > 0 && view.team.block == 0) {
    Numbers<double, View<T>::N> sums[2];
    Sums::merge(view.threads, view.c, p, 0, p.count, sums);
    for (int q = 0; q < 2; ++q) {
      if (view.writes()) view.give(grad_w[q], converted<T>(sums[q]), t.add_w[q]);
    }
  }
  if (!to) return;
  struct Loaded {
    Values g, g_dot, before;
  };
  const Put put{t.add_x[0]};
  each_row<2>(
      view.team, view.threads, rows,
      [&](int row) {
        return Loaded{view.row(t.grad_y, row), view.row(kTangent ? t.grad_y_dot : nullptr, row),
                      view.row(put.before(to), row)};
      },
      [&](int row, const Loaded& of) {
        const Values value = kTangent ? view.gamma * view.s * of.g_dot + view.gamma_dot * view.s * of.g
                                      : view.gamma * view.s * of.g;
        view.put(to, view.element(row), put(of.before, value));
      });
}

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const int64_t rows = rows_of(l);
  launch("running_norm forward", running_norm_forward<T>, row_grid<T>(rows, l.in.c), kThreads, 0, l, t,
         static_cast<int>(rows), launch.memory);
}

template <class T>
void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const int64_t rows = rows_of(l);
  launch("running_norm forward tangent", running_norm_forward_tangent<T>, row_grid<T>(rows, l.in.c), kThreads,
         0, l, t, static_cast<int>(rows), launch.memory);
}

template <bool kTangent, class T>
void backwards(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const int64_t rows = rows_of(l), c = l.in.c;
  const bool sums = kTangent ? t.grad_w_dot[0] || t.grad_w_dot[1] : t.grad_w[0] || t.grad_w[1];
  Partials<T> p{};
  if (sums) {
    launch("running_norm sums", running_norm_sums<kTangent, T>,
           Grid{tiles_of(rows), channel_groups<kVector<T>>(c)}, kThreads, 0, l, t, static_cast<int>(rows),
           launch.memory);
    p = few_partials<Sums>(launch, rows, c, t.scratch);
  }
  const bool wanted = (kTangent ? t.grad_x_dot[0] : t.grad_x[0]) != nullptr;
  if (!sums && !wanted) return;
  launch("running_norm backward", running_norm_backward<kTangent, T>, row_grid<T>(wanted ? rows : 1, c),
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
