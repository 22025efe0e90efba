// Convolution (and, with one tap on a 1 x 1 image, the linear layer), channels last, one task.
//
//   y[m, o]        = b[o] + sum_{tap, c} x[m at tap, c] w[tap, c, o]
//   grad_w         = sum_m x[m at tap, c] grad_y[m, o]
//   grad_x         = sum_{tap, o} grad_y[. at tap, o] w[tap, c, o]
//   y_dot          : x_dot with w, x with w_dot
//   grad_w_dot     : x with grad_y_dot, x_dot with grad_y
//   grad_x_dot     : grad_y_dot with w, grad_y with w_dot
//
// All three are the products of product.h on gathered rows. An image is copied into a zero-padded frame where
// a tap would read outside it, a few samples at a time so that the frame stays in the cache. The input
// gradient is a gather too, never a scatter: with stride s, input rows i with equal (i + pad) mod s read the
// same taps, so each of the s x s parity classes is a stride-1 convolution of grad_y with the taps of that
// class, reversed and transposed: no multiplication with a zero that the stride has put in. Linear and
// convolution are bilinear, so each tangent is the same product of two terms into one accumulator. Where
// is_winograd(l), all three go the way of winograd.h instead.
#include "conv2d.h"

#include <algorithm>
#include <utility>

#include "../patch_gram.h"
#include "frame.h"
#include "layers.h"
#include "winograd.h"

