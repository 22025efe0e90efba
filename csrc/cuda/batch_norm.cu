// BatchNorm with batch statistics: normalise.h with f the identity and without a pool.
#include "cuda/implement.h"
#include "cuda/normalise_passes.h"

namespace maml::cuda {

template <>
struct OnGpu<Kind::batch_norm> {
  static Footprint footprint(const Layer& l) { return normalise_footprint(l); }
  template <class T>
  static LaunchPasses<T> passes() {
    using Passes = Normalise<Identity>;
    return {Passes::forward<T>, Passes::backward<T>, Passes::forward_tangent<T>, Passes::backward_tangent<T>};
  }
};
template struct Implementation<Kind::batch_norm>;

template <class T>
void batch_norm_from_sums(const Launcher& launch, bool tangent, const Layer& l, const Tensors<T>& t,
                          const CotangentSums<T>& sums) {
  Normalise<Identity>::from_sums(launch, tangent, l, t, sums);
}
template void batch_norm_from_sums(const Launcher&, bool, const Layer&, const Tensors<float>&,
                                   const CotangentSums<float>&);
template void batch_norm_from_sums(const Launcher&, bool, const Layer&, const Tensors<double>&,
                                   const CotangentSums<double>&);

}  // namespace maml::cuda
