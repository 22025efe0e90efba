// The first layers of a network on its constant input x: y = f(pool(BatchNorm(conv2d(x)))) from the moments
// of x's patches (patch_gram.cpp), for one task. The output before the pool is never stored. f is that of
// kink.h.
//
// With p the patch of a pixel, pbar and G the moments of p (layers/patch_gram.h), w the weights [patch, o],
// s = (var + eps)^-1/2 and a = gamma s: BatchNorm of the convolution is another convolution, with weights a w
// and bias beta - a mu; its tangent is one with weights a w_dot + k w. A bias of the user's convolution has
// no effect and no gradient, because BatchNorm subtracts it. Per channel, with g the cotangent before pool
// and f, g_dot its tangent, and k = gamma_dot s - a s c:
//
//   mu = w pbar, var = w G w                          Rmu = w_dot pbar, c = s w_dot G w
//   D = sum g p, G1 = sum g = grad_beta               D' = sum g_dot p, R1 = sum g_dot = grad_beta_dot
//   G2 = s (w D - mu G1) = grad_gamma                 R2 = s (w D' - mu R1 + w_dot D - Rmu G1 - c G2)
//   u = D - G1 pbar - s G2 G w                        u' = D' - R1 pbar - s (R2 - s c G2) G w - s G2 G w_dot
//   grad_w = a u                                      grad_w_dot = a u' + k u
//
// Sums over patches are computed by gather_product and outer_product, for a band of rows of one sample at a
// time, so that the values before the pool stay in the cache. The computations per channel are in double. In
// the pool, the first of equal values wins, and a NaN wins, as in torch. The twin on the GPU is cuda/stem.h.
#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/frame.h"
#include "cpu/implement.h"
#include "cpu/kink.h"
#include "cpu/pool_pairs.h"
#include "cpu/product/product.h"
#include "cpu/rows.h"
#include "layers/patch_moments.h"