namespace maml::MAML_ISA {
namespace {

/// One axis of a parity class of the input gradient: positions first, first + stride, ...; the taps that
/// reach them, parity, parity + stride, ...; and the rows of grad_y that those read.
struct ParityAxis {
  int64_t parity, first, positions, taps, frame_start, frame_size;
  ParityAxis(int64_t parity_, int64_t size, int64_t kernel, int64_t stride, int64_t pad) : parity(parity_) {
    first = ((parity - pad) % stride + stride) % stride;
    positions = first < size ? (size - first - 1) / stride + 1 : 0;
    taps = parity < kernel ? (kernel - parity - 1) / stride + 1 : 0;
    frame_start = (first + pad - parity) / stride - (taps - 1);
    frame_size = positions + taps - 1;
  }
};

struct ParityClass {
  ParityAxis rows, columns;
  ParityClass(const Layer& l, int64_t row_parity, int64_t column_parity)
      : rows(row_parity, l.in.h, l.window.kernel_h, l.window.stride_h, l.window.pad_top),
        columns(column_parity, l.in.w, l.window.kernel_w, l.window.stride_w, l.window.pad_left) {}
  Frame frame() const { return {rows.frame_start, columns.frame_start, rows.frame_size, columns.frame_size}; }
  bool reached() const { return rows.taps > 0 && columns.taps > 0; }
  bool empty() const { return rows.positions == 0 || columns.positions == 0; }
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

/// The scratch of one pass, cut up.
template <class T>
struct Scratch {
  int32_t *row, *c_row;
  T* frame[2];
  Scratch(T* scratch, int64_t group, int64_t positions, int64_t frame_elements) {
    row = reinterpret_cast<int32_t*>(scratch);
    c_row = row + group * positions;
    scratch += 2 * group * positions;
    for (T*& f : frame) f = scratch, scratch += group * frame_elements;
  }
};

/// The taps of a parity class, last first, each [c_in, c_out] -> [c_out, c_in].
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

int64_t group_of(int64_t n, int64_t frame_elements) {
  return std::clamp<int64_t>(kFrameElements / std::max<int64_t>(1, frame_elements), 1, n);
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
  const Frame frame = frame_of(l.window, l.out);
  const int64_t frame_elements = frame.h * frame.w * l.in.c, pixels = l.out.h * l.out.w;
  const int64_t group = group_of(l.n, frame_elements);
  const Scratch<T> scratch(memory, group, pixels, frame_elements);
  int64_t runs[kMostKernelRows];
  for (int64_t s = 0; s < l.n; s += group) {
    const int64_t samples = std::min(group, l.n - s);
    Gather<T> g{};
    Framed<T> f{};
    for (int t = 0; t < count; ++t) {
      f = framed(terms[t].a + s * size(l.in), samples, l.in, frame, scratch.frame[t]);
      g.term[t] = {f.base, terms[t].b};
    }
    if (s == 0) {
      fill_offsets(samples, l.out.h, l.out.w, 0, f.sample, l.window.stride_h * f.row,
                   l.window.stride_w * l.in.c, scratch.row);
      fill_offsets(samples, 1, pixels, 0, pixels * l.out.c, 0, l.out.c, scratch.c_row);
    }
    for (int64_t r = 0; r < l.window.kernel_h; ++r) runs[r] = r * f.row;
    g.terms = count;
    g.runs = {static_cast<int>(l.window.kernel_h), l.window.kernel_w * l.in.c, runs};
    g.row = scratch.row;
    g.m = samples * pixels;
    g.n = l.out.c;
    g.c = y + s * size(l.out);
    g.c_row = scratch.c_row;
    g.bias = bias;
    gather_product(g);
  }
}

template <class T>
void transposed_weights(const Layer& l, const T* w, T* out) {
  if (is_winograd(l)) return winograd_transposed_weights(l, w, out);
  each_parity_class(l, [&](const ParityClass& p) { out = class_weights(l, p, w, out); });
}

template <class T>
void input_gradient(const Layer& l, const Term<T>* terms, int count, bool add, T* grad_x, T* memory) {
  if (is_winograd(l)) return winograd_input_gradient(l, terms, count, add, grad_x, memory);
  int64_t runs[kMostKernelRows], taken = 0;  // of the transposed weights, by the classes so far
  each_parity_class(l, [&](const ParityClass& p) {
    const Frame frame = p.frame();
    const int64_t frame_elements = p.reached() ? frame.h * frame.w * l.out.c : 0;
    const int64_t positions = p.rows.positions * p.columns.positions;
    const int64_t group = group_of(l.n, std::max(frame_elements, size(l.in)));
    const Scratch<T> scratch(memory, group, positions, frame_elements);
    for (int64_t s = 0; s < l.n; s += group) {
      const int64_t samples = std::min(group, l.n - s);
      Gather<T> g{};
      Framed<T> f{};
      if (p.reached()) {
        for (int t = 0; t < count; ++t) {
          f = framed(terms[t].a + s * size(l.out), samples, l.out, frame, scratch.frame[t]);
          g.term[t] = {f.base, terms[t].b + taken};
        }
        g.terms = count;
        for (int64_t u = 0; u < p.rows.taps; ++u) runs[u] = u * f.row;
        g.runs = {static_cast<int>(p.rows.taps), p.columns.taps * l.out.c, runs};
      }
      if (s == 0) {
        fill_offsets(samples, p.rows.positions, p.columns.positions, 0, f.sample, f.row, l.out.c,
                     scratch.row);
        fill_offsets(samples, p.rows.positions, p.columns.positions,
                     (p.rows.first * l.in.w + p.columns.first) * l.in.c, size(l.in),
                     l.window.stride_h * l.in.w * l.in.c, l.window.stride_w * l.in.c, scratch.c_row);
      }
      g.row = scratch.row;
      g.m = samples * positions;
      g.n = l.in.c;
      g.c = grad_x + s * size(l.in);
      g.c_row = scratch.c_row;
      g.add = add;
      gather_product(g);
    }
    taken += p.rows.taps * p.columns.taps * l.in.c * l.out.c;
  });
}

template <class T>
WeightGradient<T>::WeightGradient(const Layer& l, bool add, T* grad_w, T* room)
    : l_(l),
      add_(add),
      started_(add && !is_winograd(l)),
      grad_w_(grad_w),
      sums_(is_winograd(l) ? room : grad_w) {}

template <class T>
void WeightGradient<T>::sum(const Layer& l, const Term<T>* terms, int count, T* memory) {
  const bool add = std::exchange(started_, true);
  if (is_winograd(l)) return winograd_weight_sums(l, terms, count, add, sums_, memory);
  const Frame frame = frame_of(l.window, l.out);
  const int64_t frame_elements = frame.h * frame.w * l.in.c, pixels = l.out.h * l.out.w;
  const int64_t group = group_of(l.n, frame_elements);
  const Scratch<T> scratch(memory, group, pixels, frame_elements);
  int64_t runs[kMostKernelRows];
  for (int64_t s = 0; s < l.n; s += group) {
    const int64_t samples = std::min(group, l.n - s);
    Outer<T> o{};
    Framed<T> f{};
    for (int t = 0; t < count; ++t) {
      f = framed(terms[t].a + s * size(l.in), samples, l.in, frame, scratch.frame[t]);
      o.term[t] = {f.base, terms[t].b + s * size(l.out)};
    }
    if (s == 0) {
      fill_offsets(samples, l.out.h, l.out.w, 0, f.sample, l.window.stride_h * f.row,
                   l.window.stride_w * l.in.c, scratch.row);
    }
    for (int64_t r = 0; r < l.window.kernel_h; ++r) runs[r] = r * f.row;
    o.terms = count;
    o.runs = {static_cast<int>(l.window.kernel_h), l.window.kernel_w * l.in.c, runs};
    o.row = scratch.row;
    o.m = samples * pixels;
    o.n = l.out.c;
    o.d = sums_;
    o.add = add || s > 0;
    outer_product(o);
  }
}

template <class T>
void WeightGradient<T>::finish() const {
  if (is_winograd(l_)) winograd_weight_gradient(l_, sums_, add_, grad_w_);
}

int64_t conv2d_scratch(const Layer& l) {
  if (is_winograd(l)) return winograd_scratch(l);
  const Frame frame = frame_of(l.window, l.out);
  const int64_t frame_elements = frame.h * frame.w * l.in.c;
  int64_t scratch = 2 * group_of(l.n, frame_elements) * (l.out.h * l.out.w + frame_elements);
  each_parity_class(l, [&](const ParityClass& p) {
    const int64_t elements = p.reached() ? p.frame().h * p.frame().w * l.out.c : 0;
    const int64_t group = group_of(l.n, std::max(elements, size(l.in)));
    scratch = std::max(scratch, 2 * group * (p.rows.positions * p.columns.positions + elements));
  });
  return scratch;
}

namespace {

/// Weights of both terms as the products read them, and the rest of the scratch.
template <class T>
struct Memory {
  T *weights[2], *rest;
  Memory(const Layer& l, T* scratch) {
    const int64_t weight = product_weights(l);
    weights[0] = scratch, weights[1] = scratch + weight;
    rest = scratch + 2 * weight;
  }
};

template <class T>
void forward(const Layer& l, const Tensors<T>& t) {
  const Memory<T> memory(l, t.scratch);
  const Term<T> term{t.x[0], forward_weights(l, t.w[0], memory.weights[0])};
  convolve(l, &term, 1, t.w[1], t.y, memory.rest);
}

template <class T>
void give_weight_gradient(const Layer& l, const Term<T>* terms, int count, bool add, T* grad_w, T* scratch) {
  const Memory<T> memory(l, scratch);
  WeightGradient<T> gradient(l, add, grad_w, memory.weights[0]);
  gradient.sum(l, terms, count, memory.rest);
  gradient.finish();
}

template <class T>
void backward(const Layer& l, const Tensors<T>& t) {
  if (t.grad_w[0]) {
    const Term<T> term{t.x[0], t.grad_y};
    give_weight_gradient(l, &term, 1, t.add_w[0], t.grad_w[0], t.scratch);
  }
  if (t.grad_w[1]) column_sums(l.n * l.out.h * l.out.w, l.out.c, t.grad_y, t.add_w[1], t.grad_w[1]);
  if (t.grad_x[0]) {
    const Memory<T> memory(l, t.scratch);
    transposed_weights(l, t.w[0], memory.weights[0]);
    const Term<T> term{t.grad_y, memory.weights[0]};
    input_gradient(l, &term, 1, t.add_x[0], t.grad_x[0], memory.rest);
  }
}

template <class T>
void forward_tangent(const Layer& l, const Tensors<T>& t) {
  const Memory<T> memory(l, t.scratch);
  Term<T> terms[2];
  int count = 0;
  if (t.x_dot[0]) terms[count++] = {t.x_dot[0], forward_weights(l, t.w[0], memory.weights[0])};
  if (t.w_dot[0]) terms[count++] = {t.x[0], forward_weights(l, t.w_dot[0], memory.weights[1])};
  convolve(l, terms, count, t.w_dot[1], t.y_dot, memory.rest);
}

template <class T>
void backward_tangent(const Layer& l, const Tensors<T>& t) {
  if (t.grad_w_dot[0]) {
    const Term<T> terms[2] = {{t.x[0], t.grad_y_dot}, {t.x_dot[0], t.grad_y}};
    const int count = t.x_dot[0] && t.grad_y ? 2 : 1;
    give_weight_gradient(l, terms, count, t.add_w[0], t.grad_w_dot[0], t.scratch);
  }
  if (t.grad_w_dot[1]) {
    column_sums(l.n * l.out.h * l.out.w, l.out.c, t.grad_y_dot, t.add_w[1], t.grad_w_dot[1]);
  }
  if (t.grad_x_dot[0]) {
    const Memory<T> memory(l, t.scratch);
    const bool two = t.w_dot[0] && t.grad_y;
    transposed_weights(l, t.w[0], memory.weights[0]);
    if (two) transposed_weights(l, t.w_dot[0], memory.weights[1]);
    const Term<T> terms[2] = {{t.grad_y_dot, memory.weights[0]}, {t.grad_y, memory.weights[1]}};
    input_gradient(l, terms, two ? 2 : 1, t.add_x[0], t.grad_x_dot[0], memory.rest);
  }
}

}  // namespace

Footprint conv2d_footprint(const Layer& l) { return {0, conv2d_scratch(l) + 2 * product_weights(l)}; }

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
Passes<float> conv2d<float>() {
  return {forward<float>, backward<float>, forward_tangent<float>, backward_tangent<float>};
}
template <>
Passes<double> conv2d<double>() {
  return {forward<double>, backward<double>, forward_tangent<double>, backward_tangent<double>};
}

}  // namespace maml::MAML_ISA
