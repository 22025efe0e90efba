// patch_gram: the moments of a constant image's patches (patch_moments.h), one for all samples of a task.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"
#include "layers/patch_moments.h"

namespace maml {

template <>
struct Declaration<Kind::patch_gram> {
  static constexpr const char* name = "patch_gram";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) {
    Shape y = output_like_input(node, x[0]);
    y.between = slide(node.name, node.layer.window, node.pad_end, x[0]);
    y.between.c = y.image.c;
    y.image = {patch_gram_size(patch_size(node.layer.window, x[0].image)), 1, 1};
    y.samples = false;
    return y;
  }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) {
    const int64_t patch = patch_size(l.window, l.in);
    return l.n * l.between.h * l.between.w * patch * patch;
  }
};

}  // namespace maml
