#include "python/watch.h"

namespace py = pybind11;

namespace maml {
namespace {

/// The places in the tuple. Items are the keys and values of the dicts, each key before its value, one dict
/// after the other; values are the attributes of the tensors, all names of one tensor after the other.
enum { kSettings, kDicts, kItems, kTensors, kNames, kValues, kPlaces };

PyObject* at(const py::tuple& watched, int place) { return PyTuple_GET_ITEM(watched.ptr(), place); }

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

bool same_settings(PyObject* before, const py::tuple& now) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(before); ++i) {
    PyObject *a = PyTuple_GET_ITEM(before, i), *b = PyTuple_GET_ITEM(now.ptr(), i);
    if (a != b && !(PyLong_CheckExact(a) && PyLong_CheckExact(b) && equal(a, b))) return false;
  }
  return true;
}

bool same_items(PyObject* dicts, PyObject* items) {
  Py_ssize_t count = 0;
  const Py_ssize_t size = PyList_GET_SIZE(items);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(dicts); ++i) {
    PyObject *key, *value;
    for (Py_ssize_t next = 0; PyDict_Next(PyList_GET_ITEM(dicts, i), &next, &key, &value); count += 2) {
      if (count == size || PyList_GET_ITEM(items, count) != key) return false;
      if (PyList_GET_ITEM(items, count + 1) != value) return false;
    }
  }
  return count == size;
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
                const py::tuple& names) {
  py::list items, values;
  for (py::handle dict : dicts) {
    for (const auto& [key, value] : py::reinterpret_borrow<py::dict>(dict)) {
      items.append(key);
      items.append(value);
    }
  }
  for (py::handle tensor : tensors) {
    for (py::handle name : names) values.append(checked(PyObject_GetAttr(tensor.ptr(), name.ptr())));
  }
  static_assert(kSettings == 0 && kPlaces == 6);
  return py::make_tuple(settings, dicts, items, tensors, names, values);
}

bool unchanged(const py::tuple& watched, const py::tuple& settings) {
  return same_settings(at(watched, kSettings), settings) &&
         same_items(at(watched, kDicts), at(watched, kItems)) &&
         same_attributes(at(watched, kTensors), at(watched, kNames), at(watched, kValues));
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
