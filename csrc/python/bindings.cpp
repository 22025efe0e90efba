// The extension module maml_cuda._core: the only file that knows Python. Of tensors, addresses are read;
// ops.py has made them dense, of one type, on one device, and keeps them alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <utility>
#include <variant>

#include "cpu/run/backend.h"
#ifdef MAML_CUDA_ARCHITECTURES
#include "cuda/run/backend.h"
#endif
#include "python/bind_episodes.h"
#include "python/memory.h"
#include "python/watch.h"

namespace py = pybind11;

namespace maml {
namespace {

template <class Enum>
Enum named(const std::map<std::string, Enum>& names, const std::string& name, const char* what) {
  const auto found = names.find(name);
  if (found == names.end()) throw std::invalid_argument(std::string("unknown ") + what + " " + name);
  return found->second;
}

const std::map<std::string, Kind> kKinds = {{"channels_last", Kind::channels_last},
                                            {"flatten", Kind::flatten},
                                            {"conv2d", Kind::conv2d},
                                            {"batch_norm", Kind::batch_norm},
                                            {"running_norm", Kind::running_norm},
                                            {"group_norm", Kind::group_norm},
                                            {"pointwise", Kind::pointwise},
                                            {"max_pool", Kind::max_pool},
                                            {"avg_pool", Kind::avg_pool},
                                            {"mean_pool", Kind::mean_pool},
                                            {"add", Kind::add},
                                            {"append", Kind::append}};
const std::map<std::string, Function> kFunctions = {
    {"relu", Function::relu},         {"leaky_relu", Function::leaky_relu},
    {"elu", Function::elu},           {"silu", Function::silu},
    {"gelu", Function::gelu},         {"gelu_tanh", Function::gelu_tanh},
    {"softplus", Function::softplus}, {"tanh", Function::tanh},
    {"sigmoid", Function::sigmoid},   {"hardtanh", Function::hardtanh}};
const std::map<std::string, Role> kRoles = {
    {"adapted", Role::adapted}, {"outer", Role::outer}, {"frozen", Role::frozen}};
const std::map<std::string, Precision> kPrecisions = {{"float32", Precision::float32},
                                                      {"bf16x3", Precision::bf16x3},
                                                      {"tf32", Precision::tf32},
                                                      {"bfloat16", Precision::bfloat16}};
const std::map<std::string, Loss> kLosses = {{"cross_entropy", Loss::cross_entropy},
                                             {"mse", Loss::mse},
                                             {"gaussian_policy_gradient", Loss::gaussian_policy},
                                             {"categorical_policy_gradient", Loss::categorical_policy}};
const std::map<std::string, Operation> kOperations = {{"meta_gradient", Operation::meta_gradient},
                                                      {"meta_loss", Operation::meta_loss},
                                                      {"adapt", Operation::adapt},
                                                      {"adapt_backward", Operation::adapt_backward},
                                                      {"predict", Operation::predict},
                                                      {"predict_backward", Operation::predict_backward},
                                                      {"loss_and_grad", Operation::loss_and_grad},
                                                      {"hvp", Operation::hvp},
                                                      {"fisher", Operation::fisher},
                                                      {"kept_fisher", Operation::kept_fisher}};

/// A field of a plan's dict, or the default.
template <class V>
V field(const py::dict& d, const char* key, V otherwise) {
  return d.contains(key) ? d[key].cast<V>() : otherwise;
}

template <size_t N>
void read_numbers(const py::dict& d, const char* key, std::array<int, N>& numbers) {
  size_t i = 0;
  for (py::handle value : d[key]) numbers.at(i++) = value.is_none() ? -1 : value.cast<int>();
}

Node node_of(const py::dict& d) {
  Node node{};
  node.name = d["name"].cast<std::string>();
  read_numbers(d, "inputs", node.inputs);
  read_numbers(d, "parameters", node.parameters);
  node.in_features = field<int64_t>(d, "in_features", 0);
  node.out_features = field<int64_t>(d, "out_features", 0);
  for (py::handle rank : field(d, "ranks", py::list())) node.ranks |= 1u << rank.cast<int>();
  node.out_rank = field(d, "out_rank", 0);
  node.sample = field(d, "sample", std::vector<int64_t>());
  Layer& layer = node.layer;
  layer.kind = named(kKinds, d["kind"].cast<std::string>(), "layer");
  layer.function = named(kFunctions, field<std::string>(d, "function", "relu"), "function");
  layer.a = field(d, "a", 0.0);
  layer.b = field(d, "b", 0.0);
  layer.c = field(d, "c", 1.0);
  layer.eps = field(d, "eps", 0.0);
  layer.groups = field<int64_t>(d, "groups", 1);
  layer.count_padding = field(d, "count_padding", true);
  if (d.contains("window")) {  // kernel, stride, padding before, padding after: each (height, width)
    const auto w = d["window"].cast<std::array<std::array<int64_t, 2>, 4>>();
    layer.window = {w[0][0], w[0][1], w[1][0], w[1][1], w[2][0], w[2][1]};
    node.pad_end = w[3];
  }
  return node;
}

Graph graph_of(const py::dict& plan, Operation operation) {
  Graph graph;
  for (py::handle d : plan["nodes"]) graph.nodes.push_back(node_of(d.cast<py::dict>()));
  // The building blocks work at parameters that are the task's own: each of them moves. So does each that is
  // trained in the direction of a Fisher-vector product; the inner loop changes it at a rate of zero.
  const bool own = at_own_parameters(operation), all_trained = is_fisher(operation);
  for (py::handle handle : plan["parameters"]) {
    const auto d = handle.cast<py::dict>();
    Parameter p{d["size"].cast<int64_t>(), d["rows"].cast<int64_t>(), d["taps"].cast<int64_t>(),
                named(kRoles, d["role"].cast<std::string>(), "role"), field<int64_t>(d, "slots", 1)};
    if (own) {  // of one slot, which the caller has chosen; a buffer stays a constant
      p.size /= std::exchange(p.slots, 1);
      if (!field(d, "buffer", false)) p.role = Role::adapted;
    }
    if (all_trained && p.role == Role::outer) {
      if (p.slots > 1)
        throw Unsupported("Fisher-vector products know no parameters with a slot for each step");
      p.role = Role::adapted;
    }
    graph.parameters.push_back(p);
  }
  graph.loss = named(kLosses, plan["loss"].cast<std::string>(), "loss");
  graph.precision = named(kPrecisions, field<std::string>(plan, "precision", "float32"), "precision");
  graph.recompute = field(plan, "recompute", false);
  return graph;
}

std::vector<Rate> rates_of(const py::dict& plan, Operation operation) {
  std::vector<Rate> rates;
  if (at_own_parameters(operation)) return rates;  // no inner loop
  for (py::handle handle : plan["parameters"]) {
    const auto d = handle.cast<py::dict>();
    rates.push_back({field(d, "rate", 0.0), field(d, "rate_tensor", -1), field(d, "per_step", false),
                     field(d, "elementwise", false)});
  }
  return rates;
}

std::vector<RateTensor> rate_tensors_of(const py::dict& plan, Operation operation) {
  std::vector<RateTensor> tensors;
  if (at_own_parameters(operation)) return tensors;
  for (py::handle handle : plan["rate_tensors"]) {
    const auto d = handle.cast<py::dict>();
    tensors.push_back({d["size"].cast<int64_t>(), d["steps"].cast<int64_t>(), field(d, "parameter", -1),
                       d["learned"].cast<bool>() && !is_fisher(operation)});
  }
  return tensors;
}

template <class T>
std::vector<T*> all_as(const std::vector<Memory>& tensors) {
  std::vector<T*> pointers;
  pointers.reserve(tensors.size());
  for (Memory m : tensors) pointers.push_back(m.as<T>());
  return pointers;
}

void check_classes(const std::string& name, const char* what, const int64_t* labels, int64_t tasks, int64_t n,
                   int64_t classes) {
  if (!labels) return;
  for (int64_t i = 0; i < tasks * n; ++i) {
    if (labels[i] >= 0 && labels[i] < classes) continue;
    throw std::invalid_argument(name + " must hold " + what + " in [0, " + std::to_string(classes) +
                                "), got " + std::to_string(labels[i]) + " (task " + std::to_string(i / n) +
                                ", sample " + std::to_string(i % n) + ")");
  }
}

/// The tensors of one call.
struct BoundCall {
  int64_t tasks = 0, at_once = 1;
  Memory workspace;
  std::vector<Memory> parameters;
  std::vector<Memory> rates;
  std::array<Memory, 4> support{}, query{};  // x, and what its loss compares: y, scale, old_log_probs
  Memory task_weights, query_weights;
  std::array<Memory, 3> losses{};  // loss, task_losses, support_losses
  Memory logits, gradient;
  std::vector<int64_t> parameter_strides;
  std::vector<Memory> given;  // the cotangents of a backward or the directions of hvp
  std::vector<int64_t> given_strides;
  std::vector<Memory> per_task;
  Memory state;
  int64_t kept = 0;
  bool prepared = false;

