// GroupNorm of n samples [pixels, c] of one task. A cell is one sample's channels of one group; it has m =
// pixels c / groups values. LayerNorm has one group, InstanceNorm c groups. Per cell, with g = grad_y and
// h = gamma g:
//
//   mu = mean x, s = (var + eps)^-1/2 (biased), xh = (x - mu) s,   y = gamma xh + beta
//   A = mean h, B = mean(h xh), u = h - A - xh B,                  grad_x = s u
//   grad_gamma = sum g xh, grad_beta = sum g   (over samples and pixels)
//
//   Rmu = mean x_dot, q = mean(xh x_dot), Rxh = s (x_dot - Rmu - xh q)
//   y_dot = gamma Rxh + gamma_dot xh + beta_dot
//   h_dot = gamma g_dot + gamma_dot g, RA = mean h_dot, RB = mean(h_dot xh + h Rxh)
//   grad_x_dot = s (h_dot - RA - Rxh B - xh RB - s q u)
//   grad_gamma_dot = sum(g_dot xh + g Rxh), grad_beta_dot = sum g_dot
//
// Kernels: in each pass a block takes some consecutive cells, computes their sums, and then their values, for
// which it finds the inputs in the caches. Its threads cover the cells as in channels.h they cover channels,
// so that they read contiguous memory even where a group has few channels. The gradients of gamma and beta
// are sums per channel over the rows of [n pixels, c]. Further blocks of the same launch sum tiles of rows
// (moments.h); the last of them for its channels (run/last_block.h) merges the tiles in double.
//
// Numerics: mu is saved as two numbers, a mean and the mean of the deviations from it. One rounded number
// would shift all values of the cell by its rounding error. gamma and beta may be absent (1 and 0); x_dot is
// absent where the input has no tangent; grad_y may be absent in the backward tangent. The twin on the CPU is
// cpu/group_norm.cpp.
#include "cuda/elementwise.h"
#include "cuda/group_norm.h"
#include "cuda/implement.h"
#include "cuda/moments.h"
#include "cuda/run/last_block.h"

namespace maml::cuda {
namespace {

/// How many consecutive cells a block takes: enough for contiguous runs of a warp, and for four values a
/// thread.
int cells_of_block(const Layer& l) {
  const int64_t width = l.in.c / l.groups, values = width * l.in.h * l.in.w;
  int cells = 1;
  while (cells < kMostWidth && (cells * width < kMostWidth || cells * values < 4 * kThreads)) cells *= 2;
  return cells;
}

struct Sizes {
  int c, groups, width, pixels;  // width: channels of a group
  int64_t cells;                 // of all samples

  __host__ __device__ __forceinline__ explicit Sizes(const Layer& l)
      : c(static_cast<int>(l.in.c)),
        groups(static_cast<int>(l.groups)),
        width(static_cast<int>(l.in.c / l.groups)),
        pixels(static_cast<int>(l.in.h * l.in.w)),
        cells(l.n * l.groups) {}
  __device__ __forceinline__ int values() const { return width * pixels; }
};

/// The saved values, one of each for every cell.
template <class T>
struct Saved {
  T *mu, *rest, *s;  // from the forward pass
  T *Rmu, *q;        // from its tangent
  __device__ __forceinline__ Saved(const Tensors<T>& t, int64_t cells)
      : mu(t.saved),
        rest(t.saved + cells),
        s(t.saved + 2 * cells),
        Rmu(t.saved_dot),
        q(t.saved_dot ? t.saved_dot + cells : nullptr) {}
};

/// The map x -> xh of one cell, and its tangent.
template <class T>
struct Map {
  T mu, rest, s, Rmu = 0, q = 0;
  __device__ __forceinline__ Map(T mu, T rest, T s) : mu(mu), rest(rest), s(s) {}
  __device__ __forceinline__ Map(const Saved<T>& saved, int64_t cell, bool moves)
      : mu(saved.mu[cell]), rest(saved.rest[cell]), s(saved.s[cell]) {
    if (moves) Rmu = saved.Rmu[cell], q = saved.q[cell];
  }
  __device__ __forceinline__ T xh(T x) const { return (x - mu - rest) * s; }
  /// The tangent of xh, where x has one.
  __device__ __forceinline__ T xh_dot(T xh, T x_dot) const { return s * (x_dot - Rmu - xh * q); }
};

template <class T>
__device__ __forceinline__ T or_value(const T* p, int64_t i, T value) {
  return p ? p[i] : value;
}

/// One thread's view of its task and cell.
template <class T>
struct View {
  Sizes sizes;
  ChannelThreads threads;  // cover cells instead of channels
  Tensors<T> t;
  Saved<T> saved;
  int64_t cell;  // a thread without a cell reads the first
  int first;     // the cell's first channel
  int64_t at;    // the element of the cell's first value

