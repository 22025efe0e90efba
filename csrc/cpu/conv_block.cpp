// y = pool(BatchNorm(conv2d(x))), with or without the max-pool, in one layer, one task. Between its passes
// stand z, the convolution's output, and z_dot; what is derived from them and from the cotangents of y stands
// for a few samples at a time, in the cache, and goes straight into the products. With n h w = m rows of z,
// g the cotangent of the norm's output (zero where the pool has not chosen), and per channel
//
//   mu = mean z, s = (var z + eps)^-1/2, xh = (z - mu) s, a = gamma s
//   G1 = sum g = grad_beta, G2 = sum g xh = grad_gamma         dz = a (g - G1/m - xh G2/m)
//   Rmu = mean z_dot, c = mean(xh z_dot), k = gamma_dot s - a s c, Rxh = s (z_dot - Rmu - xh c)
//   R1 = sum g_dot, R2 = sum(g_dot xh + g Rxh)
//   dz_dot = k (g - G1/m - xh G2/m) + a (g_dot - R1/m - Rxh G2/m - xh R2/m)
//
// both cotangents of z are affine in z and z_dot everywhere, plus a g, k g + a g_dot where the pool has
// chosen. A bias of the user's convolution has no effect and no gradient. Sums run group by group of samples,
// each about its own mean, and are put together in order (Chan, Golub, LeVeque 1979).
#include <algorithm>
#include <cmath>
#include <utility>

#include "../patch_gram.h"
#include "conv2d.h"
#include "layers.h"
#include "pool_pairs.h"
#include "rows.h"

namespace maml::MAML_ISA {
namespace {

/// What the passes keep: z, vectors [c], and the places that the pool has chosen.
template <class T>
struct Saved {
  T *z, *mu, *s, *Rmu, *c, *G1, *G2, *places;
  Saved(const Layer& l, T* p) {
    z = std::exchange(p, p + l.n * size(l.between));
    for (T** field : {&mu, &s, &Rmu, &c, &G1, &G2}) *field = std::exchange(p, p + l.out.c);
    places = p;
  }
};

/// The convolution on the samples of one group.
Layer convolution_of(const Layer& l) {
  Layer c = l;
  c.kind = Kind::conv2d;
  c.out = l.between;
  c.pooled = false;
  c.n = group_of(l.n, size(l.between));
  return c;
}

template <class T>
struct Scratch {
  T *dz[2], *weights[3], *vectors[7], *products;
  Scratch(const Layer& l, const Layer& group, T* p) {
    const int64_t weight = product_weights(group);
    for (T*& d : dz) d = std::exchange(p, p + group.n * size(l.between));
    for (T*& w : weights) w = std::exchange(p, p + weight);
    for (T*& v : vectors) v = std::exchange(p, p + l.out.c);
    products = p;
  }
};

template <class T>
struct Block {
  const Layer& l;
  const Tensors<T>& t;
  Layer group;
  Saved<T> saved;
  Scratch<T> scratch;
  int64_t channels, rows;  // rows: pixels of one sample of z
  T per_row;

  Block(const Layer& layer, const Tensors<T>& tensors)
      : l(layer),
        t(tensors),
        group(convolution_of(layer)),
        saved(layer, tensors.saved),
        scratch(layer, group, tensors.scratch),
        channels(layer.out.c),
        rows(layer.between.h * layer.between.w),
        per_row(1 / static_cast<T>(layer.n * rows)) {}

  static T or_value(const T* p, int64_t c, T value) { return p ? p[c] : value; }
  T a(int64_t c) const { return or_value(t.w[2], c, T(1)) * saved.s[c]; }
  T k(int64_t c) const { return saved.s[c] * (or_value(t.w_dot[2], c, T(0)) - a(c) * saved.c[c]); }

  /// f(first sample, a layer of those of its group)
  template <class F>
  void each_group(F f) const {
    Layer some = group;
    for (int64_t first = 0; first < l.n; first += group.n) {
      some.n = std::min(group.n, l.n - first);
      f(first, some);
    }
  }
};

/// Rows of y with the pixels of z that they come from: a window, or with no pool the pixel itself.
template <class T, bool Pooled>
struct Outputs {
  const Block<T>& b;
  int64_t channels = b.channels, below = b.l.between.w * b.channels, step = (Pooled ? 2 : 1) * b.channels;

