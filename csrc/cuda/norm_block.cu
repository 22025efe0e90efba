// y = pool(f(BatchNorm(x))), the chain after a convolution, with or without the max-pool: the kernels of
// normalise.h for each f.
#include "cuda/normalise.h"

namespace maml::cuda {
namespace {

template <class T>
LaunchPasses<T> passes() {
  return {
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        with_function(l.function, [&]<Function F>() { Normalise<Activation<F>>::forward(launch, l, t); });
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        with_function(l.function, [&]<Function F>() { Normalise<Activation<F>>::backward(launch, l, t); });
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        with_function(l.function,
                      [&]<Function F>() { Normalise<Activation<F>>::forward_tangent(launch, l, t); });
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        with_function(l.function,
                      [&]<Function F>() { Normalise<Activation<F>>::backward_tangent(launch, l, t); });
      },
  };
}

}  // namespace

Footprint block_footprint(const Layer& l) {
  Footprint needs = normalise_footprint(l);
  if (l.pooled) needs.saved += l.n * size(l.out);  // an int32 each, which is no larger than a T
  return needs;
}

template <>
LaunchPasses<float> block<float>() {
  return passes<float>();
}
template <>
LaunchPasses<double> block<double>() {
  return passes<double>();
}

}  // namespace maml::cuda
