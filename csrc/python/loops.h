// The layers on tensors of any shape in a plan from Python (maml_cuda/plan/schema.py).
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "layers/node.h"

namespace maml {

/// Reads Node.loops, Node.slides, Node.axis and Node.instructions. Throws std::invalid_argument where a view
/// leaves its operand.
void read_loops(pybind11::handle loops, pybind11::handle slides, pybind11::handle axis,
                pybind11::handle instructions, const std::string& named_node, Node& node);

/// Reads Node.mask, after its loops. Throws std::invalid_argument where the mask does not fit them.
void read_mask(pybind11::handle mask, const std::string& named_node, Node& node);

Reduction reduction_named(const std::string& name);

}  // namespace maml
