// dropout: y = a m x, where m is a random mask of zeros and ones (philox.h) and a number a. Linear, given the
// mask: all four passes multiply by the same one, which follows from the call's seed, the task, the pass, the
// number of the mask and the element (Layer::stream, Layer::mask). An inner step has one mask, in its
// gradient and in its Hessian-vector product.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"
#include "layers/philox.h"

namespace maml {

template <>
struct Declaration<Kind::dropout> {
  static constexpr const char* name = "dropout";
  static constexpr LayerClass layer_class = LayerClass::linear;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) { return output_of_loops(node, x); }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return work_of_loops(l, 8); }
};

/// The numbers of the mask's elements in the loops of a tile.
inline View numbers_of_mask(const Layer& l) {
  View view;
  for (int a = 0; a < l.loops->axes; ++a) {
    view.stride[a] = l.mask->stride[a] * (l.mask->times_samples[a] ? l.stream.samples : 1);
    if (l.loops->size[a] == kSamples) view.offset = l.stream.first_sample * view.stride[a];
  }
  return view;
}

}  // namespace maml
