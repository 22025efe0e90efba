// y = pool(f(BatchNorm(x))) with batch statistics over the m = n h w rows of x [m, c]: the passes of
// batch_norm (f the identity, no pool) and of norm_block (any f, with or without a max-pool), as functions of
// a team of blocks for one group of channels. normalise_passes.h launches them. Nothing between x and y is
// stored: a kernel that needs u or f'(u) computes it from x again. Per channel, with g = grad_y:
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
// Functions: each pass has one for its sums over tiles of rows (moments.h; not where a convolution has
// already computed them) and a second one that merges these sums and does the rest. Where one tile holds all
// rows, the second one also sums the cotangents. Sums of cotangents run over the outputs, because g' is
// zero at all other pixels; a pixel chosen by two outputs contributes one term for each.
//
// Threads: a thread works on a vector of channels (channels.h). In the second function it takes outputs, or
// for grad_x the pixels of cells (windows.h). Each pixel gathers from the outputs that may have chosen it, in
// ascending order: no two threads write the same element, and there are no atomics. Shared memory holds the
// sums only.
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
// Padding (Walk::shares): samples behind the others that statistics do not count, and whose cotangents are
// zero. m is then the number of rows of the others, and grad_x of padding is zero, as is its tangent. y and
// y_dot of padding are finite, where x and x_dot are.
//
// Limits: rows of x and y of one task are numbered in 32 bits. gamma and beta may be absent (1 and 0). x_dot
// is absent where the layer's input has no tangent; then Rmu = c = 0. grad_y may be absent in the backward
// tangent. The twins on the CPU are cpu/batch_norm.cpp and cpu/conv_block.cpp.
#pragma once

#include "cuda/affine.h"
#include "cuda/channel_view.h"
#include "cuda/moments.h"
#include "cuda/windows.h"
#include "layers/functions.h"

namespace maml::cuda {

struct Identity {
  template <class T, int N>
  static __device__ __forceinline__ Derivatives<Numbers<T, N>> at(const Layer&, const Numbers<T, N>& u) {
    return {u, T(1), T(0)};
  }
};

template <Function F>
struct Activation {
  template <class T, int N>
  static __device__ __forceinline__ Derivatives<Numbers<T, N>> at(const Layer& l, const Numbers<T, N>& u) {
    Derivatives<Numbers<T, N>> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Derivatives<T> d = evaluate<F, T>(l, u.at[i]);
      result.f.at[i] = d.f, result.df.at[i] = d.df, result.ddf.at[i] = d.ddf;
    }
    return result;
  }
};

/// The cells of one sample over which the threads of a pass to x are spread: without a pool, its pixels.
constexpr int64_t input_cells(const Layer& l) { return l.pooled ? cells_of(l) : l.in.h * l.in.w; }

/// One thread's view of its task: the thread's channels, the tensors, and the sizes in 32 bits.
template <class T>
struct View : ChannelView<T> {
  using Base = ChannelView<T>;
  using Base::N, Base::team, Base::threads, Base::c, Base::channel, Base::element, Base::at, Base::row,
      Base::of_channels;
  using typename Base::Values;

  const Tensors<T>& t;
  Saved<T> saved;
  int n, pixels, outputs;  // pixels and outputs of one sample
  int counted;             // samples that are no padding
  bool pooled;

  /// `whole_rows`: every tensor that the kernel accesses starts at an aligned address.
  __device__ __forceinline__ View(Team team, int group, const Layer& l, const Tensors<T>& t, bool whole_rows)
      : View(team, channel_threads<N>(l.in.c, group, whole_rows), l, t) {}
  __device__ __forceinline__ View(Team team, const ChannelThreads& threads, const Layer& l,
                                  const Tensors<T>& t)
      : Base(team, threads, l.in.c),
        t(t),
        saved(t.saved, l.in.c),
        n(static_cast<int>(l.n)),
        pixels(static_cast<int>(l.in.h * l.in.w)),
        outputs(static_cast<int>(l.out.h * l.out.w)),
        counted(counted_samples(t.x[1], n)),
        pooled(l.pooled) {}

