// What Python asks at every call, so that it must be quick: whether the objects that a plan was made from are
// still the same, and which data the call is given.
#pragma once

#include <pybind11/pybind11.h>

namespace maml {

/// The state that a plan was made for, as a tuple of Python's, so that its garbage collector sees through it.
///
/// An object stays the same if it is the very same, or an int, float or str of exactly this type with the
/// same value (0.0 and -0.0 are two values).
///
/// settings: objects that must stay the same.
/// dicts, lists: their keys and values, or items, must stay the same, in order.
/// tensors, names: the tensors' attributes of these names must stay equal.
/// places: pairs (owner, key). What is found there must stay the same, or absent: the item of a dict; the
/// content of a closure's cell (the key is ignored); what a class or its bases define by this name, where no
/// descriptor is called; the attribute of any other object.
pybind11::tuple watch(const pybind11::tuple& settings, const pybind11::list& dicts,
                      const pybind11::list& tensors, const pybind11::tuple& names,
                      const pybind11::list& lists, const pybind11::list& places);

/// Whether nothing has changed.
bool unchanged(const pybind11::tuple& watched, const pybind11::tuple& settings);

/// None if something has changed. Else the shape, dtype and device of each tensor in `data`, one after the
/// other; an empty tuple unless each is of exactly this type, requires no grad, and its memory holds what it
/// says (it is no negation that is still to come, and no zero without memory).
pybind11::object signature(const pybind11::tuple& watched, const pybind11::tuple& settings,
                           const pybind11::tuple& data, const pybind11::handle& type);

}  // namespace maml