namespace maml::MAML_ISA {
namespace {

constexpr int64_t kBandElements = 16384;  // of the convolution's output: half of an L2 cache

/// The number of elements of T that holds so many bytes, for either T.
constexpr int64_t elements(int64_t bytes) { return (bytes + 3) / 4; }

/// Bands: rows of the convolution's output, for one sample, that fit the cache; they contain whole windows of
/// the pool. Columns and rows that are in no window are left out.
struct Bands {
  Frame frame;
  int64_t pool, columns, rows, patch;
  explicit Bands(const Layer& l)
      : frame(frame_of(l.window, l.between)),
        pool(l.pooled ? 2 : 1),
        columns(pool * l.out.w),
        rows(std::clamp<int64_t>(kBandElements / (columns * l.out.c * pool), 1, l.out.h)),
        patch(patch_size(l.window, l.in)) {}
  int64_t pixels() const { return rows * pool * columns; }
  int64_t frame_elements(const Layer& l) const { return frame.h * frame.w * l.in.c; }
};

/// One band: some rows of the output, from pixel `at` of the task on.
template <class T>
struct Band {
  const T* x;
  int64_t at, rows;
  const int32_t* row;  // for each pixel before the pool, the offset in x at which its patch starts
  Runs runs;
};

template <class T, class F>
void each_band(const Layer& l, const Bands& bands, const T* x, T* frame, int32_t* row, F f) {
  const Window& k = l.window;
  int64_t runs[kMostKernelRows];
  for (int64_t s = 0; s < l.n; ++s) {
    const Framed<T> framed_x = framed(x + s * size(l.in), 1, l.in, bands.frame, frame);
    if (s == 0) {
      fill_offsets(1, bands.rows * bands.pool, bands.columns, 0, 0, k.stride_h * framed_x.row,
                   k.stride_w * l.in.c, row);
      for (int64_t r = 0; r < k.kernel_h; ++r) runs[r] = r * framed_x.row;
    }
    for (int64_t i = 0; i < l.out.h; i += bands.rows) {
      f(Band<T>{framed_x.base + i * bands.pool * k.stride_h * framed_x.row,
                (s * l.out.h + i) * l.out.w,
                std::min(bands.rows, l.out.h - i),
                row,
                {static_cast<int>(k.kernel_h), k.kernel_w * l.in.c, runs}});
    }
  }
}

/// The values that the passes save.
template <class T>
struct Saved {
  double *Gw, *mu, *s, *Rmu, *c, *G1, *G2;
  T *D, *places;
  Saved(const Layer& l, T* p) {
    const int64_t patch = patch_size(l.window, l.in), o = l.out.c;
    double* at = reinterpret_cast<double*>(p);
    Gw = std::exchange(at, at + patch * o);
    for (double** field : {&mu, &s, &Rmu, &c, &G1, &G2}) *field = std::exchange(at, at + o);
    D = reinterpret_cast<T*>(at);
    places = D + patch * o;
  }
};

template <class T>
struct Scratch {
  double *Gv, *R2, *w_dot_D;  // G w_dot
  T *weights, *bias, *sum, *before, *frame;
  int32_t *row, *c_row;
  Scratch(const Layer& l, const Bands& bands, T* p) {
    double* at = reinterpret_cast<double*>(p);
    Gv = std::exchange(at, at + bands.patch * l.out.c);
    R2 = std::exchange(at, at + l.out.c);
    w_dot_D = std::exchange(at, at + l.out.c);
    p = reinterpret_cast<T*>(at);
    weights = std::exchange(p, p + bands.patch * l.out.c);
    bias = std::exchange(p, p + l.out.c);
    sum = std::exchange(p, p + l.out.c);
    before = std::exchange(p, p + bands.pixels() * l.out.c);
    frame = std::exchange(p, p + bands.frame_elements(l));
    row = reinterpret_cast<int32_t*>(p);
    c_row = row + bands.pixels();
  }
};

/// What the formulas of a channel read. Absent parameters count as zero, gamma as one.
template <class T>
struct Stem {
  const Layer& l;
  const Tensors<T>& t;
  Bands bands;
  Kink<T> f;
  int64_t patch, channels;
  const double *pbar, *G;
  Saved<T> saved;
  Scratch<T> scratch;

  Stem(const Layer& layer, const Tensors<T>& tensors)
      : l(layer),
        t(tensors),
        bands(layer),
        f(layer, tensors.y),
        patch(bands.patch),
        channels(layer.out.c),
        pbar(reinterpret_cast<const double*>(tensors.x[1])),
        G(pbar + patch),
        saved(layer, tensors.saved),
        scratch(layer, bands, tensors.scratch) {}

  double gamma(int64_t o) const { return t.w[2] ? static_cast<double>(t.w[2][o]) : 1; }
  double beta(int64_t o) const { return t.w[3] ? static_cast<double>(t.w[3][o]) : 0; }
  double dot(int j, int64_t i) const { return t.w_dot[j] ? static_cast<double>(t.w_dot[j][i]) : 0; }
  double a(int64_t o) const { return gamma(o) * saved.s[o]; }
  double k(int64_t o) const { return saved.s[o] * (dot(2, o) - a(o) * saved.c[o]); }

  /// out [patch, o] = G w
  void gram_product(const T* w, double* out) const {
    std::fill_n(out, patch * channels, 0.0);
    for (int64_t e = 0; e < patch; ++e) {
      for (int64_t q = 0; q < patch; ++q) {
        const double g = G[e * patch + q];
        for (int64_t o = 0; o < channels; ++o) {
          out[e * channels + o] += g * static_cast<double>(w[q * channels + o]);
        }
      }
    }
  }
  /// out [o] = sum_e a(e) b[e, o], for a(e, o) of any kind
  template <class A, class B>
  void contract(A a, const B* b, double* out) const {
    std::fill_n(out, channels, 0.0);
    for (int64_t e = 0; e < patch; ++e) {
      for (int64_t o = 0; o < channels; ++o) out[o] += a(e, o) * static_cast<double>(b[e * channels + o]);
    }
  }

