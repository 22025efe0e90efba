// Tensors as the core takes them, by the address of their memory: Python passes the tensor itself.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace maml {

/// Where a tensor's memory is; of None, nowhere.
struct Memory {
  std::uintptr_t address = 0;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(address);
  }
};

}  // namespace maml

namespace pybind11::detail {

template <>
struct type_caster<maml::Memory> {
  PYBIND11_TYPE_CASTER(maml::Memory, const_name("torch.Tensor | None"));

  bool load(handle tensor, bool) {
    value = {};
    if (tensor.is_none()) return true;
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    const auto address = reinterpret_steal<object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
    if (!address) throw error_already_set();
    value.address = PyLong_AsSize_t(address.ptr());
    return true;
  }
  static handle cast(maml::Memory, return_value_policy, handle) { return none().release(); }  // a default
};

}  // namespace pybind11::detail