  __device__ __forceinline__ View(const Layer& l, int width, const Tensors<T>& symbolic, const Memory& memory)
      : sizes(l),
        threads(threads_over(sizes.cells, width)),
        t(resolve(symbolic, memory, blockIdx.z)),
        saved(t, sizes.cells) {
    cell = threads.active ? static_cast<int64_t>(blockIdx.x) * width + threads.channel : 0;
    first = static_cast<int>(cell % sizes.groups) * sizes.width;
    at = cell / sizes.groups * sizes.pixels * sizes.c + first;
  }

  static __device__ __forceinline__ ChannelThreads threads_over(int64_t cells, int width) {
    ChannelThreads threads;
    threads.width = width;
    threads.rows = kThreads / width;
    threads.row = static_cast<int>(threadIdx.x) / width;
    threads.channel = static_cast<int>(threadIdx.x) % width;
    threads.active = static_cast<int64_t>(blockIdx.x) * width + threads.channel < cells;
    return threads;
  }
  __device__ __forceinline__ bool writes() const { return threads.row == 0 && threads.active; }
  __device__ __forceinline__ T mean(T sum) const { return sum / static_cast<T>(sizes.values()); }
  __device__ __forceinline__ T gamma(int channel) const { return or_value(t.w[0], channel, T(1)); }
  __device__ __forceinline__ T gamma_dot(int channel) const { return or_value(t.w_dot[0], channel, T(0)); }

