#include "python/plan.h"

#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <utility>

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
Kind kind_named(const std::string& name) { return named(kKinds, name, "layer"); }
Function function_named(const std::string& name) { return named(kFunctions, name, "function"); }

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
  layer.kind = kind_named(d["kind"].cast<std::string>());
  layer.function = function_named(field<std::string>(d, "function", "relu"));
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

}  // namespace

Operation operation_named(const std::string& name) { return named(kOperations, name, "operation"); }

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

}  // namespace maml
