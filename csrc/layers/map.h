// map: y = f(x_0, x_1, ...), element by element, with broadcast operands (loops.h). f is an expression of
// many functions (functions.h, map_functions.h, combinations.h), which a backend computes in one pass.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::map> {
  static constexpr const char* name = "map";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 1, most_inputs = kMostInputs;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) { return output_of_loops(node, x); }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return work_of_loops(l, 4 * l.expression->count); }
};

}  // namespace maml