  /// The number of rows of x that are no padding.
  __device__ __forceinline__ int rows() const { return counted * pixels; }
  __device__ __forceinline__ Values mean(const Values& sum) const { return sum / static_cast<T>(rows()); }

  /// The entries of the rows that count, of those that were taken of all rows.
  __device__ __forceinline__ Partials<T> counting(const Partials<T>& p) const {
    return {p.at, t.x[1] ? (rows() + p.rows - 1) / p.rows : p.count, p.rows, t.x[1] ? rows() : p.m, p.step};
  }
  /// Writes zeros for the padding of a cotangent [n, pixels, c], unless zeros are added to what is there.
  __device__ __forceinline__ void clear_padding(T* grad_x, bool add) const {
    if (add || counted == n) return;
    each_row<1>(
        team, threads, (n - counted) * pixels, [&](int r) { return element(rows() + r); },
        [&](int, int64_t at) { this->put(grad_x, at, Values(T(0))); });
  }

  /// The values of x at the pixels that this row of y came from.
  __device__ __forceinline__ Values source(const T* p, int row) const {
    if (!pooled) return this->row(p, row);
    if (!p) return T(0);
    return this->chosen(p, row / outputs * pixels, at(saved.places, element(row)));
  }

  /// The affine map, from what the forward pass saved, and with its tangent, from what forward_tangent saved.
  __device__ __forceinline__ Affine<Values> affine(const Values& mu, const Values& s) const {
    return {of_channels(t.w[0], 1), of_channels(t.w[1], 0), mu, s};
  }
  __device__ __forceinline__ Affine<Values> affine() const {
    return affine(at(saved.mu, channel), at(saved.s, channel));
  }
  __device__ __forceinline__ void move(Affine<Values>& map, const Values& mean, const Values& slope) const {
    map.move(of_channels(t.w_dot[0], 0), of_channels(t.w_dot[1], 0), mean, slope);
  }
  __device__ __forceinline__ Affine<Values> moving_affine() const {
    Affine<Values> map = affine();
    const bool moves = t.x_dot[0] != nullptr;
    move(map, of_channels(moves ? saved.Rmu : nullptr, 0), of_channels(moves ? saved.c : nullptr, 0));
    return map;
  }

  /// The rows [tile_start, tile_start + tile_rows) of y are this block's tile.
  __device__ __forceinline__ int tile_start() const { return team.block * kTileRows; }
  __device__ __forceinline__ int tile_rows() const {
    return std::min(int{kTileRows}, n * outputs - tile_start());
  }

  /// Calls store(element of x, load(element, chosen)) for each vector of this thread, but not of padding.
  /// chosen(p) is the sum of p [y] over the outputs that chose the pixel, in ascending order, and zero for a
  /// null p.
  template <int kAtOnce, class Load, class Store>
  __device__ __forceinline__ void each_input(const Layer& l, int cells, Load load_of, Store store_to) const {
    if (pooled) {
      each_place<N>(Windows(l), team, threads, counted, cells, c, saved.places + channel,
                    [&](int64_t from, auto choosing) {
                      store_to(from + channel, load_of(from + channel, [&](const T* p) {
                                 Values sum = T(0);
                                 if (p) {
                                   choosing([&](int64_t output, const Numbers<bool, N>& chosen) {
                                     sum += where(chosen, at(p, output + channel));
                                   });
                                 }
                                 return sum;
                               }));
                    });
    } else {
      each_row<kAtOnce>(
          team, threads, rows(),
          [&](int r) { return load_of(element(r), [&](const T* p) { return row(p, r); }); },
          [&](int r, const auto& loaded) { store_to(element(r), loaded); });
    }
  }
};

