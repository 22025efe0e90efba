// y = f(pool(BatchNorm(conv2d(x)) + r)) as one layer, for one task; the max-pool, r and f are optional. f is
// that of kink.h. Between the passes, only z, the convolution's output, and z_dot are stored. What is
// computed from them and from the cotangents of y exists for a few samples at a time, in the cache, and is
// consumed by the products at once. With m = n h w rows of z, g the cotangent of the norm's output (f' times
// that of y; zero where the pool has not chosen the pixel; also the cotangent of r), and per channel
//
//   mu = mean z, s = (var z + eps)^-1/2, xh = (z - mu) s, a = gamma s
//   G1 = sum g = grad_beta, G2 = sum g xh = grad_gamma         dz = a (g - G1/m - xh G2/m)
//   Rmu = mean z_dot, c = mean(xh z_dot), k = gamma_dot s - a s c, Rxh = s (z_dot - Rmu - xh c)
//   R1 = sum g_dot, R2 = sum(g_dot xh + g Rxh)
//   dz_dot = k (g - G1/m - xh G2/m) + a (g_dot - R1/m - Rxh G2/m - xh R2/m)
//
// both cotangents of z are affine in z and z_dot at every pixel, plus a g or k g + a g_dot at the chosen
// ones. A bias of the user's convolution has no effect and no gradient, because BatchNorm subtracts it. Sums
// run over one group of samples after the other, each about the group's own mean, and are merged in order
// (Chan, Golub, LeVeque 1979).
//
// z is stored minus the mean of its first group, per channel. If the mean is 100 standard deviations, a
// rounded mean would shift all rows by 4e-6 of one; then sum dz would not be zero, and the weight gradient
// would multiply this error by the mean of x. On the GPU the same chain is conv2d followed by block
// (cuda/normalise.h).
#include "cpu/conv_block.h"

#include <cmath>

#include "cpu/implement.h"
#include "cpu/rows.h"
#include "layers/patch_moments.h"

namespace maml::MAML_ISA {
namespace {

/// Computes the convolution z, and the mean and s of it.
template <class T>
void convolve_and_measure(const Block<T>& b) {
  const Saved<T>& saved = b.saved;
  T *mean = b.scratch.vectors[0], *squares = b.scratch.vectors[1], *origin = b.scratch.vectors[2];
  std::fill_n(saved.mu, b.channels, T(0));
  std::fill_n(saved.s, b.channels, T(0));
  const T* const w = forward_weights(b.group, b.t.w[0], b.scratch.weights[0]);
  b.each_group([&](int64_t first, const Layer& group) {
    T* z = saved.z + first * size(b.l.between);
    const Term<T> term{b.t.x[0] + first * size(b.l.in), w};
    convolve<T>(group, &term, 1, nullptr, z, b.scratch.products);
    const T rows = static_cast<T>(group.n * b.rows), before = static_cast<T>(first * b.rows);
    if (first == 0) {
      channel_sums<T, 1>(
          group.n * b.rows, b.channels, {origin},
          [&](int64_t at, int64_t, const Lanes<T>& lanes, Vector<T>* sum) { sum[0] += load(z + at, lanes); });
      for (int64_t c = 0; c < b.channels; ++c) origin[c] /= rows;
    }
    channel_sums<T, 1>(group.n * b.rows, b.channels, {mean},
                       [&](int64_t at, int64_t j, const Lanes<T>& lanes, Vector<T>* sum) {
                         const Vector<T> d = load(z + at, lanes) - load(origin + j, lanes);
                         store(z + at, d, lanes);
                         sum[0] += d;
                       });
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
  const T* const r = t.x[1];
  for (int64_t c = 0; c < b.channels; ++c) scale[c] = b.a(c), shift[c] = b.or_value(t.w[3], c, T(0));
  with_outputs(b, [&]<bool Pooled>(const Outputs<T, Pooled>& outputs) {
    outputs.each_run(0, l.n, [&](int64_t j, const Lanes<T>& lanes, int64_t count, int64_t out, int64_t in) {
      const Vector<T> mu = load(b.saved.mu + j, lanes), a = load(scale + j, lanes);
      const Vector<T> beta = load(shift + j, lanes);
      for (int64_t i = 0; i < count; ++i, out += outputs.channels, in += outputs.step) {
        Vector<T> u;
        if constexpr (Pooled) {
          Vector<T> v[4], other[4] = {}, place;
          load_window(b.saved.z + in, outputs.channels, outputs.below, lanes, v);
          if (r) load_window(r + in, outputs.channels, outputs.below, lanes, other);
          for (int p = 0; p < 4; ++p) v[p] = (v[p] - mu) * a + beta + other[p];
          largest_of<T>(v, u, place);
          store(b.saved.places + out, place, lanes);
        } else {
          u = (load(b.saved.z + in, lanes) - mu) * a + beta;
          if (r) u += load(r + in, lanes);
        }
        store(t.y + out, outputs.f(u), lanes);
      }
    });
  });
}

/// out [c] (+)= sums, unless `out` is null; a null `sums` counts as zero.
template <class T>
void give(const T* sums, int64_t channels, bool add, T* out) {
  for (int64_t c = 0; out && c < channels; ++c) out[c] = (add ? out[c] : T(0)) + (sums ? sums[c] : T(0));
}

/// dz for a group of samples, from G1 and G2.
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
          return [=, &b, &outputs](int64_t out) {
            return a * outputs.f.slope(load(b.t.grad_y + out, lanes), out, lanes);
          };
        });
  });
}

