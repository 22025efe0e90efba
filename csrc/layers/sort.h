// sort: y = the places of the elements of x in ascending order along the last axis of the loops, in
// descending order if the constant a is 1. Equal elements keep their order, and NaN is larger than any
// number. y has no derivative.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

/// Whether p comes before q, where both differ. NaN is larger than any number.
template <class T>
MAML_HOST_DEVICE inline bool sorts_before(bool descends, T p, T q) {
  return descends ? p > q || (p != p && q == q) : p < q || (p == p && q != q);
}

template <>
struct Declaration<Kind::sort> {
  static constexpr const char* name = "sort";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 1, most_inputs = 1;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) { return output_of_loops(node, x); }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) { return work_of_loops(l, 32); }
};

}  // namespace maml
