// GroupNorm of n samples [pixels, c], for one task. A cell is one sample's channels of one group; it has
// m = pixels c / groups values. LayerNorm has one group, InstanceNorm c groups. Per cell, with g = grad_y and
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
// Each pass processes one sample after the other, so that its second and third loop find the sample in the
// cache. Sums run over the pixels, for a vector of channels. Weighted by gamma, they add up to the sums of
// the cells; without it, and added up over the samples, they are the gradients of gamma and beta. A number
// that every cell has one of is stored once for each of the cell's channels, so that it can be loaded as a
// vector. With a single group it is stored once, and the sums stay in registers. Threads share the samples in
// a fixed number of parts, whose sums are added up in order. The mean is stored as two numbers, for the
// reason given in batch_norm.cpp. gamma and beta may be absent (1 and 0). Samples do not depend on each
// other. The twin on the GPU is cuda/group_norm.cu.
#include <algorithm>
#include <cmath>

#include "cpu/implement.h"
#include "cpu/rows.h"

namespace maml::MAML_ISA {
namespace {

/// v, with zeros in the lanes that are not in `lanes`.
template <class T>
Vector<T> only(Vector<T> v, const Lanes<T>& lanes) {
  T part[kLanes<T>] = {};
  store(part, v, lanes);
  return load(part);
}
template <class T>
Vector<T> only(Vector<T> v, Whole) {
  return v;
}

template <class T, class L>
Vector<T> or_value(const T* p, int64_t j, const L& lanes, T value) {
  return p ? load(p + j, lanes) : broadcast(value);
}

template <class T, class L>
void write(T* to, Vector<T> value, bool add, const L& lanes) {
  store(to, add ? load(to, lanes) + value : value, lanes);
}

struct Cells {
  int64_t pixels, channels, groups, width;  // width: channels of a group
  int64_t kept;                             // stored elements of a number that every cell of a sample has

  explicit Cells(const Layer& l)
      : pixels(l.in.h * l.in.w),
        channels(l.in.c),
        groups(l.groups),
        width(l.in.c / l.groups),
        kept(l.groups == 1 ? 1 : l.in.c) {}

  /// The numbers of the cells that the channels from j on belong to.
  template <class T, class L>
  Vector<T> of(const T* numbers, int64_t j, const L& lanes) const {
    return groups == 1 ? broadcast(numbers[0]) : load(numbers + j, lanes);
  }

  /// sum[q] += the terms that term(element, part) adds to part[q], over the pixels, for the channels from j
  /// on.
  template <class T, int Q, class F>
  void over_pixels(int64_t j, Vector<T> (&sum)[Q], F term) const {
    for (int64_t i0 = 0; i0 < pixels; i0 += kRowBlock) {
      const int64_t i1 = std::min(pixels, i0 + kRowBlock);
      Vector<T> part[Q] = {};
      for (int64_t i = i0; i < i1; ++i) term(i * channels + j, part);
      for (int q = 0; q < Q; ++q) sum[q] += part[q];
    }
  }

  /// means[q] = the means over the cells of one sample; sums(j, lanes, sum) adds to sum[q] the sums over
  /// pixels for the channels from j on.
  template <class T, int Q, class F>
  void mean(T* const (&means)[Q], F sums) const {
    const T per_value = 1 / static_cast<T>(pixels * width);
    Vector<T> total[Q] = {};
    constexpr int64_t kBlock = kRowBlock * kLanes<T>;  // sums of blocks are added up: less rounding
    for (int64_t first = 0; first < channels; first += kBlock) {
      Vector<T> part[Q] = {};
      each_lanes<T>(std::min(kBlock, channels - first), [&](int64_t j, const auto& lanes) {
        Vector<T> sum[Q] = {};
        sums(first + j, lanes, sum);
        for (int q = 0; q < Q; ++q) {
          if (groups > 1) {
            store(means[q] + first + j, sum[q], lanes);
          } else {
            part[q] += only<T>(sum[q], lanes);
          }
        }
      });
      for (int q = 0; q < Q; ++q) total[q] += part[q];
    }
    for (int q = 0; q < Q; ++q) {
      if (groups == 1) {
        T sum = 0;
        for (int i = 0; i < kLanes<T>; ++i) sum += total[q][i];
        means[q][0] = sum * per_value;
        continue;
      }
      for (T* cell = means[q]; cell < means[q] + channels; cell += width) {
        T sum = 0;
        for (int64_t i = 0; i < width; ++i) sum += cell[i];
        std::fill_n(cell, width, sum * per_value);
      }
    }
  }
};

/// One sample, which starts at element `at`, and the numbers saved for its cells.
template <class T>
struct Sample {
  const Cells& cells;
  int64_t at;
  T *mu, *rest, *s;  // saved by the forward pass
  T *Rmu, *q;        // saved by its tangent

