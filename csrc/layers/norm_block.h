// norm_block: pool(f(batch_norm(x))), on CUDA only: the chain after a convolution. The max-pool is optional.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::norm_block> {
  static constexpr const char* name = "norm_block";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = false, on_cuda = true;
  static constexpr bool mixes_samples = true;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t n) {
    Shape y = output_like_input(node, x[0]);
    check_batch_statistics(node.name, x[0], n);
    if (node.layer.pooled) {
      const Image slid = slide(node.pool_name, node.layer.window, node.pad_end, x[0]);
      y.image.h = slid.h, y.image.w = slid.w;
    }
    return y;
  }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return elementwise_work(l); }
};

}  // namespace maml
