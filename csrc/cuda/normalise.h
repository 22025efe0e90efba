// y = pool(f(BatchNorm(x))) with batch statistics over the m = n h w rows of x [m, c]: the kernels of
// batch_norm (f the identity, no pool) and of block (any f, with or without a max-pool). Nothing between x
// and y is stored: a kernel that needs u or f'(u) computes it from x again. Per channel, with g = grad_y:
//
//   mu = mean x, s = (var + eps)^-1/2 (biased), xh = (x - mu) s, u = gamma xh + beta
//   y = max of f(u) over a window; the output's "chosen" pixel is the one that holds the maximum
//
//   g' = f'(u) (sum of g over the outputs that chose this pixel)
//   G1 = sum g' = grad_beta, G2 = sum g' xh = grad_gamma,   v = g' - G1/m - xh G2/m
//   grad_x = gamma s v
//
//   Rmu = mean x_dot, c = mean(xh x_dot), Rxh = s (x_dot - Rmu - xh c)
//   u_dot = gamma Rxh + gamma_dot xh + beta_dot
//   y_dot = f'(u) u_dot at the chosen pixel
//
//   g'_dot = f'(u) (sum of g_dot over those outputs) + f''(u) u_dot (sum of g over them)
//   R1 = sum g'_dot = grad_beta_dot, R2 = sum(g'_dot xh + g' Rxh) = grad_gamma_dot
//   grad_x_dot = k v + gamma s (g'_dot - R1/m - Rxh G2/m - xh R2/m),   k = s (gamma_dot - gamma s c)
//
// Kernels: each pass has one kernel for its sums over tiles of rows (moments.h; not where a convolution has
// already computed them) and a second one that merges these sums and does the rest. Where one tile holds all
// rows, the second kernel also sums the cotangents. Sums of cotangents run over the outputs, because g' is
// zero at all other pixels; a pixel chosen by two outputs contributes one term for each.
//
// Threads: a thread works on one channel (channels.h). In the second kernel it takes outputs, or for grad_x
// the pixels of cells (windows.h). Each pixel gathers from the outputs that may have chosen it, in ascending
// order: no two threads write the same element, and there are no atomics. Shared memory holds the sums only.
//
// Why y is stored: the convolution that reads y could compute it from x while it loads its operand.
//   With a pool (mini-ImageNet), y is a quarter of x. Each of the 9 reads of a 3 x 3 kernel would become 4,
//   with 4 evaluations of f.
//   Without a pool, at stride 1, f and the affine map would run 9 times for each element instead of once, and
//   again in the weight gradient and in both tangents.
//   At stride 2 (Omniglot) they would run 2.25 times, and there would be a gain: y of the three blocks is
//   18 kB an image, written and read once in each of the 11 passes of a meta-step with K = 5 and T = 32. That
//   is 140 MB or 30 to 50 us of a target of 750, and 33 launches of about 1.5 us. But all products, which
//   take most of the 750 us, would load this operand through registers instead of cp.async, would need the
//   zeros of the padding after f, and every block of them would first merge the statistics. This has not been
//   measured.
//
// Limits: rows of x and y of one task are numbered in 32 bits. gamma and beta may be absent (1 and 0). x_dot
// is absent where the layer's input has no tangent; then Rmu = c = 0. grad_y may be absent in the backward
// tangent. The twins on the CPU are cpu/batch_norm.cpp and cpu/conv_block.cpp.
#pragma once

#include "cuda/affine.h"
#include "cuda/elementwise.h"
#include "cuda/layers.h"
#include "cuda/moments.h"
#include "cuda/windows.h"
#include "layers/functions.h"

namespace maml::cuda {

struct Identity {
  template <class T>
  static __device__ __forceinline__ Derivatives<T> at(const Layer&, T u) {
    return {u, T(1), T(0)};
  }
};

template <Function F>
struct Activation {
  template <class T>
  static __device__ __forceinline__ Derivatives<T> at(const Layer& l, T u) {
    return evaluate<F, T>(l, u);
  }
};

/// One thread's view of its task: the thread's channel, the tensors, and the sizes in 32 bits.
template <class T>
struct View {
  ChannelThreads threads;
  Tensors<T> t;
  Saved<T> saved;
  int64_t c;
  int channel;             // a thread without a channel reads the first
  int n, pixels, outputs;  // pixels and outputs of one sample
  bool pooled;

