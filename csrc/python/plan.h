// A plan as Python describes it (maml_cuda/plan/schema.py), translated into the core's types.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "plan/problem.h"

namespace maml {

/// Throws std::invalid_argument for an unknown name.
Operation operation_named(const std::string& name);

/// What the core must know of a plan to carry out one operation.
struct ReadPlan {
  Graph graph;
  std::vector<Update> updates;           // one a parameter; none for an operation without an inner loop
  std::vector<RateTensor> rate_tensors;  // the same
  std::string backend;
};

/// Throws std::invalid_argument where a field is missing, unknown or of another type, or a number in it
/// points nowhere; Unsupported where the core has no such graphs.
ReadPlan read_plan(pybind11::handle plan, Operation operation);

}  // namespace maml
