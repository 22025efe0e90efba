// BatchNorm with batch statistics over the m = n h w rows of a matrix [m, c], for one task. Per channel, with
// g = grad_y:
//
//   mu = mean x, s = (var + eps)^-1/2 (biased), xh = (x - mu) s,   y = gamma xh + beta
//   G1 = sum g = grad_beta, G2 = sum g xh = grad_gamma,            grad_x = gamma s (g - G1/m - xh G2/m)
//   Rmu = mean x_dot, c = mean(xh x_dot),
//   y_dot = gamma s x_dot + xh (gamma_dot - gamma s c) + beta_dot - gamma s Rmu
//   R1 = sum g_dot, R2 = sum(g_dot xh + g Rxh), Rxh = s (x_dot - Rmu - xh c), u = g - G1/m - xh G2/m,
//   grad_x_dot = (gamma_dot s - gamma s^2 c) u + gamma s (g_dot - R1/m - Rxh G2/m - xh R2/m)
//
// Every pass reads the matrix once for its sums and once for an affine map. The variance is a second sum,
// about the mean, because E[x^2] - mu^2 loses one to two digits in float32. The mean is stored as two
// numbers, mu + rest: if the mean is 100 standard deviations, one rounded number would shift all rows by 4e-6
// of one. Then sum grad_x would not be zero, and the weight gradient of the layer before would multiply this
// error by that layer's mean input. gamma and beta may be absent (1 and 0). The twin on the GPU is
// cuda/normalise.h.
#include <cmath>

#include "cpu/implement.h"
#include "cpu/rows.h"

namespace maml::MAML_ISA {
namespace {

/// The values that the passes save, [c] each.
template <class T>
struct Saved {
  T *mu, *rest, *s, *G1, *G2, *Rmu, *c;
  Saved(T* p, int64_t channels) {
    for (T** field : {&mu, &rest, &s, &G1, &G2, &Rmu, &c}) *field = p, p += channels;
  }

