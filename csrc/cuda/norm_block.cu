// y = pool(f(BatchNorm(x))), the chain after a convolution, with or without the max-pool: the kernels of
// normalise.h for each f.
#include "cuda/implement.h"
#include "cuda/normalise_passes.h"

namespace maml::cuda {
namespace {

template <class T>
LaunchPasses<T> all_passes() {
  return {
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        with_activation(l.function, [&]<Function F>() { Normalise<Activation<F>>::forward(launch, l, t); });
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        with_activation(l.function, [&]<Function F>() { Normalise<Activation<F>>::backward(launch, l, t); });
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        with_activation(l.function,
                        [&]<Function F>() { Normalise<Activation<F>>::forward_tangent(launch, l, t); });
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        with_activation(l.function,
                        [&]<Function F>() { Normalise<Activation<F>>::backward_tangent(launch, l, t); });
      },
  };
}

}  // namespace

template <>
struct OnGpu<Kind::norm_block> {
  static Footprint footprint(const Layer& l) {
    Footprint needs = normalise_footprint(l);
    if (l.pooled) needs.saved += l.n * size(l.out);  // an int32 has no more bytes than a T
    return needs;
  }
  template <class T>
  static LaunchPasses<T> passes() {
    return all_passes<T>();
  }
};
template struct Implementation<Kind::norm_block>;

template <class T>
void norm_block_from_sums(const Launcher& launch, bool tangent, const Layer& l, const Tensors<T>& t,
                          const CotangentSums<T>& sums) {
  if (l.function == Function::relu) {
    Normalise<Activation<Function::relu>>::from_sums(launch, tangent, l, t, sums);
  } else {
    Normalise<Activation<Function::leaky_relu>>::from_sums(launch, tangent, l, t, sums);
  }
}
template void norm_block_from_sums(const Launcher&, bool, const Layer&, const Tensors<float>&,
                                   const CotangentSums<float>&);
template void norm_block_from_sums(const Launcher&, bool, const Layer&, const Tensors<double>&,
                                   const CotangentSums<double>&);

}  // namespace maml::cuda
