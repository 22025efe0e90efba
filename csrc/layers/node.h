// One layer of a plan, without shapes.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "layers/loops.h"

namespace maml {

/// The call is valid, but no fused layer serves it; the general path does.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Node {
  Layer layer;                                 // make_stage sets n, in and out
  std::string name;                            // of the user's module, for error messages
  std::string norm_name, sum_name, pool_name;  // in a fused chain: of its BatchNorm, sum and max-pool
  std::vector<int> inputs;                     // numbers of values; at most kMostInputs
  std::vector<int> parameters;                 // indices; -1: absent; at most kMostParameters
  int64_t in_features = 0;   // channels that the layer's parameters require of its input; 0: any number
  int64_t out_features = 0;  // channels of its output; 0: as many as its input
  std::array<int64_t, 2> pad_end{0, 0};      // padding below and to the right (convolution and pools)
  std::vector<SampleLayout> layouts;         // the layouts that the layer accepts; empty: any
  std::optional<SampleLayout> out_layout{};  // the layout of its output; none: that of its input
  std::vector<int64_t> sample;  // group_norm: the shape that it accepts and treats as features; empty: any
  Image image{};                // view: the images that its input is seen as; parameter: {elements, 1, 1}
  int64_t rows = 1;             // view: images in a sample
  // What Layer::loops, Layer::expression and Layer::mask point to.
  std::shared_ptr<const std::vector<Loops>> loops;
  std::shared_ptr<const Expression> expression;
  std::shared_ptr<const Mask> mask;
};

}  // namespace maml