  template <class T>
  Call<T> as() const {
    Call<T> call;
    call.tasks = tasks;
    call.at_once = at_once;
    call.parameters = all_as<const T>(parameters);
    call.parameter_strides = parameter_strides;
    call.rates = all_as<const T>(rates);
    call.x_support = support[0].as<const T>();
    call.y_support = target<T>(support);
    call.x_query = query[0].as<const T>();
    call.y_query = target<T>(query);
    call.task_weights = task_weights.as<const T>();
    call.query_weights = query_weights.as<const T>();
    call.given = all_as<const T>(given);
    call.given_strides = given_strides;
    call.loss = losses[0].as<T>();
    call.task_losses = losses[1].as<T>();
    call.support_losses = losses[2].as<T>();
    call.logits = logits.as<T>();
    call.gradient = gradient.as<T>();
    call.per_task = all_as<T>(per_task);
    call.workspace = workspace.as<T>();
    call.state = state.as<T>();
    call.kept = kept;
    call.prepared = prepared;
    return call;
  }

 private:
  template <class T>
  static Target<T> target(const std::array<Memory, 4>& data) {
    return {data[1].as<const void>(), data[2].as<const T>(), data[3].as<const T>()};
  }
};

LayerTraits traits_of(const std::string& backend) {
  if (backend == "cpu") return cpu::backend().traits;
#ifdef MAML_CUDA_ARCHITECTURES
  if (backend == "cuda") return cuda::traits();
#endif
  throw std::invalid_argument("this build of maml_cuda has no backend " + backend);
}

/// A Problem for one element type and backend, with what Python asks of it.
class BoundProblem {
 public:
  BoundProblem(const py::dict& plan, const std::string& operation, const std::vector<int64_t>& sample,
               int64_t n_support, int64_t n_query, int steps, bool first_order, bool is_double,
               const std::string& backend, const std::vector<int>& query_steps)
      : double_(is_double),
        problem_(graph_of(plan, named(kOperations, operation, "operation")),
                 named(kOperations, operation, "operation"),
                 rates_of(plan, named(kOperations, operation, "operation")),
                 rate_tensors_of(plan, named(kOperations, operation, "operation")), sample, n_support,
                 n_query, steps, first_order, query_steps, is_double ? 8 : 4, traits_of(backend)) {}