/// grad_r (+)= the cotangent `g` of y, taken back to the pixels that the pool has chosen, for some samples.
template <class T>
void give_other(const Block<T>& b, int64_t first, int64_t n, const T* g, T* grad_r) {
  const bool add = b.t.add_x[1];
  with_outputs(b, [&](const auto& outputs) {
    outputs.spread(
        first, first + n, grad_r + first * size(b.l.between),
        [&](int64_t, const Lanes<T>& lanes) {
          return [=](int64_t in) { return add ? load(grad_r + in, lanes) : Vector<T>{}; };
        },
        [&](int64_t, const Lanes<T>& lanes) {
          return [=, &outputs](int64_t out) { return outputs.f.slope(load(g + out, lanes), out, lanes); };
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
        const Vector<T> g = outputs.f.slope(load(t.grad_y + out, lanes), out, lanes);
        sum[0] += g;
        sum[1] += g * (outputs.chosen(saved.z, out, in, lanes) - mu) * s;
      };
    });
  });
  give<T>(nullptr, b.channels, t.add_w[1], t.grad_w[1]);
  give(saved.G2, b.channels, t.add_w[2], t.grad_w[2]);
  give(saved.G1, b.channels, t.add_w[3], t.grad_w[3]);
  if (!t.grad_w[0] && !t.grad_x[0] && !t.grad_x[1]) return;
  if (t.grad_x[0]) transposed_weights(b.group, t.w[0], b.scratch.weights[0]);
  WeightGradient<T> grad_w(b.group, t.add_w[0], t.grad_w[0], b.scratch.weights[2]);
  b.each_group([&](int64_t first, const Layer& group) {
    T* dz = b.scratch.dz[0];
    if (t.grad_w[0] || t.grad_x[0]) cotangent(b, first, group.n, dz);
    if (t.grad_w[0]) {
      const Term<T> term{t.x[0] + first * size(l.in), dz};
      grad_w.sum(group, &term, 1, b.scratch.products);
    }
    if (t.grad_x[0]) {
      const Term<T> term{dz, b.scratch.weights[0]};
      input_gradient(group, &term, 1, t.add_x[0], t.grad_x[0] + first * size(l.in), b.scratch.products);
    }
    if (t.grad_x[1]) give_other(b, first, group.n, t.grad_y, t.grad_x[1]);
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
        if (t.x_dot[1]) y_dot += outputs.chosen(t.x_dot[1], out, in, lanes);
        store(t.y_dot + out, outputs.f.slope(y_dot, out, lanes), lanes);
      }
    });
  });
}

/// dz_dot for a group of samples. `moves`: there is a primal cotangent, and saved values of the forward
/// tangent; z_dot may be null.
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
          return [=, &b, &outputs](int64_t out) {
            Vector<T> value = a * load(b.t.grad_y_dot + out, lanes);
            if (moves) value += k * load(b.t.grad_y + out, lanes);
            return outputs.f.slope(value, out, lanes);
          };
        });
  });
}

/// grad_y may be absent: then G1, G2 and all tangents of the forward pass count as zero.
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
        const Vector<T> g_dot = outputs.f.slope(load(t.grad_y_dot + out, lanes), out, lanes);
        const Vector<T> xh = (outputs.chosen(saved.z, out, in, lanes) - mu) * s;
        sum[0] += g_dot;
        sum[1] += g_dot * xh;
        if (z_dot) {
          const Vector<T> xh_dot = s * (outputs.chosen(z_dot, out, in, lanes) - Rmu - xh * c);
          sum[1] += outputs.f.slope(load(t.grad_y + out, lanes), out, lanes) * xh_dot;
        }
      };
    });
  });
  give<T>(nullptr, b.channels, t.add_w[1], t.grad_w_dot[1]);
  give(R2, b.channels, t.add_w[2], t.grad_w_dot[2]);
  give(R1, b.channels, t.add_w[3], t.grad_w_dot[3]);
  if (!t.grad_w_dot[0] && !t.grad_x_dot[0] && !t.grad_x_dot[1]) return;
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
    if (t.grad_x_dot[1]) give_other(b, first, group.n, t.grad_y_dot, t.grad_x_dot[1]);
  });
  if (t.grad_w_dot[0]) grad_w.finish();
}

}  // namespace

template <>
struct OnCpu<Kind::conv_block> {
  static Footprint footprint(const Layer& l) {
    const Layer group = convolution_of(l);
    const int64_t weight = product_weights(group), z = l.n * size(l.between);
    return {z + 6 * l.out.c + (l.pooled ? l.n * size(l.out) : 0),
            2 * group.n * size(l.between) + 3 * weight + 7 * l.out.c + conv2d_scratch(group), z};
  }
  template <class T>
  static Passes<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::conv_block>;

}  // namespace maml::MAML_ISA
