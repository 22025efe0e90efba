// windows: y = the windows of x over 1 to 3 of its axes, with zeros where a window leaves x (loops.h, Slide).
// A product of y with a weight is a convolution, and an extreme or a sum over the taps is a pool. Where
// windows neither overlap nor leave x, they are a view instead.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::windows> {
  static constexpr const char* name = "windows";
  static constexpr LayerClass layer_class = LayerClass::linear;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) { return output_of_loops(node, x); }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return work_of_loops(l, 4); }
};

}  // namespace maml