/// The pass from the moments of x (moments.h) on. A thread has kAtOnce rows in flight.
template <class Activation, int kAtOnce, class T>
__device__ __forceinline__ void normalise_forward(const Layer& l, const View<T>& view,
                                                  const Numbers<double, View<T>::N> (&moments)[2]) {
  using Values = typename View<T>::Values;
  constexpr int N = View<T>::N;
  const Tensors<T>& t = view.t;
  const Values mu = converted<T>(moments[0]);
  const Values s = lanewise(moments[1], [&](double sum) {
    return 1 / std::sqrt(static_cast<T>(sum / static_cast<double>(view.rows())) + static_cast<T>(l.eps));
  });
  if (view.writes()) {
    view.put(view.saved.mu, view.channel, mu);
    view.put(view.saved.s, view.channel, s);
  }
  const Affine<Values> map = view.affine(mu, s);
  auto y = [&](const Values& x) { return Activation::at(l, map.u(x)).f; };
  if (!view.pooled) {
    each_row<kAtOnce>(
        view.team, view.threads, view.n * view.pixels, [&](int row) { return view.row(t.x[0], row); },
        [&](int row, const Values& x) { view.put(t.y, view.element(row), y(x)); });
    return;
  }
  const Windows w(l);
  each_item(view.team, view.threads, view.n, view.outputs, [&](int sample, int output) {
    const auto best = largest_of<T, N>(
        w, output, [&](int pixel) { return y(view.row(t.x[0], sample * view.pixels + pixel)); });
    const int64_t to = view.element(sample * view.outputs + output);
    view.put(t.y, to, best.value);
    view.put(view.saved.places, to, best.place);
  });
}

template <class Activation, class T>
__device__ __forceinline__ void normalise_forward(Team team, int group, const Layer& l, const Tensors<T>& t,
                                                  const Partials<T>& p) {
  const View<T> view(team, group, l, t, aligned(t.x[0], t.y, t.w[0], t.w[1], t.saved, p.at));
  Numbers<double, View<T>::N> moments[2];
  const Partials<T> own = view.counting(p);
  Moments<1>::merge(view.threads, view.c, own, 0, own.count, moments);
  normalise_forward<Activation, 2>(l, view, moments);
}

/// The sums over all rows of y: merged from the entries of the tiles, or, where all rows are one tile,
/// computed here by own(first row, rows, sums).
template <class T, class Own>
__device__ __forceinline__ void whole_sums(const View<T>& view, const Partials<T>& p,
                                           typename View<T>::Values (&sums)[2], Own own) {
  if (p.count == 0) return own(0, view.n * view.outputs, sums);
  Numbers<double, View<T>::N> merged[2];
  Sums::merge(view.threads, view.c, p, 0, p.count, merged);
  for (int q = 0; q < 2; ++q) sums[q] = converted<T>(merged[q]);
}

/// G1 and G2 over the rows [first, first + count) of y.
template <class Activation, class T>
__device__ __forceinline__ void cotangent_sums(const Layer& l, const View<T>& view, int first, int count,
                                               typename View<T>::Values (&sums)[2]) {
  using Values = typename View<T>::Values;
  const Affine<Values> map = view.affine();
  channel_sums(view.threads, count, sums, [&](int i, Values(&sum)[2]) {
    const Values x = view.source(view.t.x[0], first + i);
    const Values g = Activation::at(l, map.u(x)).df * view.row(view.t.grad_y, first + i);
    sum[0] += g;
    sum[1] += g * map.xh(x);
  });
}

/// The sums of tile team.block.
template <class Activation, class T>
__device__ __forceinline__ void normalise_backward_sums(Team team, int group, const Layer& l,
                                                        const Tensors<T>& t) {
  const View<T> view(team, group, l, t, aligned(t.x[0], t.grad_y, t.w[0], t.w[1], t.saved, t.scratch));
  typename View<T>::Values sums[2];
  cotangent_sums<Activation>(l, view, view.tile_start(), view.tile_rows(), sums);
  write_entry(view.threads, team.block, view.c, t.scratch, sums);
}