  __device__ __forceinline__ View(const Layer& l, const Tensors<T>& symbolic, const Memory& memory)
      : threads(channel_threads(l.in.c)),
        t(resolve(symbolic, memory, blockIdx.z)),
        saved(t.saved, l.in.c),
        c(l.in.c),
        channel(threads.active ? threads.channel : 0),
        n(static_cast<int>(l.n)),
        pixels(static_cast<int>(l.in.h * l.in.w)),
        outputs(static_cast<int>(l.out.h * l.out.w)),
        pooled(l.pooled) {}

  __device__ __forceinline__ int64_t element(int row) const { return row * c + channel; }
  __device__ __forceinline__ T mean(T sum) const { return sum / static_cast<T>(n * pixels); }

  /// Whether this thread writes the values that are common to a channel: block 0 does, one thread a channel.
  __device__ __forceinline__ bool writes() const {
    return blockIdx.x == 0 && threads.row == 0 && threads.active;
  }

  /// The row of x that this row of y came from.
  __device__ __forceinline__ int source(int row) const {
    return pooled ? row / outputs * pixels + saved.places[element(row)] : row;
  }

  /// The affine map, from what the forward pass saved, and with its tangent, from what forward_tangent saved.
  __device__ __forceinline__ Affine<T> affine() const {
    return {t, channel, saved.mu[channel], saved.s[channel]};
  }
  __device__ __forceinline__ Affine<T> moving_affine() const {
    Affine<T> map = affine();
    map.move(t, channel, t.x_dot[0] ? saved.Rmu[channel] : T(0), t.x_dot[0] ? saved.c[channel] : T(0));
    return map;
  }

  /// The rows [tile_start, tile_start + tile_rows) of y are this block's tile.
  __device__ __forceinline__ int tile_start() const { return static_cast<int>(blockIdx.x) * kTileRows; }
  __device__ __forceinline__ int tile_rows() const {
    return std::min(int{kTileRows}, n * outputs - tile_start());
  }

