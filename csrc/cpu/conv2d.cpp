// Convolution, channels last, for one task (a linear layer is one with one tap on a 1 x 1 image).
//
//   y[m, o]        = b[o] + sum_{tap, c} x[m at tap, c] w[tap, c, o]
//   grad_w         = sum_m x[m at tap, c] grad_y[m, o]
//   grad_x         = sum_{tap, o} grad_y[. at tap, o] w[tap, c, o]
//   y_dot          : x_dot with w, x with w_dot
//   grad_w_dot     : x with grad_y_dot, x_dot with grad_y
//   grad_x_dot     : grad_y_dot with w, grad_y with w_dot
//
// All of these are products of product.h on gathered rows. The output pixels whose taps inside the image are
// the same form one product with these taps: nothing is multiplied by padding, and nothing is copied. A few
// samples are processed at a time, so that what one product has read is still in the cache for the next.
//
// The input gradient gathers too; nothing is scattered. With stride s, input rows i with equal (i + pad) mod
// s read the same taps. So each of the s x s parity classes is a convolution of grad_y with stride 1 and the
// taps of that class, reversed and transposed, and no product has a factor that is zero because of the
// stride.
//
// A convolution is bilinear, so each tangent is the same product of two terms, summed into one accumulator.
// Where is_winograd(l), all three products are computed by Winograd's algorithm (product/winograd.h). The
// twin on the GPU is cuda/conv2d.cu.
#include "cpu/conv2d.h"

#include <algorithm>
#include <utility>

#include "cpu/frame.h"
#include "cpu/implement.h"
#include "cpu/product/winograd.h"
#include "layers/patch_moments.h"

namespace maml::MAML_ISA {
namespace {

/// One axis of a convolution: position i reads elements start + i stride + [0, taps) of an image's `size`.
struct Axis {
  int64_t positions, taps, start, stride, size;
  int64_t first_tap(int64_t i) const { return std::clamp<int64_t>(-start - i * stride, 0, taps); }
  int64_t end_tap(int64_t i) const {
    return std::clamp<int64_t>(size - start - i * stride, first_tap(i), taps);
  }
  bool inside() const { return start >= 0 && start + (positions - 1) * stride + taps <= size; }
};

/// Consecutive positions [first, first + count) whose taps inside the image are the same: [tap, tap + taps).
struct SameTaps {
  int64_t first, count, tap, taps;
};

template <class F>
void each_same_taps(const Axis& axis, F f) {
  for (int64_t i = 0, first = 0; i < axis.positions; first = i) {
    const int64_t tap = axis.first_tap(i), end = axis.end_tap(i);
    while (++i < axis.positions && axis.first_tap(i) == tap && axis.end_tap(i) == end) {
    }
    f(SameTaps{first, i - first, tap, end - tap});
  }
}

/// The positions of one convolution. They read images of `channels` channels at their taps and write `width`
/// elements each: position (0, 0) of the first sample at offset `to`, the others by strides.
struct Sweep {
  Axis rows, columns;
  int64_t channels, width, to, to_row, to_column, to_sample;

