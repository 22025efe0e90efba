// y = log(softmax(x)) over the last axis of the loops, for all tasks (softmax.h).
#include "cuda/softmax.h"

namespace maml::cuda {

template <>
struct OnGpu<Kind::log_softmax> {
  static Footprint footprint(const Layer&) { return {}; }
  template <class T>
  static LaunchPasses<T> passes() {
    using P = SoftmaxPasses<LogSoftmax>;
    return {P::template forward<T>, P::template backward<T>, P::template forward_tangent<T>,
            P::template backward_tangent<T>};
  }
};
template struct Implementation<Kind::log_softmax>;

}  // namespace maml::cuda