  /// Calls f(element of x, chosen) for each of this thread's elements; chosen(each) calls each(element of y)
  /// for the outputs that chose it, in ascending order.
  template <class F>
  __device__ __forceinline__ void each_input(const Layer& l, int cells, F f) const {
    if (pooled) {
      each_place(Windows(l), threads, n, cells, c, saved.places + channel, [&](int64_t at, auto chosen) {
        f(at + channel, [&](auto each) { chosen([&](int64_t output) { each(output + channel); }); });
      });
    } else {
      each_row(threads, n * pixels,
               [&](int row) { f(element(row), [&](auto each) { each(element(row)); }); });
    }
  }
};

template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    normalise_forward(Layer l, Tensors<T> symbolic, Partials<T> statistics, Deferred deferred) {
  const Memory memory = deferred.ready();
  const View<T> view(l, symbolic, memory);
  double moments[2];
  const Partials<T> p = resolve(statistics, memory, blockIdx.z);
  Moments<1>::merge(view.threads, view.c, p, 0, p.count, moments);
  const T variance = static_cast<T>(moments[1] / static_cast<double>(p.m));
  const T mu = static_cast<T>(moments[0]), s = 1 / std::sqrt(variance + static_cast<T>(l.eps));
  if (view.writes()) view.saved.mu[view.channel] = mu, view.saved.s[view.channel] = s;
  const Affine<T> map(view.t, view.channel, mu, s);
  const T* x = view.t.x[0] + view.channel;
  if (!view.pooled) {
    each_row(view.threads, view.n * view.pixels,
             [&](int row) { view.t.y[view.element(row)] = Activation::at(l, map.u(x[row * view.c])).f; });
    return;
  }
  const Windows w(l);
  each_item(view.threads, view.n, view.outputs, [&](int sample, int output) {
    const T* image = x + sample * view.pixels * view.c;
    const Largest<T> best = largest_of<T>(
        w, output, [&](int pixel) { return Activation::at(l, map.u(image[pixel * view.c])).f; });
    const int64_t at = view.element(sample * view.outputs + output);
    view.t.y[at] = best.value;
    view.saved.places[at] = best.place;
  });
}

/// The sums over all rows of y: merged from the entries of the tiles, or, where all rows are one tile,
/// computed here by own(first row, rows, sums).
template <class T, class Own>
__device__ __forceinline__ void whole_sums(const View<T>& view, const Partials<T>& p, T (&sums)[2], Own own) {
  if (p.count == 0) return own(0, view.n * view.outputs, sums);
  double merged[2];
  Sums::merge(view.threads, view.c, p, 0, p.count, merged);
  for (int q = 0; q < 2; ++q) sums[q] = static_cast<T>(merged[q]);
}

/// G1 and G2 over the rows [first, first + count) of y.
template <class Activation, class T>
__device__ __forceinline__ void cotangent_sums(const Layer& l, const View<T>& view, int first, int count,
                                               T (&sums)[2]) {
  const Tensors<T>& t = view.t;
  const Affine<T> map = view.affine();
  channel_sums(view.threads, count, sums, [&](int i, T(&sum)[2]) {
    const T x = t.x[0][view.element(view.source(first + i))];
    const T g = Activation::at(l, map.u(x)).df * t.grad_y[view.element(first + i)];
    sum[0] += g;
    sum[1] += g * map.xh(x);
  });
}

/// Block x computes the sums of tile x.
template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    normalise_backward_sums(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  const View<T> view(l, symbolic, memory);
  T sums[2];
  cotangent_sums<Activation>(l, view, view.tile_start(), view.tile_rows(), sums);
  write_entry(view.threads, view.c, view.t.scratch, sums);
}

/// out[channel] (+)= value, unless `out` is null.
template <class T>
__device__ __forceinline__ void give(T* out, int channel, T value, bool add) {
  if (out) put(out, channel, value, add);
}

template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    normalise_backward(Layer l, Tensors<T> symbolic, Partials<T> partials, int cells, Deferred deferred) {
  const Memory memory = deferred.ready();
  const View<T> view(l, symbolic, memory);
  const Tensors<T>& t = view.t;
  T sums[2];
  whole_sums(view, resolve(partials, memory, blockIdx.z), sums, [&](int first, int count, T(&own)[2]) {
    cotangent_sums<Activation>(l, view, first, count, own);
  });
  const T G1 = sums[0], G2 = sums[1];
  if (view.writes()) {
    view.saved.G1[view.channel] = G1, view.saved.G2[view.channel] = G2;
    give(t.grad_w[0], view.channel, G2, t.add_w[0]);
    give(t.grad_w[1], view.channel, G1, t.add_w[1]);
  }
  if (!t.grad_x[0]) return;
  const Affine<T> map = view.affine();
  const T mean_g = view.mean(G1), slope = view.mean(G2);
  view.each_input(l, cells, [&](int64_t at, auto chosen) {
    T g = 0;
    chosen([&](int64_t output) { g += t.grad_y[output]; });
    const T x = t.x[0][at];
    const T v = Activation::at(l, map.u(x)).df * g - mean_g - map.xh(x) * slope;
    put(t.grad_x[0], at, map.scale * v, t.add_x[0]);
  });
}

template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    normalise_forward_tangent(Layer l, Tensors<T> symbolic, Partials<T> statistics, Deferred deferred) {
  const Memory memory = deferred.ready();
  const View<T> view(l, symbolic, memory);
  const Tensors<T>& t = view.t;
  Affine<T> map = view.affine();
  T Rmu = 0, correlation = 0;
  if (t.x_dot[0]) {
    double moments[3];
    const Partials<T> p = resolve(statistics, memory, blockIdx.z);
    Moments<2>::merge(view.threads, view.c, p, 0, p.count, moments);
    Rmu = static_cast<T>(moments[1]);
    correlation = map.s * static_cast<T>(moments[2] / static_cast<double>(p.m));
  }
  if (view.writes()) view.saved.Rmu[view.channel] = Rmu, view.saved.c[view.channel] = correlation;
  map.move(t, view.channel, Rmu, correlation);
  each_row(view.threads, view.n * view.outputs, [&](int row) {
    const int64_t from = view.element(view.source(row));
    const T x = t.x[0][from], x_dot = t.x_dot[0] ? t.x_dot[0][from] : T(0);
    t.y_dot[view.element(row)] = Activation::at(l, map.u(x)).df * map.u_dot(x, x_dot);
  });
}

/// R1 and R2 over the rows [first, first + count) of y.
template <class Activation, class T>
__device__ __forceinline__ void cotangent_dot_sums(const Layer& l, const View<T>& view, int first, int count,
                                                   T (&sums)[2]) {
  const Tensors<T>& t = view.t;
  const Affine<T> map = view.moving_affine();
  channel_sums(view.threads, count, sums, [&](int i, T(&sum)[2]) {
    const int64_t from = view.element(view.source(first + i)), at = view.element(first + i);
    const T x = t.x[0][from], x_dot = t.x_dot[0] ? t.x_dot[0][from] : T(0),
            g = t.grad_y ? t.grad_y[at] : T(0);
    const Derivatives<T> d = Activation::at(l, map.u(x));
    const T g_dot = d.df * t.grad_y_dot[at] + d.ddf * map.u_dot(x, x_dot) * g;
    sum[0] += g_dot;
    sum[1] += g_dot * map.xh(x);
    if (t.x_dot[0]) sum[1] += d.df * g * map.xh_dot(x, x_dot);
  });
}

/// Block x computes the sums of tile x.
template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    normalise_backward_tangent_sums(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  const View<T> view(l, symbolic, memory);
  T sums[2];
  cotangent_dot_sums<Activation>(l, view, view.tile_start(), view.tile_rows(), sums);
  write_entry(view.threads, view.c, view.t.scratch, sums);
}

template <class Activation, class T>
__global__ void __launch_bounds__(kThreads, kResident<T> - 1)  // one block fewer: needs more registers
    normalise_backward_tangent(Layer l, Tensors<T> symbolic, Partials<T> partials, int cells,
                               Deferred deferred) {
  const Memory memory = deferred.ready();
  const View<T> view(l, symbolic, memory);
  const Tensors<T>& t = view.t;
  T sums[2];
  whole_sums(view, resolve(partials, memory, blockIdx.z), sums, [&](int first, int count, T(&own)[2]) {
    cotangent_dot_sums<Activation>(l, view, first, count, own);
  });
  const T R1 = sums[0], R2 = sums[1];
  if (view.writes()) {
    give(t.grad_w_dot[0], view.channel, R2, t.add_w[0]);
    give(t.grad_w_dot[1], view.channel, R1, t.add_w[1]);
  }
  if (!t.grad_x_dot[0]) return;
  const Affine<T> map = view.moving_affine();
  const bool moves = t.grad_y != nullptr;
  const T mean_g = moves ? view.mean(view.saved.G1[view.channel]) : T(0);
  const T slope = moves ? view.mean(view.saved.G2[view.channel]) : T(0);
  const T mean_dot = view.mean(R1), slope_dot = view.mean(R2);
  view.each_input(l, cells, [&](int64_t at, auto chosen) {
    T g = 0, g_dot = 0;
    chosen([&](int64_t output) {
      if (moves) g += t.grad_y[output];
      g_dot += t.grad_y_dot[output];
    });
    const T x = t.x[0][at], x_dot = t.x_dot[0] ? t.x_dot[0][at] : T(0);
    const T xh = map.xh(x), xh_dot = t.x_dot[0] ? map.xh_dot(x, x_dot) : T(0);
    const Derivatives<T> d = Activation::at(l, map.u(x));
    const T v = d.df * g - mean_g - xh * slope;
    const T v_dot =
        d.df * g_dot + d.ddf * map.u_dot(x, x_dot) * g - mean_dot - xh_dot * slope - xh * slope_dot;
    put(t.grad_x_dot[0], at, map.slope * v + map.scale * v_dot, t.add_x[0]);
  });
}

/// The grid of a kernel each of whose blocks merges all entries: at least two rows a thread, and up to 64 as
/// long as that leaves 64 blocks.
inline Grid merging_grid(int64_t rows, int64_t c) {
  const int64_t at_once = kThreads / channel_width(c);
  return channel_grid(rows, c, std::clamp<int64_t>(rows / (64 * at_once), 2, 64));
}

/// The four passes of y = pool(f(BatchNorm(x))), f = Activation.
template <class Activation>
struct Normalise {
  static int64_t rows_of(const Layer& l) { return l.n * l.in.h * l.in.w; }
  static int64_t output_rows(const Layer& l) { return l.n * l.out.h * l.out.w; }
  static int64_t cells(const Layer& l) { return l.pooled ? cells_of(l) : l.in.h * l.in.w; }

