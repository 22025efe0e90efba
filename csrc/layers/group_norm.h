// group_norm: y = gamma (x - mean) / sqrt(var + eps) + beta with the statistics of each group of channels of
// each sample (Wu, He 2018). Layer::groups 0: each channel is a group (InstanceNorm). LayerNorm is one group
// on a sample that is taken as features (Node::sample).
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

template <>
struct Declaration<Kind::group_norm> {
  static constexpr const char* name = "group_norm";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = true;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t n) {
    const Shape y = output_like_input(node, x[0]);
    const Image& image = x[0].image;
    const int64_t pixels = image.h * image.w, groups = node.layer.groups;
    if (groups > 0 && image.c % groups != 0) {
      throw std::invalid_argument(node.name + " expects channels that make " + std::to_string(groups) +
                                  " groups, got samples of shape " + text_of(x[0]));
    }
    // What torch refuses: InstanceNorm of one value, GroupNorm of one value in all samples together.
    const bool single = groups == 0 ? pixels == 1 : n * (image.c / groups) * pixels == 1;
    if (single && node.sample.empty()) {
      throw std::invalid_argument(node.name + " expects more than 1 value per " +
                                  (groups == 0 ? "channel" : "group") + ", got " + std::to_string(n) +
                                  " samples of shape " + text_of(x[0]));
    }
    return y;
  }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return elementwise_work(l); }
};

}  // namespace maml
