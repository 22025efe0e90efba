// The extension module maml_cuda._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "cpu/run/backend.h"
#include "python/bind_episodes.h"
#include "python/bound_call.h"
#include "python/bound_problem.h"
#include "python/watch.h"
#ifdef MAML_CUDA_ARCHITECTURES
#include "python/bound_runner.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(MAML_CUDA_MODULE, m) {
  using maml::BoundProblem;
  m.doc() = "The fused core of maml_cuda: plans, and the calls that run them.";
  py::register_local_exception<maml::Unsupported>(m, "Unsupported", PyExc_ValueError);

  using maml::BoundCall;
  using maml::Memory;
  using Tensors = std::vector<Memory>;
  using Target = std::array<Memory, 4>;
  using Losses = std::array<Memory, 3>;
  using Strides = std::vector<int64_t>;
  py::class_<BoundCall>(m, "Call", py::module_local(), "The dense tensors of one call; None says absent.")
      .def(
          py::init([](int64_t tasks, int64_t at_once, Memory workspace, Tensors parameters, Tensors rates,
                      Target support, Target query, Memory task_weights, Memory query_weights, Losses losses,
                      Memory logits, Memory gradient, Strides parameter_strides, Tensors given,
                      Strides given_strides, Tensors per_task, Memory state, int64_t kept, bool prepared) {
            return BoundCall{tasks,
                             at_once,
                             workspace,
                             std::move(parameters),
                             std::move(rates),
                             support,
                             query,
                             task_weights,
                             query_weights,
                             losses,
                             logits,
                             gradient,
                             std::move(parameter_strides),
                             std::move(given),
                             std::move(given_strides),
                             std::move(per_task),
                             state,
                             kept,
                             prepared};
          }),
          py::arg("tasks"), py::arg("at_once"), py::arg("workspace"), py::arg("parameters"),
          py::arg("rates") = Tensors{}, py::arg("support") = Target{}, py::arg("query") = Target{},
          py::arg("task_weights") = Memory{}, py::arg("query_weights") = Memory{},
          py::arg("losses") = Losses{}, py::arg("logits") = Memory{}, py::arg("gradient") = Memory{},
          py::kw_only(), py::arg("parameter_strides") = Strides{}, py::arg("given") = Tensors{},
          py::arg("given_strides") = Strides{}, py::arg("per_task") = Tensors{}, py::arg("state") = Memory{},
          py::arg("kept") = 0, py::arg("prepared") = false,
          "support, query: x, and what its loss compares: y, scale, old_log_probs. given: the cotangents of "
          "a backward, or directions. losses: loss, task_losses, support_losses. at_once: tasks at the same "
          "time. state: workspaces of the first `kept` tasks of a kept_fisher; prepared: an earlier call has "
          "filled them.");

  py::class_<BoundProblem>(m, "Problem", py::module_local())
      .def(py::init<py::handle, const std::string&, const std::vector<int64_t>&, int64_t, int64_t, int, bool,
                    bool, const std::vector<int>&>(),
           py::arg("plan"), py::arg("operation"), py::arg("sample"), py::arg("n_support"), py::arg("n_query"),
           py::arg("steps"), py::arg("first_order"), py::arg("double"),
           py::arg("query_steps") = std::vector<int>{})
      .def_property_readonly("prediction", &BoundProblem::prediction, "Shape of one sample's prediction.")
      .def_property_readonly("saved_steps", &BoundProblem::saved_steps,
                             "Inner steps whose state is kept for the products; 1: it is computed again.")
      .def("workspace", &BoundProblem::workspace, py::arg("tasks"), py::arg("at_once"),
           "Elements of workspace on the CPU.")
      .def_property_readonly("in_lanes", &BoundProblem::in_lanes,
                             "Whether a CPU may run several tasks side by side.")
      .def_property_readonly("task_size", &BoundProblem::task_size, "Elements of a kept task's state.")
      .def("run", &BoundProblem::run, py::arg("call"), "Runs the call on the CPU.");

#ifdef MAML_CUDA_ARCHITECTURES
  using maml::BoundRunner;
  py::class_<maml::cuda::CudaGraph>(m, "CudaGraph", py::module_local());
  py::class_<BoundRunner>(m, "CudaRunner", py::module_local(),
                          "A problem on one CUDA device; every call is enqueued on a stream.")
      .def(py::init<const BoundProblem&, int>(), py::arg("problem"), py::arg("device"))
      .def_property_readonly("executor", &BoundRunner::executor)
      .def("workspace", &BoundRunner::workspace, py::arg("tasks"), py::arg("at_once"),
           "Elements of workspace.")
      .def("run", &BoundRunner::run, py::arg("call"), py::arg("stream"))
      .def("table_bytes", &BoundRunner::table_bytes, py::arg("call"))
      .def("capture", &BoundRunner::capture, py::arg("call"), py::arg("table"))
      .def("run_graph", &BoundRunner::run_graph, py::arg("call"), py::arg("graph"), py::arg("stream"));
  m.attr("cuda") = MAML_CUDA_TOOLKIT;
  m.attr("cuda_architectures") = MAML_CUDA_ARCHITECTURES;
#else
  m.attr("cuda") = py::none();
  m.attr("cuda_architectures") = "";
#endif
  maml::bind_episodes(m);
  m.def(
      "plain_signature", &maml::plain_signature, py::arg("data"), py::arg("type"),
      "Shape, dtype and device of each tensor, one after the other; None unless each is exactly of the type, "
      "requires no grad, and its memory holds what it says.");
  m.def("same_items", &maml::same_items, py::arg("dicts"), py::arg("items"),
        "Whether the dicts' keys and values, one dict after the other, are the very objects in the list.");
  m.def("same_attributes", &maml::same_attributes, py::arg("objects"), py::arg("names"), py::arg("values"),
        "Whether the objects' attributes, all names of one object after the other, equal the list.");
  m.def("instruction_sets", &maml::cpu::instruction_sets, "Instruction sets in this build, widest first.");
  m.def("cpu_isa", [] { return maml::cpu::backend().isa; }, "The instruction set in use.");
  m.attr("version") = MAML_CUDA_VERSION;
  m.attr("compiler") = MAML_CUDA_COMPILER;
}
