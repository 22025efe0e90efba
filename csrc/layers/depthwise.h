// depthwise: a convolution of each channel by itself, over 1 to 3 axes of positions:
//
//   y[., p, c] = the sum over the taps t of x[., p stride + t dilation - padding, c] w[t, c], inside of x
//
// The loops (loops.h) are over any axes that x and y share, such as the samples; the positions and the taps
// of each Slide; and the channels, which come last and are contiguous in x, w and y. No windows are stored.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::depthwise> {
  static constexpr const char* name = "depthwise";
  static constexpr LayerClass layer_class = LayerClass::bilinear;
  static constexpr int fewest_inputs = 2, most_inputs = 2;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) {
    check_depthwise(node);
    return output_of_loops(node, x);
  }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return work_of_loops(l, 1); }
};

}  // namespace maml