  /// y = the convolution with scratch.weights and scratch.bias, then pick(pixels, out, lanes) of each window
  /// of it, then last(value, out, lanes).
  template <class Pick, class Last>
  void convolve(T* y, Pick pick, Last last) const {
    fill_offsets(1, 1, bands.pixels(), 0, 0, 0, channels, scratch.c_row);
    each_band(l, bands, t.x[0], scratch.frame, scratch.row, [&](const Band<T>& band) {
      GatherProduct<T> g{};
      g.term[0] = {band.x, scratch.weights};
      g.terms = 1;
      g.runs = band.runs;
      g.row = band.row;
      g.m = band.rows * bands.pool * bands.columns;
      g.n = channels;
      g.c = l.pooled ? scratch.before : y + band.at * channels;
      g.c_row = scratch.c_row;
      g.bias = scratch.bias;
      gather_product(g);
      if (!l.pooled && !f.kinks) return;
      each_output(band, [&](auto lanes, int64_t out, int64_t in) {
        if (l.pooled) {
          Vector<T> z[4];
          load_window(scratch.before + in, channels, below(), lanes, z);
          store(y + out, last(pick(z, out, lanes), out, lanes), lanes);
        } else {
          store(y + out, last(load(y + out, lanes), out, lanes), lanes);
        }
      });
    });
  }

  /// Calls g(lanes, out, in) for the outputs of the band, by vectors; the (first) pixel is
  /// scratch.before[in].
  template <class G>
  void each_output(const Band<T>& band, G g) const {
    const int64_t step = bands.pool * channels, rows = bands.pool * below();
    share(band.rows, 1, kElementWork * band.rows * rows, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        int64_t out = (band.at + i * l.out.w) * channels, in = i * rows;
        for (int64_t j = 0; j < l.out.w; ++j, out += channels, in += step) {
          each_lanes<T>(channels, [&](int64_t o, auto lanes) { g(lanes, out + o, in + o); });
        }
      }
    });
  }
  int64_t below() const { return bands.columns * channels; }  // the distance from a pixel to the one below

  /// D [patch, o] = sum g p and G [o] = sum g, with g = f' grad_y at the pixels that the pool has chosen.
  void patch_sums(const T* grad_y, T* D, T* G) const {
    const bool as_is = !l.pooled && !f.kinks;
    bool first = true;
    each_band(l, bands, t.x[0], scratch.frame, scratch.row, [&](const Band<T>& band) {
      if (!as_is) {
        each_output(band, [&](auto lanes, int64_t out, int64_t in) {
          const Vector<T> g = f.slope(load(grad_y + out, lanes), out, lanes);
          if (!l.pooled) return store(scratch.before + in, g, lanes);
          const Vector<T> place = load(saved.places + out, lanes);
#pragma GCC unroll 4
          for (int p = 0; p < 4; ++p) {
            store(scratch.before + in + p / 2 * below() + p % 2 * channels, placed<T>(g, place, p), lanes);
          }
        });
      }
      OuterProduct<T> o{};
      o.term[0] = {band.x, as_is ? grad_y + band.at * channels : scratch.before};
      o.terms = 1;
      o.runs = band.runs;
      o.row = band.row;
      o.m = band.rows * bands.pool * bands.columns;
      o.n = channels;
      o.d = D;
      o.add = !std::exchange(first, false);
      outer_product(o);
      // Now, while the band is in the cache.
      T* const sum = scratch.sum;
      channel_sums<T, 1>(band.rows * l.out.w, channels, {sum},
                         [&](int64_t i, int64_t, const Lanes<T>& lanes, Vector<T>* of) {
                           const int64_t at = band.at * channels + i;
                           of[0] += f.slope(load(grad_y + at, lanes), at, lanes);
                         });
      for (int64_t c = 0; c < channels; ++c) G[c] = (o.add ? G[c] : T(0)) + sum[c];
    });
  }