  bool is_double() const { return double_; }
  const Problem& problem() const { return problem_; }
  int saved_steps() const { return problem_.saved_steps; }
  const std::vector<int64_t>& prediction() const {
    return problem_.query.n ? problem_.query.prediction : problem_.support.prediction;
  }

  int64_t workspace(int64_t tasks, int64_t at_once) const {
    const cpu::Backend& backend = cpu::backend();
    return (double_ ? backend.workspace_double : backend.workspace_float)(problem_, tasks, at_once);
  }

  int64_t task_size() const { return problem_.task_size(); }
  bool in_lanes() const { return problem_.is_linear() && !problem_.is_tiled(); }

  void run(const BoundCall& call) const {
    if (takes_classes(problem_.graph.loss)) check_classes(call);
    py::gil_scoped_release unlocked;
    if (double_) {
      cpu::backend().run_double(problem_, call.as<double>());
    } else {
      cpu::backend().run_float(problem_, call.as<float>());
    }
  }

 private:
  void check_classes(const BoundCall& call) const {
    const bool policy = is_policy(problem_.graph.loss);
    const std::string field = policy ? ".actions" : "";
    const char* what = policy ? "actions" : "labels";
    const int64_t classes = prediction()[0];
    maml::check_classes((at_own_parameters(problem_.operation) ? "y" : "y_spt") + field, what,
                        call.support[1].as<int64_t>(), call.tasks, problem_.support.n, classes);
    maml::check_classes("y_qry" + field, what, call.query[1].as<int64_t>(), call.tasks, problem_.query.n,
                        classes);
  }

