// BatchNorm with batch statistics: normalise.h with f the identity and without a pool.
#include "cuda/normalise.h"

namespace maml::cuda {

Footprint batch_norm_footprint(const Layer& l) { return normalise_footprint(l); }

template <>
LaunchPasses<float> batch_norm<float>() {
  using Passes = Normalise<Identity>;
  return {Passes::forward<float>, Passes::backward<float>, Passes::forward_tangent<float>,
          Passes::backward_tangent<float>};
}
template <>
LaunchPasses<double> batch_norm<double>() {
  using Passes = Normalise<Identity>;
  return {Passes::forward<double>, Passes::backward<double>, Passes::forward_tangent<double>,
          Passes::backward_tangent<double>};
}

}  // namespace maml::cuda