  /// f(j, lanes, count, out, in): in rows [first, end) of y, `count` outputs from element `out` of y on,
  /// their first pixel at element `in` of z, one vector of channels of [c0, c1); the next one is channels and
  /// `step` further.
  template <class F>
  void runs(int64_t first, int64_t end, int64_t c0, int64_t c1, F f) const {
    const Layer& l = b.l;
    for (int64_t row = first; row < end; ++row) {
      const int64_t in_row = Pooled ? row / l.out.h * l.between.h + 2 * (row % l.out.h) : row;
      each_vector<T>(c0, c1, [&](int64_t j, const Lanes<T>& lanes) {
        f(j, lanes, l.out.w, row * l.out.w * channels + j, in_row * l.between.w * channels + j);
      });
    }
  }
  /// All channels of samples [first, end); threads share the rows.
  template <class F>
  void each_run(int64_t first, int64_t end, F f) const {
    const int64_t rows = (end - first) * b.l.out.h, start = first * b.l.out.h;
    share(rows, 1, kElementWork * rows * b.l.between.w * channels,
          [&](int64_t r0, int64_t r1) { runs(start + r0, start + r1, 0, channels, f); });
  }
  /// The element of x [n, between] that an output comes from.
  Vector<T> chosen(const T* x, int64_t out, int64_t in, const Lanes<T>& lanes) const {
    if constexpr (!Pooled) return load(x + in, lanes);
    Vector<T> v[4];
    load_window(x + in, channels, below, lanes, v);
    return picked<T>(v, load(b.saved.places + out, lanes));
  }

  /// sums[q] [c] of term(j, lanes) -> (out, in) -> Vector[Q], over all outputs; threads share the channels.
  template <int Q, class Term>
  void sums(T* const (&to)[Q], Term term) const {
    for (T* s : to) std::fill_n(s, channels, T(0));
    const int64_t rows = b.l.n * b.l.out.h;
    share(channels, kLanes<T>, kElementWork * rows * b.l.between.w * channels, [&](int64_t c0, int64_t c1) {
      runs(0, rows, c0, c1, [&](int64_t j, const Lanes<T>& lanes, int64_t count, int64_t out, int64_t in) {
        const auto add = term(j, lanes);
        Vector<T> sum[Q] = {};
        for (int64_t i = 0; i < count; ++i, out += channels, in += step) add(out, in, sum);
        for (int q = 0; q < Q; ++q) store(to[q] + j, load(to[q] + j, lanes) + sum[q], lanes);
      });
    });
  }

