// stem: f(pool(batch_norm(conv2d(x)))) of a constant image x, whose moments (patch_gram) are the second
// input. On the CPU f(u) = u > 0 ? u : a u; on CUDA f is Layer::function, where leaky_relu with a = 1 is
// none.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"
#include "layers/normalised_convolution.h"

namespace maml {

template <>
struct Declaration<Kind::stem> {
  static constexpr const char* name = "stem";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 2, most_inputs = 2;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = true;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t n) {
    Shape y = normalised_convolution(node, x[0], n);
    pool_pairs_of(node, y);
    return y;
  }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return convolution_work(l, l.between); }
};

}  // namespace maml