  Sample(const Cells& c, const Tensors<T>& t, int64_t sample) : cells(c), at(sample * c.pixels * c.channels) {
    mu = t.saved + 3 * sample * c.kept, rest = mu + c.kept, s = rest + c.kept;
    Rmu = t.saved_dot ? t.saved_dot + 2 * sample * c.kept : nullptr, q = Rmu ? Rmu + c.kept : nullptr;
  }

  /// Returns the function element -> xh, for the channels from j on.
  template <class L>
  auto normalised(const T* x, int64_t j, const L& lanes) const {
    return [x, lanes, high = cells.of(mu, j, lanes), low = cells.of(rest, j, lanes),
            scale = cells.of(s, j, lanes)](int64_t i) { return (load(x + i, lanes) - high - low) * scale; };
  }

  /// Returns the function (element, its xh) -> Rxh, for the channels from j on; zero where x has no tangent.
  template <class L>
  auto moving(const T* x_dot, int64_t j, const L& lanes) const {
    const Vector<T> none{};
    return [x_dot, lanes, scale = cells.of(s, j, lanes), mean = x_dot ? cells.of(Rmu, j, lanes) : none,
            slope = x_dot ? cells.of(q, j, lanes) : none](int64_t i, Vector<T> xh) {
      return x_dot ? scale * (load(x_dot + i, lanes) - mean - xh * slope) : Vector<T>{};
    };
  }

  /// Calls of_channels(j, lanes)(element) for every pixel of the channels from j on.
  template <class F>
  void each(F of_channels) const {
    each_lanes<T>(cells.channels, [&](int64_t j, const auto& lanes) {
      const auto pixel = of_channels(j, lanes);
      for (int64_t i = 0; i < cells.pixels; ++i) pixel(i * cells.channels + j);
    });
  }
};

/// Calls f(sample) for every sample; threads share the samples.
template <class T, class F>
void each_sample(const Layer& l, const Tensors<T>& t, F f) {
  const Cells cells(l);
  share_samples(l.n, size(l.in), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(Sample<T>(cells, t, i));
  });
}

constexpr int64_t kMostParts = 8;
constexpr int64_t kMeans = 4;

int64_t parts_of(const Layer& l) { return std::min(l.n, kMostParts); }
int64_t scratch_of_part(const Layer& l) { return 2 * l.in.c + kMeans * Cells(l).kept; }

/// Calls f(sample, sums [2, c], room for kMeans numbers of its cells) for every sample. to[0] and to[1],
/// unless null, (+)= the sums over all samples of what f adds to `sums`.
template <class T, class F>
void each_summed(const Layer& l, const Tensors<T>& t, T* const* to, F f) {
  const Cells cells(l);
  const int64_t c = l.in.c, parts = parts_of(l), step = scratch_of_part(l);
  share(parts, 1, kElementWork * l.n * size(l.in), [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      T* sums = t.scratch + part * step;
      std::fill_n(sums, 2 * c, T(0));
      for (int64_t i = part * l.n / parts; i < (part + 1) * l.n / parts; ++i) {
        f(Sample<T>(cells, t, i), sums, sums + 2 * c);
      }
    }
  });
  for (int q = 0; q < 2; ++q) {
    if (!to[q]) continue;
    for (int64_t part = 0; part < parts; ++part) {
      const T* sums = t.scratch + part * step + q * c;
      const bool add = t.add_w[q] || part > 0;
      for (int64_t j = 0; j < c; ++j) to[q][j] = add ? to[q][j] + sums[j] : sums[j];
    }
  }
}

