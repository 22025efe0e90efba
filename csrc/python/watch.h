// What Python asks at every call, so that it must be quick: whether the objects that a plan was made from are
// still the same, and whether data are like those of an earlier call.
#pragma once

#include <pybind11/pybind11.h>

namespace maml {

/// Whether the keys and values of the dicts, each key before its value and one dict after the other, are the
/// very objects in the list.
inline bool same_items(const pybind11::list& dicts, const pybind11::list& items) {
  Py_ssize_t count = 0;
  const Py_ssize_t size = PyList_GET_SIZE(items.ptr());
  for (pybind11::handle dict : dicts) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &key, &value); count += 2) {
      if (count == size || PyList_GET_ITEM(items.ptr(), count) != key) return false;
      if (PyList_GET_ITEM(items.ptr(), count + 1) != value) return false;
    }
  }
  return count == size;
}

/// Whether attributes of the objects, all names of one object after the other, equal those in the list.
inline bool same_attributes(const pybind11::list& objects, const pybind11::tuple& names,
                            const pybind11::list& values) {
  size_t at = 0;
  for (pybind11::handle object : objects) {
    for (pybind11::handle name : names) {
      const auto value =
          pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(object.ptr(), name.ptr()));
      if (!value) throw pybind11::error_already_set();
      const int same = PyObject_RichCompareBool(value.ptr(), PyList_GET_ITEM(values.ptr(), at++), Py_EQ);
      if (same < 0) throw pybind11::error_already_set();
      if (!same) return false;
    }
  }
  return true;
}

/// (shape, dtype, device) of each tensor, one after the other; None unless each is of exactly this type,
/// requires no grad, and its memory holds what it says: it is neither a negation that is still to come nor a
/// zero without memory.
inline pybind11::object plain_signature(const pybind11::tuple& data, const pybind11::handle& type) {
  using pybind11::object;
  const auto interned = [](const char* name) { return PyUnicode_InternFromString(name); };
  static PyObject* const parts[] = {interned("shape"), interned("dtype"), interned("device")};
  static PyObject* const requires_grad = interned("requires_grad");
  static PyObject* const methods[] = {interned("is_neg"), interned("_is_zerotensor")};
  const auto checked = [](PyObject* found) {
    if (!found) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<object>(found);
  };
  pybind11::tuple signature(3 * data.size());
  size_t at = 0;
  for (pybind11::handle tensor : data) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())) != type.ptr()) return pybind11::none();
    if (checked(PyObject_GetAttr(tensor.ptr(), requires_grad)).ptr() == Py_True) return pybind11::none();
    for (PyObject* method : methods) {
      if (checked(PyObject_CallMethodNoArgs(tensor.ptr(), method)).ptr() == Py_True) return pybind11::none();
    }
    for (PyObject* part : parts) {
      PyTuple_SET_ITEM(signature.ptr(), at++, checked(PyObject_GetAttr(tensor.ptr(), part)).release().ptr());
    }
  }
  return signature;
}

}  // namespace maml
