// move: y = parts of x_0, x_1, ..., each to its place in y, which is 0 elsewhere (loops.h). It serves what a
// view cannot: concatenation, padding, and the copy into an order of elements that a layer needs.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::move> {
  static constexpr const char* name = "move";
  static constexpr LayerClass layer_class = LayerClass::linear;
  static constexpr int fewest_inputs = 1, most_inputs = kMostInputs;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) { return output_of_loops(node, x); }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return work_of_loops(l, 4); }
};

}  // namespace maml
