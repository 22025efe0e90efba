// flatten: the layers' [n, h, w, c] to features [n, c h w] in the user's order.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::flatten> {
  static constexpr const char* name = "flatten";
  static constexpr LayerClass layer_class = LayerClass::linear;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) {
    Shape y = output_like_input(node, x[0]);
    const int64_t features = size(x[0].image);
    if (node.out_features != 0 && node.out_features != features) {
      throw Unsupported(node.name + " reshapes samples of shape " + text_of(x[0]) + " into rows of " +
                        std::to_string(node.out_features) + ", which mixes samples");
    }
    y.image = {features, 1, 1};
    return y;
  }
  static bool is_view(const Image& x, bool plan_input) { return plan_input || has_one_order(x); }
  static int64_t work(const Layer& l) { return elementwise_work(l); }
};

}  // namespace maml
