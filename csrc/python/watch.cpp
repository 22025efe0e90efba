#include "python/watch.h"

#include <cstring>
#include <utility>

namespace py = pybind11;

namespace maml {
namespace {

/// What the tuple holds. Items are the keys and values of the dicts, each key before its value, one dict
/// after the other; copies are tuples of the lists' items; places are each owner before its key; attributes
/// are those of the tensors, all names of one tensor after the other.
enum { kSettings, kDicts, kItems, kLists, kCopies, kPlaces, kFound, kTensors, kNames, kAttributes, kParts };

PyObject* at(const py::tuple& watched, int part) { return PyTuple_GET_ITEM(watched.ptr(), part); }

py::object checked(PyObject* found) {
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

bool equal(PyObject* a, PyObject* b) {
  const int same = PyObject_RichCompareBool(a, b, Py_EQ);
  if (same < 0) throw py::error_already_set();
  return same;
}

/// Whether two different objects are ints, floats or strs of exactly this type with the same value. Runs no
/// code of Python.
bool same_value(PyObject* a, PyObject* b) {
  if (Py_TYPE(a) != Py_TYPE(b)) return false;
  if (PyFloat_CheckExact(a)) {
    const double x = PyFloat_AS_DOUBLE(a), y = PyFloat_AS_DOUBLE(b);
    return std::memcmp(&x, &y, sizeof x) == 0;  // not ==, to which -0.0 is 0.0
  }
  return (PyLong_CheckExact(a) || PyUnicode_CheckExact(a)) && equal(a, b);
}

/// Whether it is the very same object, or an equal number or string. Inline, as nearly all objects are the
/// same.
inline bool same(PyObject* a, PyObject* b) { return a == b || same_value(a, b); }

bool same_settings(PyObject* before, const py::tuple& now) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(before); ++i) {
    if (!same(PyTuple_GET_ITEM(before, i), PyTuple_GET_ITEM(now.ptr(), i))) return false;
  }
  return true;
}

bool same_items(PyObject* dicts, PyObject* items) {
  Py_ssize_t count = 0;
  const Py_ssize_t size = PyList_GET_SIZE(items);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(dicts); ++i) {
    PyObject *key, *value;
    for (Py_ssize_t next = 0; PyDict_Next(PyList_GET_ITEM(dicts, i), &next, &key, &value); count += 2) {
      if (count == size || !same(PyList_GET_ITEM(items, count), key)) return false;
      if (!same(PyList_GET_ITEM(items, count + 1), value)) return false;
    }
  }
  return count == size;
}

bool same_lists(PyObject* lists, PyObject* copies) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(lists); ++i) {
    PyObject *list = PyList_GET_ITEM(lists, i), *copy = PyList_GET_ITEM(copies, i);
    if (PyList_GET_SIZE(list) != PyTuple_GET_SIZE(copy)) return false;
    for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(copy); ++j) {
      if (!same(PyTuple_GET_ITEM(copy, j), PyList_GET_ITEM(list, j))) return false;
    }
  }
  return true;
}

/// Stands for what is absent from a place.
PyObject* absent() {
  static PyObject* const object = PyObject_CallNoArgs(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  return object;
}

py::object borrowed(PyObject* found) {
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(found ? found : absent());
}

/// What is found at a place, or `absent()`.
py::object found_at(PyObject* owner, PyObject* key) {
  if (PyDict_Check(owner)) return borrowed(PyDict_GetItemWithError(owner, key));
  if (PyType_Check(owner)) return borrowed(_PyType_Lookup(reinterpret_cast<PyTypeObject*>(owner), key));
  PyObject* found = PyCell_Check(owner) ? PyCell_Get(owner) : PyObject_GetAttr(owner, key);
  if (!found && PyErr_Occurred()) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
    PyErr_Clear();
  }
  return found ? py::reinterpret_steal<py::object>(found) : borrowed(nullptr);
}

bool same_places(PyObject* places, PyObject* found) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(found); ++i) {
    const py::object now = found_at(PyList_GET_ITEM(places, 2 * i), PyList_GET_ITEM(places, 2 * i + 1));
    if (!same(PyList_GET_ITEM(found, i), now.ptr())) return false;
  }
  return true;
}

bool same_attributes(PyObject* tensors, PyObject* names, PyObject* values) {
  Py_ssize_t count = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) {
    for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(names); ++j) {
      const py::object value =
          checked(PyObject_GetAttr(PyList_GET_ITEM(tensors, i), PyTuple_GET_ITEM(names, j)));
      if (!equal(value.ptr(), PyList_GET_ITEM(values, count++))) return false;
    }
  }
  return true;
}

/// Whether it is a tensor of exactly this type, without a gradient, whose memory holds what it says.
bool is_plain(PyObject* tensor, PyObject* type) {
  static PyObject* const requires_grad = interned("requires_grad");
  static PyObject* const methods[] = {interned("is_neg"), interned("_is_zerotensor")};
  if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != type) return false;
  if (checked(PyObject_GetAttr(tensor, requires_grad)).ptr() == Py_True) return false;
  for (PyObject* method : methods) {
    if (checked(PyObject_CallMethodNoArgs(tensor, method)).ptr() == Py_True) return false;
  }
  return true;
}

}  // namespace

py::tuple watch(const py::tuple& settings, const py::list& dicts, const py::list& tensors,
                const py::tuple& names, const py::list& lists, const py::list& places) {
  py::list items, copies, flat, found, attributes;
  for (py::handle dict : dicts) {
    for (const auto& [key, value] : py::reinterpret_borrow<py::dict>(dict)) {
      items.append(key);
      items.append(value);
    }
  }
  for (py::handle list : lists) copies.append(checked(PyList_AsTuple(list.ptr())));
  for (py::handle place : places) {
    const auto [owner, key] = place.cast<std::pair<py::object, py::object>>();
    flat.append(owner);
    flat.append(key);
    found.append(found_at(owner.ptr(), key.ptr()));
  }
  for (py::handle tensor : tensors) {
    for (py::handle name : names) attributes.append(checked(PyObject_GetAttr(tensor.ptr(), name.ptr())));
  }
  static_assert(kSettings == 0 && kParts == 10);
  return py::make_tuple(settings, dicts, items, lists, copies, flat, found, tensors, names, attributes);
}

bool unchanged(const py::tuple& watched, const py::tuple& settings) {
  return same_settings(at(watched, kSettings), settings) &&
         same_items(at(watched, kDicts), at(watched, kItems)) &&
         same_lists(at(watched, kLists), at(watched, kCopies)) &&
         same_places(at(watched, kPlaces), at(watched, kFound)) &&
         same_attributes(at(watched, kTensors), at(watched, kNames), at(watched, kAttributes));
}

py::object signature(const py::tuple& watched, const py::tuple& settings, const py::tuple& data,
                     const py::handle& type) {
  static PyObject* const parts[] = {interned("shape"), interned("dtype"), interned("device")};
  if (!unchanged(watched, settings)) return py::none();
  py::tuple signature(3 * data.size());
  size_t count = 0;
  for (py::handle tensor : data) {
    if (!is_plain(tensor.ptr(), type.ptr())) return py::tuple();
    for (PyObject* part : parts) {
      PyTuple_SET_ITEM(signature.ptr(), count++,
                       checked(PyObject_GetAttr(tensor.ptr(), part)).release().ptr());
    }
  }
  return signature;
}

}  // namespace maml
