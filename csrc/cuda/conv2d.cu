// The passes of a convolution, channels last (a linear layer is one with one tap on a 1 x 1 image): which
// tensors each pass gives to which product. A convolution is bilinear in input and weights, so the tangent of
// each product is the same product of two terms. The twin on the CPU is cpu/conv2d.cpp.
#include <algorithm>

#include "cuda/conv2d.h"
#include "cuda/layers.h"
#include "cuda/product/statistics.h"
#include "layers/patch_gram.h"
#include "plan/plan.h"

namespace maml::cuda {
namespace {

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  Terms<T> terms;
  terms.add(t.x[0], t.w[0]);
  convolve(launch, "conv2d forward", l, terms, t.w[1], t.y, {t.statistics, nullptr});
}

template <class T>
void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  if (t.grad_w[0] || t.grad_w[1]) {
    Terms<T> terms;
    terms.add(t.x[0], t.grad_y);
    weight_gradient(launch, "conv2d weight gradient", l, terms, t.add_w[0], t.add_w[1], t.grad_w[0],
                    t.grad_w[1], t.scratch);
  }
  if (t.grad_x[0]) {
    Terms<T> terms;
    terms.add(t.grad_y, t.w[0]);
    input_gradient(launch, "conv2d input gradient", l, terms, t.add_x[0], t.grad_x[0]);
  }
}

template <class T>
void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  Terms<T> terms;
  if (t.x_dot[0]) terms.add(t.x_dot[0], t.w[0]);
  if (t.w_dot[0]) terms.add(t.x[0], t.w_dot[0]);
  convolve<T>(launch, "conv2d forward tangent", l, terms, t.w_dot[1], t.y_dot, {t.statistics_dot, t.y});
}

template <class T>
void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  if (t.grad_w_dot[0] || t.grad_w_dot[1]) {
    Terms<T> terms;
    terms.add(t.x[0], t.grad_y_dot);
    if (t.x_dot[0] && t.grad_y) terms.add(t.x_dot[0], t.grad_y);
    weight_gradient(launch, "conv2d weight gradient tangent", l, terms, t.add_w[0], t.add_w[1],
                    t.grad_w_dot[0], t.grad_w_dot[1], t.scratch);
  }
  if (t.grad_x_dot[0]) {
    Terms<T> terms;
    terms.add(t.grad_y_dot, t.w[0]);
    if (t.w_dot[0] && t.grad_y) terms.add(t.grad_y, t.w_dot[0]);
    input_gradient(launch, "conv2d input gradient tangent", l, terms, t.add_x[0], t.grad_x_dot[0]);
  }
}

}  // namespace

void refuse_large(const Layer& l) {
  const int64_t weights = patch_size(l.window, l.in) * l.out.c;
  const int64_t elements = std::max({l.n * size(l.in), l.n * size(l.out), l.n * size(l.between), weights});
  if (elements > INT32_MAX ||
      std::max({l.in.h, l.in.w, l.out.h, l.out.w, l.between.h, l.between.w}) > kMostSide) {
    throw Unsupported(
        "a convolution on CUDA expects tensors of less than 2^31 elements a task and images of at most " +
        std::to_string(kMostSide) + " pixels a side, got " + std::to_string(elements) + " elements, " +
        std::to_string(l.in.h) + " x " + std::to_string(l.in.w));
  }
}

Footprint conv2d_footprint(const Layer& l) {
  refuse_large(l);
  return {0, weight_gradient_scratch(l)};
}

int64_t conv2d_statistics_rows(const Layer&) { return kStatisticsRows; }

template <>
LaunchPasses<float> conv2d<float>() {
  return {forward<float>, backward<float>, forward_tangent<float>, backward_tangent<float>};
}
template <>
LaunchPasses<double> conv2d<double>() {
  return {forward<double>, backward<double>, forward_tangent<double>, backward_tangent<double>};
}

}  // namespace maml::cuda
