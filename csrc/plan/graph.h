// A plan as Python builds it from the user's module, without shapes: nodes in topological order, with
// numbered values and parameters.
#pragma once

#include <cstdint>
#include <vector>

#include "layers/node.h"
#include "plan/update.h"

namespace maml {

/// adapted: changed by the inner loop. outer: changed by the outer loop only. frozen: a constant.
enum class Role { adapted, outer, frozen };

struct Parameter {
  int64_t size;  // elements, including all slots
  // Of a weight [rows, size / rows / taps, taps] in the user's order; 1 and 1 of anything else.
  int64_t rows, taps;
  Role role;
  // The number of inner steps that have a value of their own (per-step BatchNorm). Steps beyond the last slot
  // use the last one. The inner loop does not change a parameter with several slots.
  int64_t slots = 1;
};

/// How the gradient of the query loss is taken through the inner loop. reptile: theta - phi_K in its place.
/// implicit: as if phi_K were the minimum of the support loss with proximal / 2 |phi - theta|^2.
enum class Outer { unrolled, reptile, implicit };

struct MetaGradient {
  Outer kind = Outer::unrolled;
  int truncate = 0;         // inner steps, the last ones, that are differentiated through; 0: all
  double proximal = 0;      // implicit: of that term, which is part of the loss of each inner step
  int cg_steps = 0;         // implicit: of the linear system, at most
  double cg_tolerance = 0;  // implicit: they end where the residual has fallen by this factor
};

/// The data of which a meta-gradient also gives the gradient of the query loss. weights_support: those of the
/// samples of the support set.
struct DataGradient {
  bool x_support = false, y_support = false, x_query = false, y_query = false, weights_support = false;
  bool any() const { return x_support || y_support || x_query || y_query || weights_support; }
};

/// Value 0 is the input; node i writes value i + 1.
struct Graph {
  std::vector<Node> nodes;
  int prediction = 0;  // its value, which a flatten writes
  int loss_value = 0;  // of a computed loss
  std::vector<Parameter> parameters;
  Loss loss = Loss::cross_entropy;
  Precision precision = Precision::float32;
  Clip clip;
  bool recompute = false;         // always run the gradient pass again for each Hessian-vector product
  bool segments = false;          // keep every sqrt(steps)-th phi, and run the inner loop again from each
  bool per_step_support = false;  // each inner step has a support set of its own
  DataGradient data_gradient;
  MetaGradient meta_gradient;
};

}  // namespace maml
