// view: the same memory, seen as images with channels last (Node::image, Node::rows, Node::out_layout).
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::view> {
  static constexpr const char* name = "view";
  static constexpr LayerClass layer_class = LayerClass::linear;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = false, on_cuda = false;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = true, in_megakernel = true;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) {
    if (node.rows * size(node.image) != size(x[0])) {
      throw std::invalid_argument(node.name + " expects samples of " +
                                  std::to_string(node.rows * size(node.image)) + " elements, got " +
                                  text_of(x[0]));
    }
    Shape y{node.out_layout.value_or(SampleLayout::other), node.image};
    y.samples = x[0].samples;
    y.rows = node.rows;
    return y;
  }
  static bool is_view(const Image&, bool) { return true; }
  static int64_t work(const Layer&) { return 0; }
};

}  // namespace maml
