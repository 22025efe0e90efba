// conv_block: f(pool(batch_norm(conv2d(x)) + r)), on CPUs only. r is the other input of a residual sum; r, f
// and the max-pool of 2 x 2 pixels are optional; f(u) = u > 0 ? u : a u, and a = 1 is no f.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"
#include "layers/normalised_convolution.h"

namespace maml {

template <>
struct Declaration<Kind::conv_block> {
  static constexpr const char* name = "conv_block";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 1, most_inputs = 2;
  static constexpr bool on_cpu = true, on_cuda = false;
  static constexpr bool mixes_samples = true;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t n) {
    Shape y = normalised_convolution(node, x[0], n);
    if (x.size() > 1) check_sum(node.sum_name, {y.layout, y.between}, x[1]);
    pool_pairs_of(node, y);
    return y;
  }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return convolution_work(l, l.between); }
};

}  // namespace maml
