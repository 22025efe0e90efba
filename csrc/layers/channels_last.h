// channels_last: the user's [n, c, h, w] to the layers' [n, h, w, c].
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::channels_last> {
  static constexpr const char* name = "channels_last";
  static constexpr LayerClass layer_class = LayerClass::linear;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) {
    return output_like_input(node, x[0]);
  }
  static bool is_view(const Image& x, bool) { return has_one_order(x); }
  static int64_t work(const Layer& l) { return elementwise_work(l); }
};

}  // namespace maml