  /// Calls f(element, channel) for value i of the cell.
  template <class F>
  __device__ __forceinline__ void value(int i, F f) const {
    const int pixel = i / sizes.width, channel = i - pixel * sizes.width;
    f(at + static_cast<int64_t>(pixel) * sizes.c + channel, first + channel);
  }
  /// Calls f(element, channel) for this thread's share of the values.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    if (!threads.active) return;
    for (int i = threads.row; i < sizes.values(); i += threads.rows) value(i, f);
  }
  /// sums[q] = the sum over the cell of what term(element, channel, sum) adds to sum[q]. All threads of the
  /// cell get it.
  template <int Q, class F>
  __device__ __forceinline__ void sum(T (&sums)[Q], F term) const {
    channel_sums(threads, sizes.values(), sums, [&](int i, T(&part)[Q]) {
      value(i, [&](int64_t element, int channel) { term(element, channel, part); });
    });
  }
};

/// The sums for gamma and beta over the rows [first, first + count) of [n pixels, c]: of the cotangents, or,
/// with kTangent, of their tangents.
template <bool kTangent, class T>
__device__ __forceinline__ void affine_sums(const Layer& l, const ChannelThreads& threads,
                                            const Tensors<T>& t, int first, int count,
                                            Numbers<T, 1> (&sums)[2]) {
  const Sizes sizes(l);
  const Saved<T> saved(t, sizes.cells);
  const T* x_dot = kTangent ? t.x_dot[0] : nullptr;
  channel_sums(threads, count, sums, [&](int i, Numbers<T, 1>(&sum)[2]) {
    const int row = first + i;
    const int64_t at = static_cast<int64_t>(row) * sizes.c + threads.channel;
    const int64_t cell =
        static_cast<int64_t>(row / sizes.pixels) * sizes.groups + threads.channel / sizes.width;
    const Map<T> map(saved, cell, x_dot != nullptr);
    const T xh = map.xh(t.x[0][at]), g = kTangent ? t.grad_y_dot[at] : t.grad_y[at];
    sum[0] += g * xh;
    if (x_dot) sum[0] += t.grad_y[at] * map.xh_dot(xh, x_dot[at]);
    sum[1] += g;
  });
}

/// The blocks of a backward launch: those of cells, and behind them those of gamma and beta, [tiles, groups].
struct Blocks {
  int of_cells = 0;
  int tiles = 0, groups = 0;  // of rows; of channels
  int rows = 0;               // in all tiles
};

/// The gradients of gamma and beta, by block `index` of these. With several tiles, each writes an entry, and
/// the last one of its channels merges them.
template <bool kTangent, class T>
__device__ __forceinline__ void give_affine(const Layer& l, const Tensors<T>& t, const Blocks& blocks,
                                            int index, unsigned* counters) {
  const int tile = index / blocks.groups, group = index - tile * blocks.groups;
  const ChannelThreads threads = channel_threads<1>(l.in.c, group, false);
  Numbers<T, 1> sums[2];
  if (blocks.tiles == 1) {
    affine_sums<kTangent>(l, threads, t, 0, blocks.rows, sums);
  } else {
    const int first = tile * kTileRows;
    affine_sums<kTangent>(l, threads, t, first, std::min(int{kTileRows}, blocks.rows - first), sums);
    write_entry(threads, tile, l.in.c, t.scratch, sums);
    if (!last_to_arrive(counters + group, blocks.tiles)) return;
    Numbers<double, 1> merged[2];
    const Partials<T> entries{t.scratch, blocks.tiles, kTileRows, blocks.rows};
    Sums::merge(threads, l.in.c, entries, 0, entries.count, merged);
    for (int q = 0; q < 2; ++q) sums[q] = converted<T>(merged[q]);
  }
  for (int q = 0; q < 2; ++q) {
    T* out = kTangent ? t.grad_w_dot[q] : t.grad_w[q];
    if (out && threads.row == 0 && threads.active) put(out, threads.channel, sums[q].at[0], t.add_w[q]);
  }
}

/// Element i of `known`, or of the sum, which is written. The same thread reads it again later.
template <class T>
struct Summed {
  const T *known, *a, *b;
  unsigned a_size, b_size;
  T* to;

