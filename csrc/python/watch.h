// What Python asks at every call, so that it must be quick: whether the objects that a plan was made from are
// still the same, and which data the call is given.
#pragma once

#include <pybind11/pybind11.h>

namespace maml {

/// The state of a model that a plan was made for, as a tuple of Python's, so that its garbage collector sees
/// through it.
///
/// settings: objects that must stay the very same, or equal integers.
/// dicts: their keys and values must stay the very same objects, in order.
/// tensors, names: the tensors' attributes of these names must stay equal.
pybind11::tuple watch(const pybind11::tuple& settings, const pybind11::list& dicts,
                      const pybind11::list& tensors, const pybind11::tuple& names);

/// Whether nothing has changed.
bool unchanged(const pybind11::tuple& watched, const pybind11::tuple& settings);

/// None if something has changed. Else the shape, dtype and device of each tensor in `data`, one after the
/// other; an empty tuple unless each is of exactly this type, requires no grad, and its memory holds what it
/// says (it is no negation that is still to come, and no zero without memory).
pybind11::object signature(const pybind11::tuple& watched, const pybind11::tuple& settings,
                           const pybind11::tuple& data, const pybind11::handle& type);

}  // namespace maml