  /// Returns the function at -> x[at] - mean, for the channels from j on.
  auto centred(const T* x, int64_t j, const Lanes<T>& lanes) const {
    return [x, &lanes, high = load(mu + j, lanes), low = load(rest + j, lanes)](int64_t at) {
      return load(x + at, lanes) - high - low;
    };
  }
};

int64_t rows_of(const Layer& l) { return l.n * l.in.h * l.in.w; }

template <class T>
Vector<T> or_value(const T* p, int64_t j, const Lanes<T>& lanes, T value) {
  return p ? load(p + j, lanes) : broadcast(value);
}

template <class T>
void forward(const Layer& l, const Tensors<T>& t) {
  const int64_t m = rows_of(l), channels = l.in.c;
  const Saved<T> saved(t.saved, channels);
  const T* x = t.x[0];
  channel_sums<T, 1>(
      m, channels, {saved.mu},
      [&](int64_t at, int64_t, const Lanes<T>& lanes, Vector<T>* sum) { sum[0] += load(x + at, lanes); });
  for (int64_t j = 0; j < channels; ++j) saved.mu[j] /= static_cast<T>(m);
  channel_sums<T, 2>(m, channels, {saved.rest, saved.s},
                     [&](int64_t at, int64_t j, const Lanes<T>& lanes, Vector<T>* sum) {
                       const Vector<T> d = load(x + at, lanes) - load(saved.mu + j, lanes);
                       sum[0] += d;
                       sum[1] += d * d;
                     });
  for (int64_t j = 0; j < channels; ++j) {
    saved.rest[j] /= static_cast<T>(m);
    saved.s[j] = 1 / std::sqrt(saved.s[j] / static_cast<T>(m) + static_cast<T>(l.eps));
  }
  each_block<T>(m, channels, [&](int64_t j, const Lanes<T>& lanes, int64_t i0, int64_t i1) {
    const Vector<T> scale = or_value(t.w[0], j, lanes, T(1)) * load(saved.s + j, lanes);
    const Vector<T> beta = or_value(t.w[1], j, lanes, T(0));
    const auto centred = saved.centred(x, j, lanes);
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t at = i * channels + j;
      store(t.y + at, centred(at) * scale + beta, lanes);
    }
  });
}

template <class T>
void write(T* to, Vector<T> value, bool add, const Lanes<T>& lanes) {
  store(to, add ? load(to, lanes) + value : value, lanes);
}

/// out [c] (+)= sums, unless `out` is null.
template <class T>
void give(const T* sums, int64_t channels, bool add, T* out) {
  if (!out) return;
  for (int64_t j = 0; j < channels; ++j) out[j] = add ? out[j] + sums[j] : sums[j];
}

template <class T>
void backward(const Layer& l, const Tensors<T>& t) {
  const int64_t m = rows_of(l), channels = l.in.c;
  const Saved<T> saved(t.saved, channels);
  const T *x = t.x[0], *g = t.grad_y;
  channel_sums<T, 2>(m, channels, {saved.G1, saved.G2},
                     [&](int64_t at, int64_t j, const Lanes<T>& lanes, Vector<T>* sum) {
                       const Vector<T> grad = load(g + at, lanes);
                       sum[0] += grad;
                       sum[1] += grad * saved.centred(x, j, lanes)(at) * load(saved.s + j, lanes);
                     });
  give(saved.G2, channels, t.add_w[0], t.grad_w[0]);
  give(saved.G1, channels, t.add_w[1], t.grad_w[1]);
  if (!t.grad_x[0]) return;
  const T per_row = 1 / static_cast<T>(m);
  each_block<T>(m, channels, [&](int64_t j, const Lanes<T>& lanes, int64_t i0, int64_t i1) {
    const Vector<T> s = load(saved.s + j, lanes);
    const auto centred = saved.centred(x, j, lanes);
    const Vector<T> scale = or_value(t.w[0], j, lanes, T(1)) * s;
    const Vector<T> mean_g = load(saved.G1 + j, lanes) * per_row;
    const Vector<T> slope = s * load(saved.G2 + j, lanes) * per_row;
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t at = i * channels + j;
      const Vector<T> u = load(g + at, lanes) - mean_g - centred(at) * slope;
      write(t.grad_x[0] + at, scale * u, t.add_x[0], lanes);
    }
  });
}

template <class T>
void forward_tangent(const Layer& l, const Tensors<T>& t) {
  const int64_t m = rows_of(l), channels = l.in.c;
  const Saved<T> saved(t.saved, channels);
  const T *x = t.x[0], *x_dot = t.x_dot[0];
  const T per_row = 1 / static_cast<T>(m);
  if (x_dot) {
    channel_sums<T, 2>(m, channels, {saved.Rmu, saved.c},
                       [&](int64_t at, int64_t j, const Lanes<T>& lanes, Vector<T>* sum) {
                         const Vector<T> dot = load(x_dot + at, lanes);
                         sum[0] += dot;
                         sum[1] += dot * saved.centred(x, j, lanes)(at) * load(saved.s + j, lanes);
                       });
    for (int64_t j = 0; j < channels; ++j) saved.Rmu[j] *= per_row, saved.c[j] *= per_row;
  } else {
    std::fill_n(saved.Rmu, channels, T(0));
    std::fill_n(saved.c, channels, T(0));
  }
  each_block<T>(m, channels, [&](int64_t j, const Lanes<T>& lanes, int64_t i0, int64_t i1) {
    const Vector<T> s = load(saved.s + j, lanes);
    const auto centred = saved.centred(x, j, lanes);
    const Vector<T> scale = or_value(t.w[0], j, lanes, T(1)) * s;
    const Vector<T> slope = s * (or_value(t.w_dot[0], j, lanes, T(0)) - scale * load(saved.c + j, lanes));
    const Vector<T> shift = or_value(t.w_dot[1], j, lanes, T(0)) - scale * load(saved.Rmu + j, lanes);
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t at = i * channels + j;
      Vector<T> y_dot = centred(at) * slope + shift;
      if (x_dot) y_dot += scale * load(x_dot + at, lanes);
      store(t.y_dot + at, y_dot, lanes);
    }
  });
}

