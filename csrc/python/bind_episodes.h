// What Python sees of episodes.h: part of the extension module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "episodes.h"

namespace maml {

inline Episodes bound_episodes(std::uintptr_t images, std::uintptr_t values, bool is_double,
                               const std::array<int64_t, 5>& shape, int64_t rotations, int64_t n_way,
                               int64_t k_shot, int64_t n_query, int64_t seed, int64_t first, int64_t tasks,
                               const std::array<std::uintptr_t, 4>& data) {
  Episodes e{};
  e.images = reinterpret_cast<const uint8_t*>(images);
  e.values = reinterpret_cast<const void*>(values);
  e.is_double = is_double;
  e.classes = shape[0], e.samples = shape[1], e.channels = shape[2], e.height = shape[3], e.width = shape[4];
  e.rotations = rotations;
  e.n_way = n_way, e.k_shot = k_shot, e.n_query = n_query;
  e.seed = seed, e.first = first, e.tasks = tasks;
  e.x = {reinterpret_cast<void*>(data[0]), reinterpret_cast<void*>(data[2])};
  e.y = {reinterpret_cast<int64_t*>(data[1]), reinterpret_cast<int64_t*>(data[3])};
  return e;
}

inline void bind_episodes(pybind11::module_& m) {
  namespace py = pybind11;
  // Local to its module: the tests load two, for GPUs and emulated.
  py::class_<Episodes> episodes(m, "Episodes", py::module_local(),
                                "Episodes to draw, by the addresses of dense tensors.");
  episodes.def(py::init(&bound_episodes), py::kw_only(), py::arg("images"), py::arg("values"),
               py::arg("double"), py::arg("shape"), py::arg("rotations"), py::arg("n_way"), py::arg("k_shot"),
               py::arg("n_query"), py::arg("seed"), py::arg("first"), py::arg("tasks"), py::arg("data"),
               "shape: of the images, 5 numbers. data: x_spt, y_spt, x_qry, y_qry.");
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  episodes.def("draw", &cpu::draw, py::arg("threads"), Unlocked(), "Draws on the CPU.");
#ifdef MAML_CUDA_ARCHITECTURES
  episodes.def(
      "enqueue",
      [](const Episodes& e, int device, std::uintptr_t stream) {
        cuda::draw(e, device, reinterpret_cast<void*>(stream));
      },
      py::arg("device"), py::arg("stream"), Unlocked(), "Draws on a GPU.");
#endif
}

}  // namespace maml