template <class Activation, class T>
__device__ __forceinline__ void normalise_backward(Team team, int group, const Layer& l, const Tensors<T>& t,
                                                   const Partials<T>& p, int cells) {
  using Values = typename View<T>::Values;
  const View<T> view(
      team, group, l, t,
      aligned(t.x[0], t.grad_x[0], t.grad_y, t.w[0], t.w[1], t.grad_w[0], t.grad_w[1], t.saved, p.at));
  Values sums[2];
  whole_sums(view, p, sums, [&](int first, int count, Values(&own)[2]) {
    cotangent_sums<Activation>(l, view, first, count, own);
  });
  const Values G1 = sums[0], G2 = sums[1];
  if (view.writes()) {
    view.put(view.saved.G1, view.channel, G1);
    view.put(view.saved.G2, view.channel, G2);
    view.give(t.grad_w[0], G2, t.add_w[0]);
    view.give(t.grad_w[1], G1, t.add_w[1]);
  }
  if (!t.grad_x[0]) return;
  view.clear_padding(t.grad_x[0], t.add_x[0]);
  const Affine<Values> map = view.affine();
  // grad_x = gamma s f' g + at_mean + (x - mu) slope
  const Values at_mean = -(map.scale * view.mean(G1));
  const Values slope = -(map.scale * map.s * view.mean(G2));
  struct Loaded {
    Values x, g, before;
  };
  const Put put{t.add_x[0]};
  view.template each_input<1>(
      l, cells,
      [&](int64_t at, auto chosen) {
        return Loaded{view.at(t.x[0], at), chosen(t.grad_y),
                      put.add ? view.at(t.grad_x[0], at) : Values(T(0))};
      },
      [&](int64_t at, const Loaded& of) {
        const Values g = Activation::at(l, map.u(of.x)).df * of.g;
        const Values value = map.scale * g + ((of.x - map.mu) * slope + at_mean);
        view.put(t.grad_x[0], at, put(of.before, value));
      });
}

/// The pass from the moments of x and x_dot on, or without, where x_dot is absent.
template <class Activation, int kAtOnce, class T>
__device__ __forceinline__ void normalise_forward_tangent(const Layer& l, const View<T>& view,
                                                          const Numbers<double, View<T>::N> (&moments)[3]) {
  using Values = typename View<T>::Values;
  const Tensors<T>& t = view.t;
  Affine<Values> map = view.affine();
  Values Rmu = T(0), correlation = T(0);
  if (t.x_dot[0]) {
    Rmu = converted<T>(moments[1]);
    correlation = map.s * converted<T>(moments[2] / static_cast<double>(view.rows()));
  }
  if (view.writes()) {
    view.put(view.saved.Rmu, view.channel, Rmu);
    view.put(view.saved.c, view.channel, correlation);
  }
  view.move(map, Rmu, correlation);
  struct Loaded {
    Values x, x_dot;
  };
  each_row<kAtOnce>(
      view.team, view.threads, view.n * view.outputs,
      [&](int row) { return Loaded{view.source(t.x[0], row), view.source(t.x_dot[0], row)}; },
      [&](int row, const Loaded& of) {
        const Values y_dot = Activation::at(l, map.u(of.x)).df * map.u_dot(of.x, of.x_dot);
        view.put(t.y_dot, view.element(row), y_dot);
      });
}

template <class Activation, class T>
__device__ __forceinline__ void normalise_forward_tangent(Team team, int group, const Layer& l,
                                                          const Tensors<T>& t, const Partials<T>& p) {
  const View<T> view(
      team, group, l, t,
      aligned(t.x[0], t.x_dot[0], t.y_dot, t.w[0], t.w[1], t.w_dot[0], t.w_dot[1], t.saved, p.at));
  Numbers<double, View<T>::N> moments[3]{};
  const Partials<T> own = view.counting(p);
  if (t.x_dot[0]) Moments<2>::merge(view.threads, view.c, own, 0, own.count, moments);
  normalise_forward_tangent<Activation, 1>(l, view, moments);
}

/// R1 and R2 over the rows [first, first + count) of y.
template <class Activation, class T>
__device__ __forceinline__ void cotangent_dot_sums(const Layer& l, const View<T>& view, int first, int count,
                                                   typename View<T>::Values (&sums)[2]) {
  using Values = typename View<T>::Values;
  const Tensors<T>& t = view.t;
  const Affine<Values> map = view.moving_affine();
  channel_sums(view.threads, count, sums, [&](int i, Values(&sum)[2]) {
    const Values x = view.source(t.x[0], first + i), x_dot = view.source(t.x_dot[0], first + i),
                 g = view.row(t.grad_y, first + i);
    const auto d = Activation::at(l, map.u(x));
    const Values g_dot = d.df * view.row(t.grad_y_dot, first + i) + d.ddf * map.u_dot(x, x_dot) * g;
    sum[0] += g_dot;
    sum[1] += g_dot * map.xh(x);
    if (t.x_dot[0]) sum[1] += d.df * g * map.xh_dot(x, x_dot);
  });
}