/// grad_y may be absent: then x_dot, gamma_dot, c and with them every term of g are zero.
template <class T>
void backward_tangent(const Layer& l, const Tensors<T>& t) {
  const int64_t m = rows_of(l), channels = l.in.c;
  const Saved<T> saved(t.saved, channels);
  const T *x = t.x[0], *g = t.grad_y, *x_dot = t.x_dot[0], *g_dot = t.grad_y_dot;
  T *R1 = t.scratch, *R2 = t.scratch + channels;
  channel_sums<T, 2>(
      m, channels, {R1, R2}, [&](int64_t at, int64_t j, const Lanes<T>& lanes, Vector<T>* sum) {
        const Vector<T> s = load(saved.s + j, lanes), grad_dot = load(g_dot + at, lanes);
        const Vector<T> xh = saved.centred(x, j, lanes)(at) * s;
        sum[0] += grad_dot;
        sum[1] += grad_dot * xh;
        if (x_dot) {
          const Vector<T> xh_dot =
              s * (load(x_dot + at, lanes) - load(saved.Rmu + j, lanes) - xh * load(saved.c + j, lanes));
          sum[1] += load(g + at, lanes) * xh_dot;
        }
      });
  give(R2, channels, t.add_w[0], t.grad_w_dot[0]);
  give(R1, channels, t.add_w[1], t.grad_w_dot[1]);
  if (!t.grad_x_dot[0]) return;
  const T per_row = 1 / static_cast<T>(m);
  each_block<T>(m, channels, [&](int64_t j, const Lanes<T>& lanes, int64_t i0, int64_t i1) {
    const Vector<T> s = load(saved.s + j, lanes);
    const auto centred = saved.centred(x, j, lanes);
    const Vector<T> scale = or_value(t.w[0], j, lanes, T(1)) * s;
    const Vector<T> mean_dot = load(R1 + j, lanes) * per_row, slope_dot = load(R2 + j, lanes) * per_row;
    if (!g) {
      for (int64_t i = i0; i < i1; ++i) {
        const int64_t at = i * channels + j;
        const Vector<T> xh = centred(at) * s;
        write(t.grad_x_dot[0] + at, scale * (load(g_dot + at, lanes) - mean_dot - xh * slope_dot), t.add_x[0],
              lanes);
      }
      return;
    }
    const Vector<T> c = load(saved.c + j, lanes), Rmu = load(saved.Rmu + j, lanes);
    const Vector<T> k = s * (or_value(t.w_dot[0], j, lanes, T(0)) - scale * c);
    const Vector<T> mean_g = load(saved.G1 + j, lanes) * per_row, slope = load(saved.G2 + j, lanes) * per_row;
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t at = i * channels + j;
      const Vector<T> xh = centred(at) * s;
      const Vector<T> u = load(g + at, lanes) - mean_g - xh * slope;
      const Vector<T> xh_dot = x_dot ? s * (load(x_dot + at, lanes) - Rmu - xh * c) : Vector<T>{};
      const Vector<T> u_dot = load(g_dot + at, lanes) - mean_dot - xh_dot * slope - xh * slope_dot;
      write(t.grad_x_dot[0] + at, k * u + scale * u_dot, t.add_x[0], lanes);
    }
  });
}

}  // namespace

template <>
struct OnCpu<Kind::batch_norm> {
  static Footprint footprint(const Layer& l) { return {7 * l.in.c, 2 * l.in.c}; }
  template <class T>
  static Passes<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::batch_norm>;

}  // namespace maml::MAML_ISA
