// softmax: y = exp(x) / the sum of exp(x) over the last axis of its loops (loops.h). With s = y:
//   grad_x = s (g - <s, g>),   Ry = s (Rx - <s, Rx>),
//   R{grad_x} = Ry (g - <s, g>) + s (Rg - <Ry, g> - <s, Rg>).
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::softmax> {
  static constexpr const char* name = "softmax";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) { return output_of_loops(node, x); }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return work_of_loops(l, 8); }
};

}  // namespace maml