  /// to[j] (+)= value(i), unless to[j] is null.
  template <class F>
  void give(T* const (&to)[kMostParameters], int j, int64_t size, F value) const {
    for (int64_t i = 0; to[j] && i < size; ++i) {
      to[j][i] = static_cast<T>(value(i)) + (t.add_w[j] ? to[j][i] : T(0));
    }
  }
};

template <class T>
void forward(const Layer& l, const Tensors<T>& t) {
  const Stem<T> stem(l, t);
  const Saved<T>& saved = stem.saved;
  const int64_t channels = stem.channels;
  stem.gram_product(t.w[0], saved.Gw);
  stem.contract([&](int64_t e, int64_t) { return stem.pbar[e]; }, t.w[0], saved.mu);
  stem.contract([&](int64_t e, int64_t o) { return saved.Gw[e * channels + o]; }, t.w[0], saved.s);
  for (int64_t o = 0; o < channels; ++o) {
    saved.s[o] = 1 / std::sqrt(std::max(saved.s[o], 0.0) + l.eps);
    stem.scratch.bias[o] = static_cast<T>(stem.beta(o) - stem.a(o) * saved.mu[o]);
  }
  for (int64_t i = 0; i < stem.patch * channels; ++i) {
    stem.scratch.weights[i] = static_cast<T>(stem.a(i % channels) * static_cast<double>(t.w[0][i]));
  }
  stem.convolve(
      t.y,
      [&](const Vector<T>(&z)[4], int64_t out, auto lanes) {
        Vector<T> best, place;
        largest_of<T>(z, best, place);
        store(saved.places + out, place, lanes);
        return best;
      },
      [&](Vector<T> u, int64_t, auto) { return stem.f(u); });
}

template <class T>
void backward(const Layer& l, const Tensors<T>& t) {
  const Stem<T> stem(l, t);
  const Saved<T>& saved = stem.saved;
  const int64_t channels = stem.channels, patch = stem.patch;
  stem.patch_sums(t.grad_y, saved.D, stem.scratch.bias);
  stem.contract([&](int64_t e, int64_t o) { return static_cast<double>(t.w[0][e * channels + o]); }, saved.D,
                saved.G2);
  for (int64_t o = 0; o < channels; ++o) {
    saved.G1[o] = static_cast<double>(stem.scratch.bias[o]);
    saved.G2[o] = saved.s[o] * (saved.G2[o] - saved.mu[o] * saved.G1[o]);
  }
  stem.give(t.grad_w, 0, patch * channels, [&](int64_t i) {
    const int64_t e = i / channels, o = i % channels;
    return stem.a(o) * (static_cast<double>(saved.D[i]) - saved.G1[o] * stem.pbar[e] -
                        saved.s[o] * saved.G2[o] * saved.Gw[i]);
  });
  stem.give(t.grad_w, 1, channels, [](int64_t) { return 0.0; });
  stem.give(t.grad_w, 2, channels, [&](int64_t o) { return saved.G2[o]; });
  stem.give(t.grad_w, 3, channels, [&](int64_t o) { return saved.G1[o]; });
}

template <class T>
void forward_tangent(const Layer& l, const Tensors<T>& t) {
  const Stem<T> stem(l, t);
  const Saved<T>& saved = stem.saved;
  const int64_t channels = stem.channels;
  if (t.w_dot[0]) {
    stem.contract([&](int64_t e, int64_t) { return stem.pbar[e]; }, t.w_dot[0], saved.Rmu);
    stem.contract([&](int64_t e, int64_t o) { return saved.Gw[e * channels + o]; }, t.w_dot[0], saved.c);
    for (int64_t o = 0; o < channels; ++o) saved.c[o] *= saved.s[o];
  } else {
    std::fill_n(saved.Rmu, channels, 0.0);
    std::fill_n(saved.c, channels, 0.0);
  }
  for (int64_t o = 0; o < channels; ++o) {
    stem.scratch.bias[o] =
        static_cast<T>(stem.dot(3, o) - stem.a(o) * saved.Rmu[o] - stem.k(o) * saved.mu[o]);
  }
  for (int64_t i = 0; i < stem.patch * channels; ++i) {
    const int64_t o = i % channels;
    stem.scratch.weights[i] =
        static_cast<T>(stem.a(o) * stem.dot(0, i) + stem.k(o) * static_cast<double>(t.w[0][i]));
  }
  stem.convolve(
      t.y_dot,
      [&](const Vector<T>(&z)[4], int64_t out, auto lanes) {
        return picked<T>(z, load(saved.places + out, lanes));
      },
      [&](Vector<T> u_dot, int64_t out, auto lanes) { return stem.f.slope(u_dot, out, lanes); });
}