  __device__ __forceinline__ Summed(const T* known, const Summands<T>& of, const Memory& memory)
      : known(known),
        a(resolve(of.a, memory, blockIdx.z)),
        b(resolve(of.b, memory, blockIdx.z)),
        a_size(of.a_size),
        b_size(of.b_size),
        to(resolve(of.sum, memory, blockIdx.z)) {}
  __device__ __forceinline__ T operator()(int64_t i) const {
    if (!to) return known[i];
    const unsigned element = static_cast<unsigned>(i);
    const T sum = (a ? a[element % a_size] : T(0)) + (b ? b[element % b_size] : T(0));
    to[i] = sum;
    return sum;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    group_norm_forward(Layer l, int width, Tensors<T> symbolic, Summands<T> summands, Deferred deferred) {
  const Memory memory = deferred.ready();
  const View<T> view(l, width, symbolic, memory);
  const Tensors<T>& t = view.t;
  const Summed<T> x(t.x[0], summands, memory);
  T mean[1], moments[2];
  view.sum(mean, [&](int64_t i, int, T(&sum)[1]) { sum[0] += x(i); });
  const T mu = view.mean(mean[0]);
  view.sum(moments, [&](int64_t i, int, T(&sum)[2]) {
    const T d = t.x[0][i] - mu;
    sum[0] += d;
    sum[1] += d * d;
  });
  const Map<T> map(mu, view.mean(moments[0]), 1 / std::sqrt(view.mean(moments[1]) + static_cast<T>(l.eps)));
  if (view.writes()) {
    view.saved.mu[view.cell] = map.mu, view.saved.rest[view.cell] = map.rest, view.saved.s[view.cell] = map.s;
  }
  view.each([&](int64_t i, int channel) {
    t.y[i] = view.gamma(channel) * map.xh(t.x[0][i]) + or_value(t.w[1], channel, T(0));
  });
}

/// Computes grad_x, and the gradients of gamma and beta.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    group_norm_backward(Layer l, int width, Tensors<T> symbolic, Blocks blocks, Deferred deferred) {
  const Memory memory = deferred.ready();
  if (const int other = static_cast<int>(blockIdx.x) - blocks.of_cells; other >= 0) {
    return give_affine<false>(l, resolve(symbolic, memory, blockIdx.z), blocks, other,
                              memory.counters_of(blockIdx.z));
  }
  const View<T> view(l, width, symbolic, memory);
  const Tensors<T>& t = view.t;
  const Map<T> map(view.saved, view.cell, false);
  T sums[2];
  view.sum(sums, [&](int64_t i, int channel, T(&sum)[2]) {
    const T h = view.gamma(channel) * t.grad_y[i];
    sum[0] += h;
    sum[1] += h * map.xh(t.x[0][i]);
  });
  const T A = view.mean(sums[0]), B = view.mean(sums[1]);
  view.each([&](int64_t i, int channel) {
    const T u = view.gamma(channel) * t.grad_y[i] - A - map.xh(t.x[0][i]) * B;
    put(t.grad_x[0], i, map.s * u, t.add_x[0]);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    group_norm_forward_tangent(Layer l, int width, Tensors<T> symbolic, Summands<T> summands,
                               Deferred deferred) {
  const Memory memory = deferred.ready();
  const View<T> view(l, width, symbolic, memory);
  const Tensors<T>& t = view.t;
  Map<T> map(view.saved, view.cell, false);
  const T* x_dot = t.x_dot[0];
  if (x_dot) {
    const Summed<T> summed(x_dot, summands, memory);
    T sums[2];
    view.sum(sums, [&](int64_t i, int, T(&sum)[2]) {
      const T moved = summed(i);
      sum[0] += moved;
      sum[1] += moved * map.xh(t.x[0][i]);
    });
    map.Rmu = view.mean(sums[0]), map.q = view.mean(sums[1]);
    if (view.writes()) view.saved.Rmu[view.cell] = map.Rmu, view.saved.q[view.cell] = map.q;
  }
  view.each([&](int64_t i, int channel) {
    const T xh = map.xh(t.x[0][i]);
    T y_dot = view.gamma_dot(channel) * xh + or_value(t.w_dot[1], channel, T(0));
    if (x_dot) y_dot += view.gamma(channel) * map.xh_dot(xh, x_dot[i]);
    t.y_dot[i] = y_dot;
  });
}

/// Computes grad_x_dot, and the gradients of gamma and beta, their tangents.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T> - 1)  // one block fewer: needs more registers
    group_norm_backward_tangent(Layer l, int width, Tensors<T> symbolic, Blocks blocks, Deferred deferred) {
  const Memory memory = deferred.ready();
  if (const int other = static_cast<int>(blockIdx.x) - blocks.of_cells; other >= 0) {
    return give_affine<true>(l, resolve(symbolic, memory, blockIdx.z), blocks, other,
                             memory.counters_of(blockIdx.z));
  }
  const View<T> view(l, width, symbolic, memory);
  const Tensors<T>& t = view.t;
  const T* x_dot = t.x_dot[0];
  const Map<T> map(view.saved, view.cell, x_dot != nullptr);
  /// Calls f with xh, Rxh, h and h_dot of a value.
  const auto known = [&](int64_t i, int channel, auto f) {
    const T xh = map.xh(t.x[0][i]), g = or_value(t.grad_y, i, T(0));
    f(xh, x_dot ? map.xh_dot(xh, x_dot[i]) : T(0), view.gamma(channel) * g,
      view.gamma(channel) * t.grad_y_dot[i] + view.gamma_dot(channel) * g);
  };
  T sums[4];
  view.sum(sums, [&](int64_t i, int channel, T(&sum)[4]) {
    known(i, channel, [&](T xh, T xh_dot, T h, T h_dot) {
      sum[0] += h;
      sum[1] += h * xh;
      sum[2] += h_dot;
      sum[3] += h_dot * xh + h * xh_dot;
    });
  });
  const T A = view.mean(sums[0]), B = view.mean(sums[1]), RA = view.mean(sums[2]), RB = view.mean(sums[3]);
  view.each([&](int64_t i, int channel) {
    known(i, channel, [&](T xh, T xh_dot, T h, T h_dot) {
      const T u = h - A - xh * B;
      put(t.grad_x_dot[0], i, map.s * (h_dot - RA - xh_dot * B - xh * RB - map.s * map.q * u), t.add_x[0]);
    });
  });
}

int64_t rows_of(const Layer& l) { return l.n * l.in.h * l.in.w; }

template <class T>
void launch_forward(const Launcher& launch, const Layer& l, const Tensors<T>& t, bool tangent,
                    const Summands<T>& summands) {
  const int width = cells_of_block(l);
  launch(tangent ? "group_norm forward tangent" : "group_norm forward",
         tangent ? group_norm_forward_tangent<T> : group_norm_forward<T>,
         Grid{blocks_for(l.n * l.groups, width)}, kThreads, 0, l, width, t, summands, launch.memory);
}

template <class T>
void launch_backward(const Launcher& launch, const char* name,
                     void (*kernel)(Layer, int, Tensors<T>, Blocks, Deferred), const Layer& l,
                     const Tensors<T>& t, const T* grad_x, const T* const* grad_w) {
  const int width = cells_of_block(l);
  Blocks blocks;
  if (grad_x) blocks.of_cells = static_cast<int>(blocks_for(l.n * l.groups, width));
  if (grad_w[0] || grad_w[1]) {
    blocks.rows = static_cast<int>(rows_of(l)), blocks.groups = static_cast<int>(channel_groups(l.in.c));
    blocks.tiles = blocks.groups > kCounters ? 1 : static_cast<int>(tiles_of(blocks.rows));
  }
  const int64_t count = blocks.of_cells + int64_t{blocks.tiles} * blocks.groups;
  if (count > 0) launch(name, kernel, Grid{count}, kThreads, 0, l, width, t, blocks, launch.memory);
}

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  launch_forward(launch, l, t, false, {});
}

template <class T>
void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  launch_backward(launch, "group_norm backward", group_norm_backward<T>, l, t, t.grad_x[0], t.grad_w);
}

template <class T>
void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  launch_forward(launch, l, t, true, {});
}

template <class T>
void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  launch_backward(launch, "group_norm backward tangent", group_norm_backward_tangent<T>, l, t,
                  t.grad_x_dot[0], t.grad_w_dot);
}

template <class T>
LaunchPasses<T> all_passes() {
  return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
}

}  // namespace

template <class T>
void normalise_sum(const Launcher& launch, const Layer& norm, const Tensors<T>& t, bool tangent,
                   const Summands<T>& summands) {
  launch_forward(launch, norm, t, tangent, summands);
}
template void normalise_sum(const Launcher&, const Layer&, const Tensors<float>&, bool,
                            const Summands<float>&);
template void normalise_sum(const Launcher&, const Layer&, const Tensors<double>&, bool,
                            const Summands<double>&);

template <>
struct OnGpu<Kind::group_norm> {
  static Footprint footprint(const Layer& l) {
    const int64_t cells = l.n * l.groups;
    return {3 * cells, partials_scratch(rows_of(l), l.in.c), 2 * cells};
  }
  template <class T>
  static LaunchPasses<T> passes() {
    return all_passes<T>();
  }
};
template struct Implementation<Kind::group_norm>;

}  // namespace maml::cuda
