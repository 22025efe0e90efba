// parameter: a parameter of the plan as a value of the task, in the order of elements that Packing gives it.
// It is the parameter's own memory, and computes nothing.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::target> {
  static constexpr const char* name = "target";
  static constexpr LayerClass layer_class = LayerClass::linear;
  static constexpr int fewest_inputs = 0, most_inputs = 0;
  static constexpr bool on_cpu = false, on_cuda = false;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = true, in_megakernel = true;

  static Shape infer(const Node& node, std::span<const Shape>, int64_t) {
    return {SampleLayout::other, node.image};
  }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer&) { return 0; }
};

}  // namespace maml
