// A plan as Python gives it, translated into the core's types.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "plan/plan.h"

namespace maml {

/// Throws std::invalid_argument for an unknown name, as the functions below do.
Operation operation_named(const std::string& name);

/// What the core makes of the plan for one operation.
Graph graph_of(const pybind11::dict& plan, Operation operation);

/// The inner learning rate of each parameter; none for an operation without an inner loop.
std::vector<Rate> rates_of(const pybind11::dict& plan, Operation operation);

/// The tensors that hold inner learning rates; none for an operation without an inner loop.
std::vector<RateTensor> rate_tensors_of(const pybind11::dict& plan, Operation operation);

}  // namespace maml