template <class T>
void forward(const Layer& l, const Tensors<T>& t) {
  each_sample(l, t, [&](const Sample<T>& sample) {
    const Cells& cells = sample.cells;
    const T* x = t.x[0] + sample.at;
    T* y = t.y + sample.at;
    cells.mean<T, 1>({sample.mu}, [&](int64_t j, const auto& lanes, Vector<T>(&sum)[1]) {
      cells.over_pixels<T>(j, sum, [&](int64_t i, Vector<T>* part) { part[0] += load(x + i, lanes); });
    });
    cells.mean<T, 2>({sample.rest, sample.s}, [&](int64_t j, const auto& lanes, Vector<T>(&sum)[2]) {
      const Vector<T> mu = cells.of(sample.mu, j, lanes);
      cells.over_pixels<T>(j, sum, [&](int64_t i, Vector<T>* part) {
        const Vector<T> d = load(x + i, lanes) - mu;
        part[0] += d;
        part[1] += d * d;
      });
    });
    for (int64_t k = 0; k < cells.kept; ++k) {
      sample.s[k] = 1 / std::sqrt(sample.s[k] + static_cast<T>(l.eps));
    }
    sample.each([&](int64_t j, const auto& lanes) {
      return
          [y, lanes, xh = sample.normalised(x, j, lanes), gamma = or_value(t.w[0], j, lanes, T(1)),
           beta = or_value(t.w[1], j, lanes, T(0))](int64_t i) { store(y + i, gamma * xh(i) + beta, lanes); };
    });
  });
}

template <class T>
void backward(const Layer& l, const Tensors<T>& t) {
  each_summed(l, t, t.grad_w, [&](const Sample<T>& sample, T* sums, T* means) {
    const Cells& cells = sample.cells;
    const T *x = t.x[0] + sample.at, *g = t.grad_y + sample.at;
    T *by_gamma = sums, *by_beta = sums + cells.channels, *A = means, *B = means + cells.kept;
    cells.mean<T, 2>({A, B}, [&](int64_t j, const auto& lanes, Vector<T>(&sum)[2]) {
      const auto xh = sample.normalised(x, j, lanes);
      cells.over_pixels<T>(j, sum, [&](int64_t i, Vector<T>* part) {
        const Vector<T> grad = load(g + i, lanes);
        part[0] += grad;
        part[1] += grad * xh(i);
      });
      write(by_beta + j, sum[0], true, lanes);
      write(by_gamma + j, sum[1], true, lanes);
      const Vector<T> gamma = or_value(t.w[0], j, lanes, T(1));
      for (Vector<T>& s : sum) s *= gamma;
    });
    if (!t.grad_x[0]) return;
    sample.each([&](int64_t j, const auto& lanes) {
      return [g, lanes, to = t.grad_x[0] + sample.at, add = t.add_x[0], xh = sample.normalised(x, j, lanes),
              s = cells.of(sample.s, j, lanes), gamma = or_value(t.w[0], j, lanes, T(1)),
              a = cells.of(A, j, lanes), b = cells.of(B, j, lanes)](int64_t i) {
        write(to + i, s * (gamma * load(g + i, lanes) - a - xh(i) * b), add, lanes);
      };
    });
  });
}

template <class T>
void forward_tangent(const Layer& l, const Tensors<T>& t) {
  each_sample(l, t, [&](const Sample<T>& sample) {
    const Cells& cells = sample.cells;
    const T *x = t.x[0] + sample.at, *x_dot = t.x_dot[0] ? t.x_dot[0] + sample.at : nullptr;
    T* y_dot = t.y_dot + sample.at;
    if (x_dot) {
      cells.mean<T, 2>({sample.Rmu, sample.q}, [&](int64_t j, const auto& lanes, Vector<T>(&sum)[2]) {
        const auto xh = sample.normalised(x, j, lanes);
        cells.over_pixels<T>(j, sum, [&](int64_t i, Vector<T>* part) {
          const Vector<T> dot = load(x_dot + i, lanes);
          part[0] += dot;
          part[1] += dot * xh(i);
        });
      });
    }
    sample.each([&](int64_t j, const auto& lanes) {
      return [y_dot, lanes, xh_of = sample.normalised(x, j, lanes), xh_dot = sample.moving(x_dot, j, lanes),
              gamma = or_value(t.w[0], j, lanes, T(1)), gamma_dot = or_value(t.w_dot[0], j, lanes, T(0)),
              beta_dot = or_value(t.w_dot[1], j, lanes, T(0))](int64_t i) {
        const Vector<T> xh = xh_of(i);
        store(y_dot + i, gamma * xh_dot(i, xh) + gamma_dot * xh + beta_dot, lanes);
      };
    });
  });
}

