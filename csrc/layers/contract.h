// contract: y = the sum of x_0 x_1 over the axes that y does not have (loops.h): a product of matrices, of
// batches of them, or any other einsum of two operands.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::contract> {
  static constexpr const char* name = "contract";
  static constexpr LayerClass layer_class = LayerClass::bilinear;
  static constexpr int fewest_inputs = 2, most_inputs = 2;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) { return output_of_loops(node, x); }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return work_of_loops(l, 1); }
};

}  // namespace maml