  /// to [samples, between] = affine(j, lanes) -> (in) -> Vector at every pixel of z, plus chosen(j, lanes) ->
  /// (out) -> Vector where outputs come from.
  template <class Affine, class Chosen>
  void spread(int64_t first, int64_t end, T* to, Affine affine, Chosen chosen) const {
    const Image& z = b.l.between;
    to -= first * size(z);
    each_run(first, end, [&](int64_t j, const Lanes<T>& lanes, int64_t count, int64_t out, int64_t in) {
      const auto base = affine(j, lanes);
      const auto more = chosen(j, lanes);
      for (int64_t i = 0; i < count; ++i, out += channels, in += step) {
        const Vector<T> g = more(out);
        if constexpr (Pooled) {
          const Vector<T> place = load(b.saved.places + out, lanes);
#pragma GCC unroll 4
          for (int p = 0; p < 4; ++p) {
            const int64_t at = in + p / 2 * below + p % 2 * channels;
            store(to + at, base(at) + placed<T>(g, place, p), lanes);
          }
        } else {
          store(to + in, base(in) + g, lanes);
        }
      }
    });
    if constexpr (Pooled) {  // pixels that no window sees
      each_vector<T>(channels, [&](int64_t j, const Lanes<T>& lanes) {
        const auto base = affine(j, lanes);
        for (int64_t row = first * z.h; row < end * z.h; ++row) {
          const int64_t seen = row % z.h < 2 * b.l.out.h ? 2 * b.l.out.w : 0;
          for (int64_t i = seen; i < z.w; ++i) {
            const int64_t at = (row * z.w + i) * channels + j;
            store(to + at, base(at), lanes);
          }
        }
      });
    }
  }
};

/// f(Outputs<T, pooled or not>)
template <class T, class F>
void with_outputs(const Block<T>& b, F f) {
  b.l.pooled ? f(Outputs<T, true>{b}) : f(Outputs<T, false>{b});
}

/// The convolution, and mean and s of its output.
template <class T>
void convolve_and_measure(const Block<T>& b) {
  const Saved<T>& saved = b.saved;
  T *mean = b.scratch.vectors[0], *squares = b.scratch.vectors[1];
  std::fill_n(saved.mu, b.channels, T(0));
  std::fill_n(saved.s, b.channels, T(0));
  const T* const w = forward_weights(b.group, b.t.w[0], b.scratch.weights[0]);
  b.each_group([&](int64_t first, const Layer& group) {
    T* z = saved.z + first * size(b.l.between);
    const Term<T> term{b.t.x[0] + first * size(b.l.in), w};
    convolve<T>(group, &term, 1, nullptr, z, b.scratch.products);
    const T rows = static_cast<T>(group.n * b.rows), before = static_cast<T>(first * b.rows);
    channel_sums<T, 1>(
        group.n * b.rows, b.channels, {mean},
        [&](int64_t at, int64_t, const Lanes<T>& lanes, Vector<T>* sum) { sum[0] += load(z + at, lanes); });
    for (int64_t c = 0; c < b.channels; ++c) mean[c] /= rows;
    channel_sums<T, 1>(group.n * b.rows, b.channels, {squares},
                       [&](int64_t at, int64_t j, const Lanes<T>& lanes, Vector<T>* sum) {
                         const Vector<T> d = load(z + at, lanes) - load(mean + j, lanes);
                         sum[0] += d * d;
                       });
    const T share = rows / (before + rows);
    for (int64_t c = 0; c < b.channels; ++c) {
      const T d = mean[c] - saved.mu[c];
      saved.mu[c] += d * share;
      saved.s[c] += squares[c] + d * d * (before * share);
    }
  });
  for (int64_t c = 0; c < b.channels; ++c) {
    saved.s[c] = 1 / std::sqrt(saved.s[c] * b.per_row + static_cast<T>(b.l.eps));
  }
}

template <class T>
void forward(const Layer& l, const Tensors<T>& t) {
  const Block<T> b(l, t);
  convolve_and_measure(b);
  T *scale = b.scratch.vectors[0], *shift = b.scratch.vectors[1];
  for (int64_t c = 0; c < b.channels; ++c) scale[c] = b.a(c), shift[c] = b.or_value(t.w[3], c, T(0));
  with_outputs(b, [&]<bool Pooled>(const Outputs<T, Pooled>& outputs) {
    outputs.each_run(0, l.n, [&](int64_t j, const Lanes<T>& lanes, int64_t count, int64_t out, int64_t in) {
      const Vector<T> mu = load(b.saved.mu + j, lanes), a = load(scale + j, lanes);
      const Vector<T> beta = load(shift + j, lanes);
      for (int64_t i = 0; i < count; ++i, out += outputs.channels, in += outputs.step) {
        if constexpr (Pooled) {
          Vector<T> v[4], best, place;
          load_window(b.saved.z + in, outputs.channels, outputs.below, lanes, v);
          for (Vector<T>& x : v) x = (x - mu) * a + beta;
          largest_of<T>(v, best, place);
          store(t.y + out, best, lanes);
          store(b.saved.places + out, place, lanes);
        } else {
          store(t.y + out, (load(b.saved.z + in, lanes) - mu) * a + beta, lanes);
        }
      }
    });
  });
}

/// out [c] (+)= sums, where wanted; null: zero.
template <class T>
void give(const T* sums, int64_t channels, bool add, T* out) {
  for (int64_t c = 0; out && c < channels; ++c) out[c] = (add ? out[c] : T(0)) + (sums ? sums[c] : T(0));
}

/// dz of a group, from G1 and G2.
template <class T>
void cotangent(const Block<T>& b, int64_t first, int64_t n, T* dz) {
  T *constant = b.scratch.vectors[0], *slope = b.scratch.vectors[1], *scale = b.scratch.vectors[2];
  for (int64_t c = 0; c < b.channels; ++c) {
    scale[c] = b.a(c);
    constant[c] = -scale[c] * b.saved.G1[c] * b.per_row;
    slope[c] = -scale[c] * b.saved.G2[c] * b.per_row * b.saved.s[c];
  }
  with_outputs(b, [&](const auto& outputs) {
    outputs.spread(
        first, first + n, dz,
        [&](int64_t j, const Lanes<T>& lanes) {
          const Vector<T> mu = load(b.saved.mu + j, lanes), k0 = load(constant + j, lanes);
          const Vector<T> k1 = load(slope + j, lanes);
          return [=, &b](int64_t in) { return (load(b.saved.z + in, lanes) - mu) * k1 + k0; };
        },
        [&](int64_t j, const Lanes<T>& lanes) {
          const Vector<T> a = load(scale + j, lanes);
          return [=, &b](int64_t out) { return a * load(b.t.grad_y + out, lanes); };
        });
  });
}

template <class T>
void backward(const Layer& l, const Tensors<T>& t) {
  const Block<T> b(l, t);
  const Saved<T>& saved = b.saved;
  with_outputs(b, [&](const auto& outputs) {
    outputs.template sums<2>({saved.G1, saved.G2}, [&](int64_t j, const Lanes<T>& lanes) {
      const Vector<T> mu = load(saved.mu + j, lanes), s = load(saved.s + j, lanes);
      return [=, &outputs, &saved, &t](int64_t out, int64_t in, Vector<T>* sum) {
        const Vector<T> g = load(t.grad_y + out, lanes);
        sum[0] += g;
        sum[1] += g * (outputs.chosen(saved.z, out, in, lanes) - mu) * s;
      };
    });
  });
  give<T>(nullptr, b.channels, t.add_w[1], t.grad_w[1]);
  give(saved.G2, b.channels, t.add_w[2], t.grad_w[2]);
  give(saved.G1, b.channels, t.add_w[3], t.grad_w[3]);
  if (!t.grad_w[0] && !t.grad_x[0]) return;
  if (t.grad_x[0]) transposed_weights(b.group, t.w[0], b.scratch.weights[0]);
  WeightGradient<T> grad_w(b.group, t.add_w[0], t.grad_w[0], b.scratch.weights[2]);
  b.each_group([&](int64_t first, const Layer& group) {
    T* dz = b.scratch.dz[0];
    cotangent(b, first, group.n, dz);
    if (t.grad_w[0]) {
      const Term<T> term{t.x[0] + first * size(l.in), dz};
      grad_w.sum(group, &term, 1, b.scratch.products);
    }
    if (t.grad_x[0]) {
      const Term<T> term{dz, b.scratch.weights[0]};
      input_gradient(group, &term, 1, t.add_x[0], t.grad_x[0] + first * size(l.in), b.scratch.products);
    }
  });
  if (t.grad_w[0]) grad_w.finish();
}

/// Whether z has a tangent.
template <class T>
bool turns(const Tensors<T>& t) {
  return t.x_dot[0] || t.w_dot[0];
}

template <class T>
void forward_tangent(const Layer& l, const Tensors<T>& t) {
  const Block<T> b(l, t);
  const Saved<T>& saved = b.saved;
  T* const z_dot = turns(t) ? t.saved_dot : nullptr;
  std::fill_n(saved.Rmu, b.channels, T(0));
  std::fill_n(saved.c, b.channels, T(0));
  T *sum = b.scratch.vectors[0], *products = b.scratch.vectors[1];
  const T *w = nullptr, *w_dot = nullptr;
  if (t.x_dot[0]) w = forward_weights(b.group, t.w[0], b.scratch.weights[0]);
  if (t.w_dot[0]) w_dot = forward_weights(b.group, t.w_dot[0], b.scratch.weights[1]);
  b.each_group([&](int64_t first, const Layer& group) {
    if (!z_dot) return;
    Term<T> terms[2];
    int count = 0;
    if (t.x_dot[0]) terms[count++] = {t.x_dot[0] + first * size(l.in), w};
    if (t.w_dot[0]) terms[count++] = {t.x[0] + first * size(l.in), w_dot};
    const T* z = saved.z + first * size(l.between);
    T* to = z_dot + first * size(l.between);
    convolve<T>(group, terms, count, nullptr, to, b.scratch.products);
    channel_sums<T, 2>(group.n * b.rows, b.channels, {sum, products},
                       [&](int64_t at, int64_t j, const Lanes<T>& lanes, Vector<T>* s) {
                         const Vector<T> dot = load(to + at, lanes);
                         s[0] += dot;
                         s[1] += dot * (load(z + at, lanes) - load(saved.mu + j, lanes));
                       });
    for (int64_t c = 0; c < b.channels; ++c) saved.Rmu[c] += sum[c], saved.c[c] += products[c];
  });
  T *slope = b.scratch.vectors[0], *scale = b.scratch.vectors[1], *shift = b.scratch.vectors[2];
  for (int64_t c = 0; c < b.channels; ++c) {
    saved.Rmu[c] *= b.per_row;
    saved.c[c] *= b.per_row * saved.s[c];
    slope[c] = b.k(c), scale[c] = b.a(c);
    shift[c] = b.or_value(t.w_dot[3], c, T(0)) - scale[c] * saved.Rmu[c];
  }
  with_outputs(b, [&](const auto& outputs) {
    outputs.each_run(0, l.n, [&](int64_t j, const Lanes<T>& lanes, int64_t count, int64_t out, int64_t in) {
      const Vector<T> mu = load(saved.mu + j, lanes), k = load(slope + j, lanes);
      const Vector<T> a = load(scale + j, lanes), k0 = load(shift + j, lanes);
      for (int64_t i = 0; i < count; ++i, out += outputs.channels, in += outputs.step) {
        Vector<T> y_dot = (outputs.chosen(saved.z, out, in, lanes) - mu) * k + k0;
        if (z_dot) y_dot += a * outputs.chosen(z_dot, out, in, lanes);
        store(t.y_dot + out, y_dot, lanes);
      }
    });
  });
}

/// dz_dot of a group. `moves`: there is a primal cotangent, and what the forward tangent keeps; z_dot may be
/// null.
template <class T>
void cotangent_tangent(const Block<T>& b, bool moves, const T* z_dot, const T* R1, const T* R2, int64_t first,
                       int64_t n, T* dz_dot) {
  T* const* v = b.scratch.vectors;
  T *constant = v[0], *slope = v[1], *scale = v[2], *slope_dot = v[3], *scale_g = v[4];
  const Saved<T>& saved = b.saved;
  for (int64_t c = 0; c < b.channels; ++c) {
    const T a = b.a(c), s = saved.s[c], mean = moves ? saved.G1[c] * b.per_row : T(0);
    const T mean_xh = moves ? saved.G2[c] * b.per_row : T(0), k = moves ? b.k(c) : T(0);
    const T Rmu = moves ? saved.Rmu[c] : T(0), correlation = moves ? saved.c[c] : T(0);
    scale[c] = a, scale_g[c] = k;
    slope_dot[c] = -a * s * mean_xh;
    slope[c] = s * (a * s * correlation * mean_xh - k * mean_xh - a * R2[c] * b.per_row);
    constant[c] = a * s * Rmu * mean_xh - k * mean - a * R1[c] * b.per_row;
  }
  with_outputs(b, [&](const auto& outputs) {
    outputs.spread(
        first, first + n, dz_dot,
        [&](int64_t j, const Lanes<T>& lanes) {
          const Vector<T> mu = load(saved.mu + j, lanes), k0 = load(constant + j, lanes);
          const Vector<T> k1 = load(slope + j, lanes), k2 = load(slope_dot + j, lanes);
          return [=, &saved](int64_t in) {
            Vector<T> value = (load(saved.z + in, lanes) - mu) * k1 + k0;
            if (z_dot) value += k2 * load(z_dot + in, lanes);
            return value;
          };
        },
        [&](int64_t j, const Lanes<T>& lanes) {
          const Vector<T> a = load(scale + j, lanes), k = load(scale_g + j, lanes);
          return [=, &b](int64_t out) {
            Vector<T> value = a * load(b.t.grad_y_dot + out, lanes);
            if (moves) value += k * load(b.t.grad_y + out, lanes);
            return value;
          };
        });
  });
}

/// Where the layer does not move, grad_y is absent: then G1, G2 and all tangents of the forward pass are
/// zero.
template <class T>
void backward_tangent(const Layer& l, const Tensors<T>& t) {
  const Block<T> b(l, t);
  const Saved<T>& saved = b.saved;
  const bool moves = t.grad_y != nullptr;
  const T* const z_dot = moves && turns(t) ? t.saved_dot : nullptr;
  T *R1 = b.scratch.vectors[5], *R2 = b.scratch.vectors[6];
  with_outputs(b, [&](const auto& outputs) {
    outputs.template sums<2>({R1, R2}, [&](int64_t j, const Lanes<T>& lanes) {
      const Vector<T> mu = load(saved.mu + j, lanes), s = load(saved.s + j, lanes);
      const Vector<T> Rmu = z_dot ? load(saved.Rmu + j, lanes) : Vector<T>{};
      const Vector<T> c = z_dot ? load(saved.c + j, lanes) : Vector<T>{};
      return [=, &outputs, &saved, &t](int64_t out, int64_t in, Vector<T>* sum) {
        const Vector<T> g_dot = load(t.grad_y_dot + out, lanes);
        const Vector<T> xh = (outputs.chosen(saved.z, out, in, lanes) - mu) * s;
        sum[0] += g_dot;
        sum[1] += g_dot * xh;
        if (z_dot) {
          const Vector<T> xh_dot = s * (outputs.chosen(z_dot, out, in, lanes) - Rmu - xh * c);
          sum[1] += load(t.grad_y + out, lanes) * xh_dot;
        }
      };
    });
  });
  give<T>(nullptr, b.channels, t.add_w[1], t.grad_w_dot[1]);
  give(R2, b.channels, t.add_w[2], t.grad_w_dot[2]);
  give(R1, b.channels, t.add_w[3], t.grad_w_dot[3]);
  if (!t.grad_w_dot[0] && !t.grad_x_dot[0]) return;
  T* const* weights = b.scratch.weights;
  const bool two_w = moves && t.x_dot[0], two_x = moves && t.w_dot[0];
  if (t.grad_x_dot[0]) transposed_weights(b.group, t.w[0], weights[0]);
  if (t.grad_x_dot[0] && two_x) transposed_weights(b.group, t.w_dot[0], weights[1]);
  WeightGradient<T> grad_w(b.group, t.add_w[0], t.grad_w_dot[0], b.scratch.weights[2]);
  b.each_group([&](int64_t first, const Layer& group) {
    T *dz = b.scratch.dz[0], *dz_dot = b.scratch.dz[1];
    const int64_t in = first * size(l.in);
    if (moves) cotangent(b, first, group.n, dz);
    cotangent_tangent(b, moves, z_dot, R1, R2, first, group.n, dz_dot);
    if (t.grad_w_dot[0]) {
      const Term<T> terms[2] = {{t.x[0] + in, dz_dot}, {two_w ? t.x_dot[0] + in : nullptr, dz}};
      grad_w.sum(group, terms, two_w ? 2 : 1, b.scratch.products);
    }
    if (t.grad_x_dot[0]) {
      const Term<T> terms[2] = {{dz_dot, weights[0]}, {dz, weights[1]}};
      input_gradient(group, terms, two_x ? 2 : 1, t.add_x[0], t.grad_x_dot[0] + in, b.scratch.products);
    }
  });
  if (t.grad_w_dot[0]) grad_w.finish();
}

}  // namespace

Footprint conv_block_footprint(const Layer& l) {
  const Layer group = convolution_of(l);
  const int64_t weight = product_weights(group), z = l.n * size(l.between);
  return {z + 6 * l.out.c + (l.pooled ? l.n * size(l.out) : 0),
          2 * group.n * size(l.between) + 3 * weight + 7 * l.out.c + conv2d_scratch(group), z};
}

template <>
Passes<float> conv_block<float>() {
  return {forward<float>, backward<float>, forward_tangent<float>, backward_tangent<float>};
}
template <>
Passes<double> conv_block<double>() {
  return {forward<double>, backward<double>, forward_tangent<double>, backward_tangent<double>};
}

}  // namespace maml::MAML_ISA
