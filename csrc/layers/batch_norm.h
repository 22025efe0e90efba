// batch_norm: y = gamma (x - mean) / sqrt(var + eps) + beta, with the mean and the biased variance of each
// channel over all samples and pixels (Ioffe, Szegedy 2015).
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::batch_norm> {
  static constexpr const char* name = "batch_norm";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = true;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t n) {
    check_batch_statistics(node.name, x[0], n);
    return output_like_input(node, x[0]);
  }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return elementwise_work(l); }
};

}  // namespace maml
