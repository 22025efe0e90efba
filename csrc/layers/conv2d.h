// conv2d: y = x * w + bias, a convolution (cross-correlation, as in torch) of images [n, h, w, c] with a
// weight [taps, c_in, c_out]. A linear layer is the same with one tap on one pixel.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::conv2d> {
  static constexpr const char* name = "conv2d";
  static constexpr LayerClass layer_class = LayerClass::bilinear;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = true;
  static constexpr bool in_lanes = true, in_megakernel = true;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) {
    Shape y = output_like_input(node, x[0]);
    const Image slid = slide(node.name, node.layer.window, node.pad_end, x[0]);
    y.image.h = slid.h, y.image.w = slid.w;
    return y;
  }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return convolution_work(l, l.out); }
};

}  // namespace maml
