// The extension module maml_cuda._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>
#include <vector>

#include "cpu/run/backend.h"
#include "python/bind_episodes.h"
#include "python/bound_call.h"
#include "python/bound_problem.h"
#include "python/watch.h"
#ifdef MAML_CUDA_ARCHITECTURES
#include "python/bound_runner.h"
#endif

namespace py = pybind11;

namespace maml {
namespace {

using Tensors = std::vector<Memory>;
using TargetOf = std::array<Memory, 4>;
using Losses = std::array<Memory, 3>;
using Strides = std::vector<int64_t>;

BoundCall made_call(int64_t tasks, int64_t at_once, Memory workspace, Tensors parameters, Tensors rates,
                    TargetOf support, TargetOf query, Memory task_weights, Memory query_weights,
                    Losses losses, Memory logits, Memory gradient, Strides parameter_strides, Tensors given,
                    Strides given_strides, Tensors per_task, Memory state, int64_t kept, bool prepared,
                    uint64_t seed, int64_t first_step, Memory support_counts, Memory query_counts,
                    Memory data_gradient) {
  return {tasks,
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
          prepared,
          seed,
          first_step,
          support_counts,
          query_counts,
          data_gradient};
}

/// Defines what takes the arguments of made_call.
template <class Define>
void with_call_arguments(Define define) {
  define(py::arg("tasks"), py::arg("at_once"), py::arg("workspace"), py::arg("parameters"),
         py::arg("rates") = Tensors{}, py::arg("support") = TargetOf{}, py::arg("query") = TargetOf{},
         py::arg("task_weights") = Memory{}, py::arg("query_weights") = Memory{},
         py::arg("losses") = Losses{}, py::arg("logits") = Memory{}, py::arg("gradient") = Memory{},
         py::kw_only(), py::arg("parameter_strides") = Strides{}, py::arg("given") = Tensors{},
         py::arg("given_strides") = Strides{}, py::arg("per_task") = Tensors{}, py::arg("state") = Memory{},
         py::arg("kept") = 0, py::arg("prepared") = false, py::arg("seed") = uint64_t{0},
         py::arg("first_step") = 0, py::arg("support_counts") = Memory{}, py::arg("query_counts") = Memory{},
         py::arg("data_gradient") = Memory{});
}

/// `run` as a function of its other arguments and of those of the call, so that making a call and running it
/// takes Python one crossing into C++.
template <class Owner, class... Others, class... Arguments>
auto running(void (Owner::*run)(const BoundCall&, Others...) const, BoundCall (*make)(Arguments...)) {
  return [run, make](const Owner& owner, Others... others, Arguments... arguments) {
    (owner.*run)(make(std::move(arguments)...), others...);
  };
}

}  // namespace
}  // namespace maml