/// grad_y may be absent: then D, G1, G2 and all tangents of the forward pass count as zero.
template <class T>
void backward_tangent(const Layer& l, const Tensors<T>& t) {
  const Stem<T> stem(l, t);
  const Saved<T>& saved = stem.saved;
  const int64_t channels = stem.channels, patch = stem.patch;
  const bool moves = t.grad_y != nullptr, turns = moves && t.w_dot[0];
  T *D_dot = stem.scratch.weights, *R1 = stem.scratch.bias;
  stem.patch_sums(t.grad_y_dot, D_dot, R1);
  double *R2 = stem.scratch.R2, *w_dot_D = stem.scratch.w_dot_D;
  stem.contract([&](int64_t e, int64_t o) { return static_cast<double>(t.w[0][e * channels + o]); }, D_dot,
                R2);
  if (turns) {
    stem.contract([&](int64_t e, int64_t o) { return stem.dot(0, e * channels + o); }, saved.D, w_dot_D);
    stem.gram_product(t.w_dot[0], stem.scratch.Gv);
  }
  for (int64_t o = 0; o < channels; ++o) {
    R2[o] -= saved.mu[o] * static_cast<double>(R1[o]);
    if (turns) R2[o] += w_dot_D[o] - saved.Rmu[o] * saved.G1[o] - saved.c[o] * saved.G2[o];
    R2[o] *= saved.s[o];
  }
  stem.give(t.grad_w_dot, 0, patch * channels, [&](int64_t i) {
    const int64_t e = i / channels, o = i % channels;
    const double s = saved.s[o];
    double u_dot =
        static_cast<double>(D_dot[i]) - static_cast<double>(R1[o]) * stem.pbar[e] - s * R2[o] * saved.Gw[i];
    if (!moves) return stem.a(o) * u_dot;
    const double G2 = saved.G2[o];
    u_dot += s * s * saved.c[o] * G2 * saved.Gw[i];
    if (turns) u_dot -= s * G2 * stem.scratch.Gv[i];
    const double u = static_cast<double>(saved.D[i]) - saved.G1[o] * stem.pbar[e] - s * G2 * saved.Gw[i];
    return stem.a(o) * u_dot + stem.k(o) * u;
  });
  stem.give(t.grad_w_dot, 1, channels, [](int64_t) { return 0.0; });
  stem.give(t.grad_w_dot, 2, channels, [&](int64_t o) { return R2[o]; });
  stem.give(t.grad_w_dot, 3, channels, [&](int64_t o) { return static_cast<double>(R1[o]); });
}

}  // namespace

template <>
struct OnCpu<Kind::stem> {
  static Footprint footprint(const Layer& l) {
    const Bands bands(l);
    const int64_t weights = bands.patch * l.out.c;
    return {elements(8 * (weights + 6 * l.out.c)) + weights + (l.pooled ? l.n * size(l.out) : 0),
            elements(8 * (weights + 2 * l.out.c)) + weights + 2 * l.out.c + bands.pixels() * l.out.c +
                bands.frame_elements(l) + 2 * bands.pixels()};
  }
  template <class T>
  static Passes<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::stem>;

}  // namespace maml::MAML_ISA
