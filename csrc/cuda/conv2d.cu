// The passes of a convolution, channels last (a linear layer is one with one tap on a 1 x 1 image): which
// tensors each pass gives to which product. A convolution is bilinear in input and weights, so the tangent of
// each product is the same product of two terms. The twin on the CPU is cpu/conv2d.cpp.
#include <algorithm>

#include "cuda/conv2d.h"
#include "cuda/implement.h"
#include "cuda/normalise_columns.h"
#include "cuda/product/statistics.h"
#include "layers/patch_moments.h"
#include "plan/problem.h"

namespace maml::cuda {
namespace {

template <class T>
Terms<T> terms_of(const Factors<T>* factors, int count) {
  Terms<T> terms;
  for (int i = 0; i < count; ++i) terms.add(factors[i].a, factors[i].b);
  return terms;
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

int64_t conv2d_statistics_rows(const Layer&) { return kStatisticsRows; }

template <>
struct OnGpu<Kind::conv2d> {
  static Footprint footprint(const Layer& l) {
    refuse_large(l);
    return {0, std::max(convolve_scratch(l), gradients_scratch(l))};
  }

  template <class T>
  static void apply(const Launcher& launch, Tangent tangent, const Layer& l, const Factors<T>* factors,
                    int count, const Tensors<T>& t) {
    apply<T>(launch, tangent, l, factors, count, t, nullptr);
  }
  template <class T>
  static void apply(const Launcher& launch, Tangent tangent, const Layer& l, const Factors<T>* factors,
                    int count, const Tensors<T>& t, const Following<T>* following) {
    const Terms<T> terms = terms_of(factors, count);
    if (tangent == Tangent::no) {
      convolve(launch, "conv2d forward", l, terms, t.w[1], t.y, {t.statistics, nullptr}, t.scratch,
               following);
    } else {
      convolve<T>(launch, "conv2d forward tangent", l, terms, t.w_dot[1], t.y_dot, {t.statistics_dot, t.y},
                  t.scratch, following);
    }
  }
  template <class T>
  static CotangentSums<T> adjoint(const Launcher& launch, Tangent tangent, const Layer& l,
                                  const Factors<T>* of_w, int count_w, const Factors<T>* of_x, int count_x,
                                  const Tensors<T>& t, const Normalised<T>* norm = nullptr) {
    const bool dot = tangent == Tangent::yes;
    T* const* grad_w = dot ? t.grad_w_dot : t.grad_w;
    const WeightTerms<T> weight{terms_of(of_w, count_w), t.add_w[0], t.add_w[1], grad_w[0], grad_w[1]};
    const InputTerms<T> input{terms_of(of_x, count_x), t.add_x[0], dot ? t.grad_x_dot[0] : t.grad_x[0]};
    return gradients(launch, dot ? "conv2d gradients tangent" : "conv2d gradients", l, weight, input,
                     t.scratch, norm);
  }
};
template struct Implementation<Kind::conv2d>;

template <class T>
void convolve_and_normalise(const Launcher& launch, const Layer& l, const Tensors<T>& t,
                            const Following<T>& following) {
  const bool tangent = following.tangent;
  Factors<T> factors[2];
  int count = 0;
  if (!tangent) factors[count++] = {t.x[0], t.w[0]};
  if (tangent && t.x_dot[0]) factors[count++] = {t.x_dot[0], t.w[0]};
  if (tangent && t.w_dot[0]) factors[count++] = {t.x[0], t.w_dot[0]};
  OnGpu<Kind::conv2d>::apply(launch, tangent ? Tangent::yes : Tangent::no, l, factors, count, t, &following);
}
template void convolve_and_normalise(const Launcher&, const Layer&, const Tensors<float>&,
                                     const Following<float>&);
template void convolve_and_normalise(const Launcher&, const Layer&, const Tensors<double>&,
                                     const Following<double>&);

template <class T>
CotangentSums<T> gradients_with_sums(const Launcher& launch, bool tangent, const Layer& l,
                                     const Tensors<T>& t, const Normalised<T>& norm) {
  using Conv2d = OnGpu<Kind::conv2d>;
  if (!tangent) {
    const Factors<T> of_w{t.x[0], t.grad_y}, of_x{t.grad_y, t.w[0]};
    return Conv2d::adjoint(launch, Tangent::no, l, &of_w, 1, &of_x, 1, t, &norm);
  }
  const Factors<T> of_w[2] = {{t.x[0], t.grad_y_dot}, {t.x_dot[0], t.grad_y}};
  const Factors<T> of_x[2] = {{t.grad_y_dot, t.w[0]}, {t.grad_y, t.w_dot[0]}};
  return Conv2d::adjoint(launch, Tangent::yes, l, of_w, t.x_dot[0] && t.grad_y ? 2 : 1, of_x,
                         t.w_dot[0] && t.grad_y ? 2 : 1, t, &norm);
}
template CotangentSums<float> gradients_with_sums(const Launcher&, bool, const Layer&, const Tensors<float>&,
                                                  const Normalised<float>&);
template CotangentSums<double> gradients_with_sums(const Launcher&, bool, const Layer&,
                                                   const Tensors<double>&, const Normalised<double>&);

}  // namespace maml::cuda