PYBIND11_MODULE(MAML_CUDA_MODULE, m) {
  using maml::BoundProblem;
  m.doc() = "The fused core of maml_cuda: plans, and the calls that run them.";
  py::register_local_exception<maml::Unsupported>(m, "Unsupported", PyExc_ValueError);

  py::class_<maml::BoundCall> call(m, "Call", py::module_local(),
                                   "The dense tensors of one call; None says absent.");
  maml::with_call_arguments([&](auto... arguments) {
    call.def(
        py::init(&maml::made_call), arguments...,
        "support, query: x, and what its loss compares: y, scale, old_log_probs. given: the cotangents of "
        "a backward, or directions. losses: loss, task_losses, support_losses. at_once: tasks at the same "
        "time. state: workspaces of the first `kept` tasks of a kept_fisher; prepared: an earlier call has "
        "filled them. seed, first_step: of random masks: the seed of the call, and the number of its first "
        "inner step. support_counts, query_counts: int64 [tasks], on the CPU: how many samples of a task "
        "are its set; the others, behind them, are padding. data_gradient: zeros [tasks, data_size], for the "
        "gradients of data.");
  });

  py::class_<BoundProblem> problem(m, "Problem", py::module_local());
  problem
      .def(py::init<py::handle, const std::string&, const std::vector<int64_t>&, int64_t, int64_t, int, bool,
                    bool, const std::vector<int>&, bool>(),
           py::arg("plan"), py::arg("operation"), py::arg("sample"), py::arg("n_support"), py::arg("n_query"),
           py::arg("steps"), py::arg("first_order"), py::arg("double"),
           py::arg("query_steps") = std::vector<int>{}, py::arg("weighted") = false)
      .def_property_readonly("prediction", &BoundProblem::prediction, "Shape of one sample's prediction.")
      .def_property_readonly("saved_steps", &BoundProblem::saved_steps,
                             "Inner steps whose state is kept for the products; 1: it is computed again.")
      .def("workspace", &BoundProblem::workspace, py::arg("tasks"), py::arg("at_once"),
           "Elements of workspace on the CPU.")
      .def_property_readonly(
          "support_sets", [](const BoundProblem& p) { return p.problem().support_sets(); },
          "Support sets of a task: one for each inner step, or one.")
      .def_property_readonly(
          "loss_columns", [](const BoundProblem& p) { return p.problem().loss_columns(); },
          "Of support_losses: the inner steps and, of an implicit gradient, its residual.")
      .def_property_readonly("combines_samples", &BoundProblem::combines_samples,
                             "Whether samples are combined otherwise than by a normalisation.")
      .def_property_readonly(
          "data_places",
          [](const BoundProblem& p) {
            const maml::Problem& of = p.problem();
            return std::array{of.x_support_at, of.y_support_at,       of.x_query_at,
                              of.y_query_at,   of.weights_support_at, of.data_size};
          },
          "Where the gradients of x_spt, y_spt, x_qry, y_qry and spt_weights start in a task's part of "
          "data_gradient, and its size.")
      .def_property_readonly("in_lanes", &BoundProblem::in_lanes,
                             "Whether a CPU may run several tasks side by side.")
      .def_property_readonly("task_size", &BoundProblem::task_size, "Elements of a kept task's state.");
  maml::with_call_arguments([&](auto... arguments) {
    problem.def("run", maml::running(&BoundProblem::run, &maml::made_call), arguments...,
                "Runs a call on the CPU. The arguments are those of Call.");
  });

#ifdef MAML_CUDA_ARCHITECTURES
  using maml::BoundRunner;
  py::class_<maml::cuda::CudaGraph>(m, "CudaGraph", py::module_local());
  py::class_<BoundRunner> runner(m, "CudaRunner", py::module_local(),
                                 "A problem on one CUDA device; every call is enqueued on a stream.");
  runner.def(py::init<const BoundProblem&, int>(), py::arg("problem"), py::arg("device"))
      .def_property_readonly("executor", &BoundRunner::executor)
      .def("workspace", &BoundRunner::workspace, py::arg("tasks"), py::arg("at_once"),
           "Elements of workspace.")
      .def("table_bytes", &BoundRunner::table_bytes, py::arg("call"))
      .def("capture", &BoundRunner::capture, py::arg("call"), py::arg("table"));
  maml::with_call_arguments([&](auto... arguments) {
    runner.def("run", maml::running(&BoundRunner::run, &maml::made_call), py::arg("stream"), arguments...);
    runner.def("run_graph", maml::running(&BoundRunner::run_graph, &maml::made_call), py::arg("graph"),
               py::arg("stream"), arguments...);
  });
  m.attr("cuda") = MAML_CUDA_TOOLKIT;
  m.attr("cuda_architectures") = MAML_CUDA_ARCHITECTURES;
#else
  m.attr("cuda") = py::none();
  m.attr("cuda_architectures") = "";
#endif
  maml::bind_episodes(m);
  m.def(
      "watch", &maml::watch, py::arg("settings"), py::arg("dicts"), py::arg("tensors"), py::arg("names"),
      py::arg("lists") = py::list(), py::arg("places") = py::list(),
      "The state that a plan was made for. settings: objects that must stay the same. dicts, lists: their "
      "contents must stay the same. tensors, names: the tensors' attributes of these names must stay equal. "
      "places: pairs (owner, key) of which what is found there must stay the same.");
  m.def("unchanged", &maml::unchanged, py::arg("watched"), py::arg("settings"),
        "Whether nothing has changed.");
  m.def("signature", &maml::signature, py::arg("watched"), py::arg("settings"), py::arg("data"),
        py::arg("type"),
        "None if something has changed. Else shape, dtype and device of each tensor, one after the other; () "
        "unless each is of exactly the type, requires no grad, and its memory holds what it says.");
  m.def("instruction_sets", &maml::cpu::instruction_sets, "Instruction sets in this build, widest first.");
  m.def("cpu_isa", [] { return maml::cpu::backend().isa; }, "The instruction set in use.");
  m.attr("version") = MAML_CUDA_VERSION;
  m.attr("compiler") = MAML_CUDA_COMPILER;
}