  int64_t from_row() const { return columns.size * channels; }
  int64_t from_sample() const { return rows.size * from_row(); }
  int64_t positions() const { return rows.positions * columns.positions; }
  int64_t group(int64_t n) const { return group_of(n, std::max(from_sample(), to_sample)); }
  int64_t from(int64_t row, int64_t tap_row, int64_t column, int64_t tap_column) const {
    return (rows.start + row * rows.stride + tap_row) * from_row() +
           (columns.start + column * columns.stride + tap_column) * channels;
  }
};

Sweep forward_sweep(const Layer& l) {
  const Window& k = l.window;
  return {{l.out.h, k.kernel_h, -k.pad_top, k.stride_h, l.in.h},
          {l.out.w, k.kernel_w, -k.pad_left, k.stride_w, l.in.w},
          l.in.c,
          l.out.c,
          0,
          l.out.w * l.out.c,
          l.out.c,
          size(l.out)};
}

/// One axis of a parity class of the input gradient: its positions are first, first + stride, ...; its taps
/// are parity, parity + stride, ...
struct ParityAxis {
  int64_t parity, first, stride, positions, taps;
  Axis reads;  // the elements of grad_y that it reads
  ParityAxis(int64_t parity_, int64_t size, int64_t kernel, int64_t stride_, int64_t pad, int64_t out)
      : parity(parity_), stride(stride_) {
    first = ((parity - pad) % stride + stride) % stride;
    positions = first < size ? (size - first - 1) / stride + 1 : 0;
    taps = parity < kernel ? (kernel - parity - 1) / stride + 1 : 0;
    reads = {positions, taps, (first + pad - parity) / stride - (taps - 1), 1, out};
  }
};

struct ParityClass {
  ParityAxis rows, columns;
  ParityClass(const Layer& l, int64_t row_parity, int64_t column_parity)
      : rows(row_parity, l.in.h, l.window.kernel_h, l.window.stride_h, l.window.pad_top, l.out.h),
        columns(column_parity, l.in.w, l.window.kernel_w, l.window.stride_w, l.window.pad_left, l.out.w) {}
  bool empty() const { return rows.positions == 0 || columns.positions == 0; }
  int64_t weights(const Layer& l) const { return rows.taps * columns.taps * l.in.c * l.out.c; }
  Sweep sweep(const Layer& l) const {
    const int64_t row = l.in.w * l.in.c;
    return {rows.reads,
            columns.reads,
            l.out.c,
            l.in.c,
            rows.first * row + columns.first * l.in.c,
            rows.stride * row,
            columns.stride * l.in.c,
            size(l.in)};
  }
};

template <class F>
void each_parity_class(const Layer& l, F f) {
  for (int64_t a = 0; a < l.window.stride_h; ++a) {
    for (int64_t b = 0; b < l.window.stride_w; ++b) {
      const ParityClass parity(l, a, b);
      if (!parity.empty()) f(parity);
    }
  }
}

/// The products of a sweep over n samples: y (+)= bias + sum of terms a * b. `memory`: two offsets for each
/// position of a group.
template <class T>
void gather(const Sweep& p, int64_t n, const Term<T>* terms, int count, const T* bias, bool add, T* y,
            T* memory) {
  const int64_t group = p.group(n);
  int64_t runs[kMostKernelRows], weights[kMostKernelRows];
  for (int64_t s = 0; s < n; s += group) {
    const int64_t samples = std::min(group, n - s);
    int32_t *row = reinterpret_cast<int32_t*>(memory), *c_row = row + group * p.positions();
    each_same_taps(p.rows, [&](const SameTaps& i) {
      each_same_taps(p.columns, [&](const SameTaps& j) {
        const int64_t pixels = i.count * j.count;
        if (s == 0) {
          fill_offsets(samples, i.count, j.count, p.from(i.first, i.tap, j.first, j.tap), p.from_sample(),
                       p.rows.stride * p.from_row(), p.columns.stride * p.channels, row);
          fill_offsets(samples, i.count, j.count, p.to + i.first * p.to_row + j.first * p.to_column,
                       p.to_sample, p.to_row, p.to_column, c_row);
        }
        for (int64_t r = 0; r < i.taps; ++r) {
          runs[r] = r * p.from_row();
          weights[r] = ((i.tap + r) * p.columns.taps + j.tap) * p.channels;
        }
        GatherProduct<T> g{};
        for (int t = 0; t < count; ++t) g.term[t] = {terms[t].a + s * p.from_sample(), terms[t].b};
        g.terms = count;
        g.runs = {j.taps > 0 ? static_cast<int>(i.taps) : 0, j.taps * p.channels, runs, weights};
        g.row = std::exchange(row, row + group * pixels);
        g.m = samples * pixels;
        g.n = p.width;
        g.c = y + s * p.to_sample;
        g.c_row = std::exchange(c_row, c_row + group * pixels);
        g.bias = bias;
        g.add = add;
        gather_product(g);
      });
    });
  }
}

/// Writes the taps of a parity class, last first, each transposed from [c_in, c_out] to [c_out, c_in].
template <class T>
T* class_weights(const Layer& l, const ParityClass& p, const T* w, T* out) {
  const int64_t tap_size = l.in.c * l.out.c;
  for (int64_t u = p.rows.taps - 1; u >= 0; --u) {
    for (int64_t v = p.columns.taps - 1; v >= 0; --v) {
      const int64_t r = p.rows.parity + u * l.window.stride_h, q = p.columns.parity + v * l.window.stride_w;
      transpose(1, l.in.c, l.out.c, w + (r * l.window.kernel_w + q) * tap_size, out);
      out += tap_size;
    }
  }
  return out;
}

}  // namespace

int64_t group_of(int64_t n, int64_t elements) {
  return std::clamp<int64_t>(kGroupElements / std::max<int64_t>(1, elements), 1, n);
}

int64_t product_weights(const Layer& l) {
  return is_winograd(l) ? winograd_weights(l) : patch_size(l.window, l.in) * l.out.c;
}

template <class T>
const T* forward_weights(const Layer& l, const T* w, T* room) {
  if (!is_winograd(l)) return w;
  winograd_forward_weights(l, w, room);
  return room;
}

template <class T>
void convolve(const Layer& l, const Term<T>* terms, int count, const T* bias, T* y, T* memory) {
  if (is_winograd(l)) return winograd_convolve(l, terms, count, bias, y, memory);
  gather(forward_sweep(l), l.n, terms, count, bias, false, y, memory);
}

template <class T>
void transposed_weights(const Layer& l, const T* w, T* out) {
  if (is_winograd(l)) return winograd_transposed_weights(l, w, out);
  each_parity_class(l, [&](const ParityClass& p) { out = class_weights(l, p, w, out); });
}

template <class T>
void input_gradient(const Layer& l, const Term<T>* terms, int count, bool add, T* grad_x, T* memory) {
  if (is_winograd(l)) return winograd_input_gradient(l, terms, count, add, grad_x, memory);
  Term<T> of_class[2] = {terms[0], count > 1 ? terms[1] : Term<T>{}};
  each_parity_class(l, [&](const ParityClass& p) {
    gather<T>(p.sweep(l), l.n, of_class, count, nullptr, add, grad_x, memory);
    for (int t = 0; t < count; ++t) of_class[t].b += p.weights(l);
  });
}

template <class T>
WeightGradient<T>::WeightGradient(const Layer& l, bool add, T* grad_w, T* room)
    : l_(l),
      add_(add),
      started_(add && !is_winograd(l)),
      grad_w_(grad_w),
      sums_(is_winograd(l) ? room : grad_w) {}

/// One row of taps at a time: over the output rows where it is inside the image, with columns grouped by
/// taps.
template <class T>
void WeightGradient<T>::sum(const Layer& l, const Term<T>* terms, int count, T* memory) {
  const bool add = std::exchange(started_, true);
  if (is_winograd(l)) return winograd_weight_sums(l, terms, count, add, sums_, memory);
  const Sweep p = forward_sweep(l);
  const bool inside = p.rows.inside() && p.columns.inside();  // one product then writes all sums of a tap
  if (!inside && !add) std::fill_n(sums_, p.rows.taps * p.columns.taps * p.channels * p.width, T(0));
  const int64_t group = p.group(l.n), no_offset = 0;
  for (int64_t s = 0; s < l.n; s += group) {
    const int64_t samples = std::min(group, l.n - s);
    int32_t *row = reinterpret_cast<int32_t*>(memory), *g_row = row + group * p.positions() * p.rows.taps;
    for (int64_t r = 0; r < p.rows.taps; ++r) {
      int64_t first = 0, end = p.rows.positions;
      while (first < end && p.rows.first_tap(first) > r) ++first;
      while (first < end && p.rows.end_tap(end - 1) <= r) --end;
      each_same_taps(p.columns, [&](const SameTaps& j) {
        if (first == end || j.taps == 0) return;
        const int64_t pixels = (end - first) * j.count, k = (r * p.columns.taps + j.tap) * p.channels;
        if (s == 0) {
          fill_offsets(samples, end - first, j.count, p.from(first, r, j.first, j.tap), p.from_sample(),
                       p.rows.stride * p.from_row(), p.columns.stride * p.channels, row);
          fill_offsets(samples, end - first, j.count, first * p.to_row + j.first * p.to_column, p.to_sample,
                       p.to_row, p.to_column, g_row);
        }
        OuterProduct<T> o{};
        for (int t = 0; t < count; ++t) {
          o.term[t] = {terms[t].a + s * p.from_sample(), terms[t].b + s * p.to_sample};
        }
        o.terms = count;
        o.runs = {1, j.taps * p.channels, &no_offset, &k};
        o.row = std::exchange(row, row + group * pixels);
        o.g_row = std::exchange(g_row, g_row + group * pixels);
        if (p.positions() == 1) o.g_row = nullptr;  // the rows are contiguous
        o.m = samples * pixels;
        o.n = p.width;
        o.d = sums_;
        o.add = add || s > 0 || !inside;
        outer_product(o);
      });
    }
  }
}

template <class T>
void WeightGradient<T>::finish() const {
  if (is_winograd(l_)) winograd_weight_gradient(l_, sums_, add_, grad_w_);
}

int64_t conv2d_scratch(const Layer& l) {
  if (is_winograd(l)) return winograd_scratch(l);
  const Sweep p = forward_sweep(l);
  int64_t positions = p.group(l.n) * p.positions() * p.rows.taps;
  each_parity_class(l, [&](const ParityClass& c) {
    positions = std::max(positions, c.sweep(l).group(l.n) * c.rows.positions * c.columns.positions);
  });
  return 2 * positions;
}

namespace {

/// Room for the weights of both terms in the form that the products read, and the rest of the scratch.
template <class T>
struct ProductScratch {
  T *weights[2], *rest;
  ProductScratch(const Layer& l, T* scratch) {
    const int64_t weight = product_weights(l);
    weights[0] = scratch, weights[1] = scratch + weight;
    rest = scratch + 2 * weight;
  }
};

}  // namespace

template const float* forward_weights<float>(const Layer&, const float*, float*);
template const double* forward_weights<double>(const Layer&, const double*, double*);
template void convolve<float>(const Layer&, const Term<float>*, int, const float*, float*, float*);
template void convolve<double>(const Layer&, const Term<double>*, int, const double*, double*, double*);
template void transposed_weights<float>(const Layer&, const float*, float*);
template void transposed_weights<double>(const Layer&, const double*, double*);
template void input_gradient<float>(const Layer&, const Term<float>*, int, bool, float*, float*);
template void input_gradient<double>(const Layer&, const Term<double>*, int, bool, double*, double*);
template class WeightGradient<float>;
template class WeightGradient<double>;

template <>
struct OnCpu<Kind::conv2d> {
  static Footprint footprint(const Layer& l) { return {0, conv2d_scratch(l) + 2 * product_weights(l)}; }