  bool double_;
  Problem problem_;
};

#ifdef MAML_CUDA_ARCHITECTURES

using Address = std::uintptr_t;  // of a stream, or on the device

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

/// A Problem on one CUDA device.
class BoundRunner {
 public:
  BoundRunner(const BoundProblem& problem, int device)
      : runner_(problem.is_double() ? Either(cuda::Runner<double>(problem.problem(), device))
                                    : Either(cuda::Runner<float>(problem.problem(), device))) {}

  const char* executor() const {
    const bool mega =
        std::visit([](const auto& r) { return r.executor() == cuda::Executor::megakernel; }, runner_);
    return mega ? "megakernel" : "batched";
  }
  int64_t workspace(int64_t tasks, int64_t at_once) const {
    return std::visit([&](const auto& r) { return r.workspace(tasks, at_once); }, runner_);
  }
  void run(const BoundCall& call, Address stream) const {
    py::gil_scoped_release unlocked;
    std::visit([&]<class T>(const cuda::Runner<T>& r) { r.run(call.as<T>(), at<void>(stream)); }, runner_);
  }
  int64_t table_bytes(const BoundCall& call) const {
    return std::visit([&]<class T>(const cuda::Runner<T>& r) { return r.table_bytes(call.as<T>()); },
                      runner_);
  }
  cuda::Graph capture(const BoundCall& call, Address table) const {
    py::gil_scoped_release unlocked;
    return std::visit(
        [&]<class T>(const cuda::Runner<T>& r) { return r.capture(call.as<T>(), at<void>(table)); }, runner_);
  }
  void run_graph(const BoundCall& call, const cuda::Graph& graph, Address stream) const {
    py::gil_scoped_release unlocked;
    std::visit([&]<class T>(const cuda::Runner<T>& r) { r.run(call.as<T>(), graph, at<void>(stream)); },
               runner_);
  }

 private:
  using Either = std::variant<cuda::Runner<float>, cuda::Runner<double>>;
  Either runner_;
};

#endif

}  // namespace
}  // namespace maml

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
      .def(py::init<const py::dict&, const std::string&, const std::vector<int64_t>&, int64_t, int64_t, int,
                    bool, bool, const std::string&, const std::vector<int>&>(),
           py::arg("plan"), py::arg("operation"), py::arg("sample"), py::arg("n_support"), py::arg("n_query"),
           py::arg("steps"), py::arg("first_order"), py::arg("double"), py::arg("backend"),
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
  py::class_<maml::cuda::Graph>(m, "CudaGraph", py::module_local());
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
