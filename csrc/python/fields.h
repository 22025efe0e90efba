// A dataclass of maml_cuda/plan/schema.py, read field by field: both sides must have the same fields.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace maml {

class Fields {
 public:
  explicit Fields(pybind11::handle object)
      : object_(pybind11::reinterpret_borrow<pybind11::object>(object)),
        type_(pybind11::type::of(object).attr("__name__").cast<std::string>()) {}

  /// The value of a field.
  /// Throws std::invalid_argument where there is no such field, or its value has another type.
  template <class V>
  V read(const char* name) {
    const pybind11::object value = object(name);
    try {
      return value.cast<V>();
    } catch (const pybind11::cast_error&) {
      throw std::invalid_argument(type_ + "." + name + " has a value that the core cannot read, got " +
                                  pybind11::repr(value).cast<std::string>());
    }
  }
  /// The same, or `otherwise` where the value is None.
  template <class V>
  V read(const char* name, V otherwise) {
    return object(name).is_none() ? otherwise : read<V>(name);
  }
  pybind11::object object(const char* name) {
    read_.insert(name);
    if (!pybind11::hasattr(object_, name)) {
      throw std::invalid_argument(type_ + " must have the field " + name + ", got none");
    }
    return object_.attr(name);
  }

  /// Call it last, with the fields that only Python reads.
  /// Throws std::invalid_argument where the object has a field that was not read.
  void done(const std::set<std::string>& of_python = {}) const {
    for (pybind11::handle key : object_.attr("__dataclass_fields__")) {
      const std::string name = key.cast<std::string>();
      if (!read_.contains(name) && !of_python.contains(name)) {
        throw std::invalid_argument(type_ + " has the field " + name + ", which the core does not know");
      }
    }
  }

 private:
  pybind11::object object_;
  std::string type_;
  std::set<std::string> read_;
};

}  // namespace maml
