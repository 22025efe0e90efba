// gather: y = x_0 at the places x_1 along one of its axes (loops.h, Axis): the rows of an embedding. A place
// outside of that axis gives NaN. y is linear in x_0; x_1 has no derivative.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::gather> {
  static constexpr const char* name = "gather";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 2, most_inputs = 2;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) { return output_of_loops(node, x); }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return work_of_loops(l, 4); }
};

}  // namespace maml
