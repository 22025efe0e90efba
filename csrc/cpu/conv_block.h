// What the passes of conv_block.cpp share: the values they save, their scratch, and loops over the outputs.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/conv2d.h"
#include "cpu/kink.h"
#include "cpu/layers.h"
#include "cpu/pool_pairs.h"
#include "cpu/run/share.h"

namespace maml::MAML_ISA {

/// The values that the passes save: z, six vectors [c], and the places that the pool has chosen.
template <class T>
struct Saved {
  T *z, *mu, *s, *Rmu, *c, *G1, *G2, *places;
  Saved(const Layer& l, T* p) {
    z = std::exchange(p, p + l.n * size(l.between));
    for (T** field : {&mu, &s, &Rmu, &c, &G1, &G2}) *field = std::exchange(p, p + l.out.c);
    places = p;
  }
};

/// The convolution, as a layer on one group of samples.
inline Layer convolution_of(const Layer& l) {
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

  /// Calls f(first sample of a group, the convolution as a layer on that group).
  template <class F>
  void each_group(F f) const {
    Layer some = group;
    for (int64_t first = 0; first < l.n; first += group.n) {
      some.n = std::min(group.n, l.n - first);
      f(first, some);
    }
  }
};

/// Loops over the outputs y and the pixels of z that they are computed from: a 2 x 2 window, or, without a
/// pool, one pixel.
template <class T, bool Pooled>
struct Outputs {
  const Block<T>& b;
  Kink<T> f{b.l, b.t.y};
  int64_t channels = b.channels, below = b.l.between.w * b.channels, step = (Pooled ? 2 : 1) * b.channels;

  /// Calls f(j, lanes, count, out, in) for each row in [first, end) of y and each vector of channels in [c0,
  /// c1). There are `count` outputs from element `out` of y on; the first pixel of the first one is element
  /// `in` of z. The next output is `channels` elements further in y and `step` in z.
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
  /// runs() over all channels of samples [first, end). The rows are shared by threads.
  template <class F>
  void each_run(int64_t first, int64_t end, F f) const {
    const int64_t rows = (end - first) * b.l.out.h, start = first * b.l.out.h;
    share(rows, 1, kElementWork * rows * b.l.between.w * channels,
          [&](int64_t r0, int64_t r1) { runs(start + r0, start + r1, 0, channels, f); });
  }
  /// The element of x [n, between] at the pixel that the output has chosen.
  Vector<T> chosen(const T* x, int64_t out, int64_t in, const Lanes<T>& lanes) const {
    if constexpr (!Pooled) return load(x + in, lanes);
    Vector<T> v[4];
    load_window(x + in, channels, below, lanes, v);
    return picked<T>(v, load(b.saved.places + out, lanes));
  }

  /// to[q] [c] = sums over all outputs. term(j, lanes) returns a function that, for (out, in, sum), adds the
  /// terms of one output to Vector sum[Q]. The channels are shared by threads.
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

  /// Writes to [samples, between]: affine(j, lanes)(in) at every pixel of z, plus chosen(j, lanes)(out) at
  /// the pixel that an output has chosen.
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
    if constexpr (Pooled) {  // pixels in no window
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

/// Calls f with an Outputs<T, Pooled>.
template <class T, class F>
void with_outputs(const Block<T>& b, F f) {
  b.l.pooled ? f(Outputs<T, true>{b}) : f(Outputs<T, false>{b});
}

}  // namespace maml::MAML_ISA
