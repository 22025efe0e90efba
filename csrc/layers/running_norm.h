// running_norm: y = gamma (x - mean) / sqrt(var + eps) + beta with given statistics: BatchNorm in eval mode.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::running_norm> {
  static constexpr const char* name = "running_norm";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) {
    return output_like_input(node, x[0]);
  }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return elementwise_work(l); }
};

}  // namespace maml
