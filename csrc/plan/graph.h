// A plan as it comes from Python: nodes in topological order over numbered values and parameters, read from
// the user's module, without shapes.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "layers/layer.h"

namespace maml {

/// The call is right, but no fused layer can serve it; the general path can.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// adapted: the inner loop changes it. outer: only the outer loop does. frozen: a constant.
enum class Role { adapted, outer, frozen };

struct Parameter {
  int64_t size;  // elements, of all slots
  int64_t rows,
      taps;  // a weight [rows, size / rows / taps, taps] in the user's order; others: rows = taps = 1
  Role role;
  // How many inner steps have a value of their own. Steps beyond the last slot read the last one. The inner
  // loop changes no parameter of several slots.
  int64_t slots = 1;
};

struct Node {
  Layer layer;                                 // n, in and out are filled in by make_stage
  std::string name;                            // the user's module, for error messages
  std::string norm_name, sum_name, pool_name;  // in a fused chain: its BatchNorm, sum and max-pool
  std::vector<int> inputs;                     // numbers of values; at most kMostInputs
  std::vector<int> parameters;                 // indices; -1: absent; at most kMostParameters
  int64_t in_features = 0;   // channels that the layer's parameters ask of its input; 0: any number
  int64_t out_features = 0;  // channels of its output; 0: as its input
  std::array<int64_t, 2> pad_end{0, 0};      // padding below and to the right (convolution and pools)
  std::vector<SampleLayout> layouts;         // that the layer takes; empty: any
  std::optional<SampleLayout> out_layout{};  // of its output; none: as its input
  std::vector<int64_t> sample;  // group_norm: the shape that it takes, as if it were features; empty: any
};

/// Value 0 is the input; node i writes value i + 1; the last value is the prediction.
struct Graph {
  std::vector<Node> nodes;
  std::vector<Parameter> parameters;
  Loss loss = Loss::cross_entropy;
  Precision precision = Precision::float32;
  bool recompute = false;  // run the gradient pass again for each Hessian-vector product, whatever the memory
};

}  // namespace maml
