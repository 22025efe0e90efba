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

}  // namespace maml::cuda