/// grad_y may be absent, then also x_dot and gamma_dot: h counts as zero.
template <class T>
void backward_tangent(const Layer& l, const Tensors<T>& t) {
  each_summed(l, t, t.grad_w_dot, [&](const Sample<T>& sample, T* sums, T* means) {
    const Cells& cells = sample.cells;
    const T *x = t.x[0] + sample.at, *x_dot = t.x_dot[0] ? t.x_dot[0] + sample.at : nullptr;
    const T *g = t.grad_y ? t.grad_y + sample.at : nullptr, *g_dot = t.grad_y_dot + sample.at;
    T *by_gamma = sums, *by_beta = sums + cells.channels;
    T *A = means, *B = A + cells.kept, *RA = B + cells.kept, *RB = RA + cells.kept;
    cells.mean<T, 4>({A, B, RA, RB}, [&](int64_t j, const auto& lanes, Vector<T>(&sum)[4]) {
      const auto xh_of = sample.normalised(x, j, lanes);
      const auto xh_dot = sample.moving(x_dot, j, lanes);
      cells.over_pixels<T>(j, sum, [&](int64_t i, Vector<T>* part) {
        const Vector<T> xh = xh_of(i), dot = load(g_dot + i, lanes);
        part[2] += dot;
        part[3] += dot * xh;
        if (!g) return;
        const Vector<T> grad = load(g + i, lanes);
        part[0] += grad;
        part[1] += grad * xh;
        part[3] += grad * xh_dot(i, xh);
      });
      write(by_beta + j, sum[2], true, lanes);
      write(by_gamma + j, sum[3], true, lanes);
      const Vector<T> gamma = or_value(t.w[0], j, lanes, T(1));
      const Vector<T> gamma_dot = or_value(t.w_dot[0], j, lanes, T(0));
      for (int k : {0, 1}) {
        sum[2 + k] = gamma * sum[2 + k] + gamma_dot * sum[k];
        sum[k] *= gamma;
      }
    });
    if (!t.grad_x_dot[0]) return;
    sample.each([&](int64_t j, const auto& lanes) {
      const Vector<T> none{};
      return [g, g_dot, lanes, to = t.grad_x_dot[0] + sample.at, add = t.add_x[0],
              xh_of = sample.normalised(x, j, lanes), xh_dot = sample.moving(x_dot, j, lanes),
              s = cells.of(sample.s, j, lanes),
              q = x_dot ? cells.of(sample.s, j, lanes) * cells.of(sample.q, j, lanes) : none,
              gamma = or_value(t.w[0], j, lanes, T(1)), gamma_dot = or_value(t.w_dot[0], j, lanes, T(0)),
              a = cells.of(A, j, lanes), b = cells.of(B, j, lanes), Ra = cells.of(RA, j, lanes),
              Rb = cells.of(RB, j, lanes)](int64_t i) {
        const Vector<T> xh = xh_of(i);
        Vector<T> u_dot = gamma * load(g_dot + i, lanes) - Ra - xh * Rb;
        if (g) {
          const Vector<T> grad = load(g + i, lanes);
          u_dot += gamma_dot * grad - xh_dot(i, xh) * b - q * (gamma * grad - a - xh * b);
        }
        write(to + i, s * u_dot, add, lanes);
      };
    });
  });
}

}  // namespace

template <>
struct OnCpu<Kind::group_norm> {
  static Footprint footprint(const Layer& l) {
    const int64_t kept = l.n * Cells(l).kept;
    return {3 * kept, parts_of(l) * scratch_of_part(l), 2 * kept};
  }
  template <class T>
  static Passes<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::group_norm>;

}  // namespace maml::MAML_ISA