  template <class T>
  static void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    const auto p = moments_of<1, T>(launch, rows_of(l), l.in.c, t.x[0], nullptr, t.statistics, t.scratch);
    launch("batch_norm forward", normalise_forward<Activation, T>, merging_grid(output_rows(l), l.in.c),
           kThreads, 0, l, t, p, launch.memory);
  }

  template <class T>
  static void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    const auto p = sums_of("batch_norm backward, sums", normalise_backward_sums<Activation, T>, launch, l, t);
    launch("batch_norm backward", normalise_backward<Activation, T>, input_grid(l, t.grad_x[0]), kThreads, 0,
           l, t, p, static_cast<int>(cells(l)), launch.memory);
  }

  template <class T>
  static void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    Partials<T> p{};
    if (t.x_dot[0]) {
      p = moments_of<2, T>(launch, rows_of(l), l.in.c, t.x[0], t.x_dot[0], t.statistics_dot, t.scratch);
    }
    launch("batch_norm forward tangent", normalise_forward_tangent<Activation, T>,
           merging_grid(output_rows(l), l.in.c), kThreads, 0, l, t, p, launch.memory);
  }

  template <class T>
  static void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    const auto p = sums_of("batch_norm backward tangent, sums",
                           normalise_backward_tangent_sums<Activation, T>, launch, l, t);
    launch("batch_norm backward tangent", normalise_backward_tangent<Activation, T>,
           input_grid(l, t.grad_x_dot[0]), kThreads, 0, l, t, p, static_cast<int>(cells(l)), launch.memory);
  }

 private:
  /// The sums of a cotangent over the rows of y, tile by tile; empty where there is one tile only.
  template <class T>
  static Partials<T> sums_of(const char* name, void (*kernel)(Layer, Tensors<T>, Deferred),
                             const Launcher& launch, const Layer& l, const Tensors<T>& t) {
    const int64_t rows = output_rows(l), c = l.in.c;
    if (tiles_of(rows) == 1) return {};
    launch(name, kernel, Grid{tiles_of(rows), blocks_for(c, channel_width(c))}, kThreads, 0, l, t,
           launch.memory);
    return few_partials<Sums>(launch, rows, c, kTileRows, t.scratch, t.scratch);
  }

  /// Where grad_x is not wanted, one block per channel group still writes the sums.
  static Grid input_grid(const Layer& l, const void* grad_x) {
    return merging_grid(grad_x ? l.n * cells(l) : 1, l.in.c);
  }
};

/// What the passes save, without the chosen pixels of a max-pool, and their scratch.
inline Footprint normalise_footprint(const Layer& l) {
  const int64_t rows = l.n * std::max(l.in.h * l.in.w, l.out.h * l.out.w);
  return {6 * l.in.c, partials_scratch(rows, l.in.c)};
}

}  // namespace maml::cuda