/// The sums of tile team.block.
template <class Activation, class T>
__device__ __forceinline__ void normalise_backward_tangent_sums(Team team, int group, const Layer& l,
                                                                const Tensors<T>& t) {
  const View<T> view(team, group, l, t,
                     aligned(t.x[0], t.x_dot[0], t.grad_y, t.grad_y_dot, t.w[0], t.w[1], t.w_dot[0],
                             t.w_dot[1], t.saved, t.scratch));
  typename View<T>::Values sums[2];
  cotangent_dot_sums<Activation>(l, view, view.tile_start(), view.tile_rows(), sums);
  write_entry(view.threads, team.block, view.c, t.scratch, sums);
}

template <class Activation, class T>
__device__ __forceinline__ void normalise_backward_tangent(Team team, int group, const Layer& l,
                                                           const Tensors<T>& t, const Partials<T>& p,
                                                           int cells) {
  using Values = typename View<T>::Values;
  const View<T> view(team, group, l, t,
                     aligned(t.x[0], t.x_dot[0], t.grad_x_dot[0], t.grad_y, t.grad_y_dot, t.w[0], t.w[1],
                             t.w_dot[0], t.w_dot[1], t.grad_w_dot[0], t.grad_w_dot[1], t.saved, p.at));
  Values sums[2];
  whole_sums(view, p, sums, [&](int first, int count, Values(&own)[2]) {
    cotangent_dot_sums<Activation>(l, view, first, count, own);
  });
  const Values R1 = sums[0], R2 = sums[1];
  if (view.writes()) {
    view.give(t.grad_w_dot[0], R2, t.add_w[0]);
    view.give(t.grad_w_dot[1], R1, t.add_w[1]);
  }
  if (!t.grad_x_dot[0]) return;
  view.clear_padding(t.grad_x_dot[0], t.add_x[0]);
  const Affine<Values> map = view.moving_affine();
  // grad_x_dot = k f' g + gamma s (f' g_dot + f'' u_dot g) + at_mean + (x - mu) slope + (x_dot - Rmu)
  // slope_dot
  const Values G1 = view.mean(view.of_channels(t.grad_y ? view.saved.G1 : nullptr, 0));
  const Values G2 = view.mean(view.of_channels(t.grad_y ? view.saved.G2 : nullptr, 0));
  const Values at_mean = -(map.slope * G1 + map.scale * view.mean(R1));
  const Values slope_dot = -(map.scale * map.s * G2);
  const Values slope = -(map.s * (slope_dot * map.c + map.slope * G2 + map.scale * view.mean(R2)));
  struct Loaded {
    Values x, x_dot, g, g_dot, before;
  };
  const Put put{t.add_x[0]};
  view.template each_input<1>(
      l, cells,
      [&](int64_t at, auto chosen) {
        return Loaded{view.at(t.x[0], at), t.x_dot[0] ? view.at(t.x_dot[0], at) : Values(T(0)),
                      chosen(t.grad_y), chosen(t.grad_y_dot),
                      put.add ? view.at(t.grad_x_dot[0], at) : Values(T(0))};
      },
      [&](int64_t at, const Loaded& of) {
        const auto d = Activation::at(l, map.u(of.x));
        const Values g = d.df * of.g;
        const Values g_dot = d.df * of.g_dot + d.ddf * map.u_dot(of.x, of.x_dot) * of.g;
        const Values value = map.slope * g + map.scale * g_dot +
                             ((of.x - map.mu) * slope + (of.x_dot - map.Rmu) * slope_dot + at_mean);
        view.put(t.grad_x_dot[0], at, put(of.before, value));
      });
}

}  // namespace maml::cuda