  template <class T>
  static void apply(const Layer& l, const Term<T>* terms, int count, const T* bias, T* y, T* scratch) {
    const ProductScratch<T> memory(l, scratch);
    Term<T> read[2];
    for (int t = 0; t < count; ++t) {
      read[t] = {terms[t].a, forward_weights(l, terms[t].b, memory.weights[t])};
    }
    convolve(l, read, count, bias, y, memory.rest);
  }
  template <class T>
  static void adjoint_x(const Layer& l, const Term<T>* terms, int count, bool add, T* grad_x, T* scratch) {
    const ProductScratch<T> memory(l, scratch);
    Term<T> read[2];
    for (int t = 0; t < count; ++t) {
      transposed_weights(l, terms[t].b, memory.weights[t]);
      read[t] = {terms[t].a, memory.weights[t]};
    }
    input_gradient(l, read, count, add, grad_x, memory.rest);
  }
  template <class T>
  static void adjoint_w(const Layer& l, const Term<T>* terms, int count, bool add, T* grad_w, T* scratch) {
    const ProductScratch<T> memory(l, scratch);
    WeightGradient<T> gradient(l, add, grad_w, memory.weights[0]);
    gradient.sum(l, terms, count, memory.rest);
    gradient.finish();
  }
  template <class T>
  static void adjoint_bias(const Layer& l, const T* g, bool add, T* grad_bias) {
    column_sums(l.n * l.out.h * l.out.w, l.out.c, g, add, grad_bias);
  }
};
template struct Implementation<Kind::conv2d>;

}  // namespace maml::MAML_ISA
