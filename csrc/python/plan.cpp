#include "python/plan.h"

#include <array>
#include <map>
#include <optional>
#include <stdexcept>
#include <utility>

#include "layers/functions.h"
#include "layers/kinds.h"
#include "layers/registry.h"
#include "python/fields.h"
#include "python/loops.h"

namespace py = pybind11;

namespace maml {
namespace {

template <class Enum>
Enum named(const std::map<std::string, Enum>& names, const std::string& name, const char* what) {
  const auto found = names.find(name);
  if (found == names.end()) throw std::invalid_argument(std::string("unknown ") + what + " " + name);
  return found->second;
}

const std::map<std::string, SampleLayout> kLayouts = {
    {"features", SampleLayout::features}, {"signal", SampleLayout::signal}, {"image", SampleLayout::image}};
const std::map<std::string, Role> kRoles = {
    {"adapted", Role::adapted}, {"outer", Role::outer}, {"frozen", Role::frozen}, {"buffer", Role::frozen}};
const std::map<std::string, Precision> kPrecisions = {{"float32", Precision::float32},
                                                      {"bf16x3", Precision::bf16x3},
                                                      {"tf32", Precision::tf32},
                                                      {"bfloat16", Precision::bfloat16}};
const std::map<std::string, Loss> kLosses = {{"cross_entropy", Loss::cross_entropy},
                                             {"mse", Loss::mse},
                                             {"gaussian_policy_gradient", Loss::gaussian_policy},
                                             {"categorical_policy_gradient", Loss::categorical_policy},
                                             {"computed", Loss::computed}};
const std::map<std::string, Outer> kOuters = {{"unrolled", Outer::unrolled},
                                              {"truncated", Outer::unrolled},
                                              {"reptile", Outer::reptile},
                                              {"implicit", Outer::implicit}};
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

/// The index of something that the plan holds `count` of.
int index_of(int index, size_t count, const std::string& what) {
  if (index < 0 || static_cast<size_t>(index) >= count) {
    throw std::invalid_argument(what + " must be from 0 to " + std::to_string(count - 1) + ", got " +
                                std::to_string(index));
  }
  return index;
}

void check_most(size_t count, int most, const std::string& what) {
  if (count <= static_cast<size_t>(most)) return;
  throw Unsupported(what + " are " + std::to_string(count) + "; fused layers read at most " +
                    std::to_string(most));
}

void read_window(py::handle object, Node& node) {
  using Pair = std::array<int64_t, 2>;
  Fields window(object);
  const Pair kernel = window.read<Pair>("kernel"), stride = window.read<Pair>("stride");
  const Pair begin = window.read<Pair>("pad_begin");
  node.layer.window = {kernel[0], kernel[1], stride[0], stride[1], begin[0], begin[1]};
  node.pad_end = window.read<Pair>("pad_end");
  window.done();
}

/// Node `number`, which may read the values before its own, of a plan with that many parameters.
Node read_node(py::handle object, size_t number, size_t parameters) {
  Fields fields(object);
  Node node{};
  node.name = fields.read<std::string>("name");
  const std::string named_node = "node " + std::to_string(number) + " (" + node.name + "): ";
  const auto inputs = fields.read<std::vector<int>>("inputs");
  Layer& layer = node.layer;
  layer.kind = kind_named(fields.read<std::string>("kind"));
  if (inputs.empty() && layer.kind != Kind::parameter && layer.kind != Kind::target) {
    throw std::invalid_argument(named_node + "inputs must hold at least 1 value, got 0");
  }
  check_most(inputs.size(), kMostInputs, named_node + "its inputs");
  for (int input : inputs) {
    node.inputs.push_back(index_of(input, number + 1, named_node + "its inputs"));
  }
  const auto read = fields.read<std::vector<std::optional<int>>>("parameters");
  check_most(read.size(), kMostParameters, named_node + "its parameters");
  for (std::optional<int> p : read) {
    node.parameters.push_back(p ? index_of(*p, parameters, named_node + "its parameters") : -1);
  }
  node.in_features = fields.read<int64_t>("in_features", 0);
  node.out_features = fields.read<int64_t>("out_features", 0);
  for (const std::string& layout : fields.read<std::vector<std::string>>("in_layouts")) {
    node.layouts.push_back(named(kLayouts, layout, "layout"));
  }
  if (const auto out = fields.read<std::optional<std::string>>("out_layout")) {
    node.out_layout = named(kLayouts, *out, "layout");
  }
  node.sample = fields.read("sample", std::vector<int64_t>());
  if (const auto function = fields.read<std::optional<std::string>>("function")) {
    layer.function = function_named(*function);
    if (layer.function >= Function::of_maps) {
      throw std::invalid_argument(named_node + "its function is " + *function + ", which only maps have");
    }
  }
  const auto constants = fields.read<std::vector<double>>("constants");
  if (constants.size() > 0) layer.a = constants[0];
  if (constants.size() > 1) layer.b = constants[1];
  if (constants.size() > 2) layer.c = constants[2];
  if (constants.size() > 3) {
    throw Unsupported(named_node + "its constants are " + std::to_string(constants.size()) +
                      "; fused functions have at most 3");
  }
  layer.eps = fields.read("eps", layer.eps);
  layer.groups = fields.read("groups", layer.groups);
  layer.count_padding = fields.read("count_padding", layer.count_padding);
  if (const py::object window = fields.object("window"); !window.is_none()) read_window(window, node);
  if (const auto image = fields.read<std::optional<std::array<int64_t, 3>>>("image")) {
    node.image = {(*image)[0], (*image)[1], (*image)[2]};
  }
  node.rows = fields.read("rows", int64_t{1});
  if (const auto reduction = fields.read<std::optional<std::string>>("reduction")) {
    layer.reduction = reduction_named(*reduction);
  }
  if (const auto cell = fields.read<std::optional<std::string>>("cell")) layer.cell = cell_named(*cell);
  read_loops(fields.object("loops"), fields.object("slides"), fields.object("axis"),
             fields.object("instructions"), named_node, node);
  read_mask(fields.object("mask"), named_node, node);
  fields.done();
  return node;
}

const std::map<std::string, Rule> kRules = {{"sgd", Rule::sgd},         {"adam", Rule::adam},
                                            {"adamw", Rule::adamw},     {"adamax", Rule::adamax},
                                            {"rmsprop", Rule::rmsprop}, {"adagrad", Rule::adagrad}};

const std::map<std::string, Through> kThrough = {
    {"identity", Through::identity}, {"mask", Through::mask}, {"sign", Through::sign}};

Rate read_rate(py::handle object, size_t tensors) {
  if (object.is_none()) return {};
  Fields fields(object);
  Rate rate;
  rate.constant = fields.read("constant", 0.0);
  if (const auto tensor = fields.read<std::optional<int>>("tensor")) {
    rate.slot = index_of(*tensor, tensors, "Hyperparameter.tensor");
  }
  rate.per_step = fields.read<bool>("per_step");
  rate.elementwise = fields.read<bool>("elementwise");
  fields.done();
  return rate;
}

void read_factor(py::handle object, size_t tensors, Rate& value, FactorForm& form) {
  Fields fields(object);
  value.slot = index_of(fields.read<int>("tensor"), tensors, "Factor.tensor");
  form.n = fields.read("size", int64_t{0});
  form.inner = fields.read<int64_t>("inner");
  form.taps = fields.read<int64_t>("taps");
  form.through = named(kThrough, fields.read<std::string>("through"), "through");
  value.elementwise = form.n == 0;
  if (form.n < 0 || form.inner < 1 || form.taps < 1 || form.n % form.taps != 0) {
    throw std::invalid_argument("Factor.size must be a multiple of its taps, got " + std::to_string(form.n));
  }
  fields.done();
}

Update read_update(py::handle object, size_t tensors) {
  if (object.is_none()) return {};
  Fields fields(object);
  Update update;
  update.form.rule = named(kRules, fields.read<std::string>("rule"), "rule");
  update.form.nesterov = fields.read<bool>("nesterov");
  update.form.centered = fields.read<bool>("centered");
  update.form.has_buffer = fields.read<bool>("has_buffer");
  update.form.has_start = fields.read<bool>("has_start");
  update.form.taken = fields.read<int>("taken");
  // One of beta2 and alpha is None.
  const std::pair<const char*, Hyperparameter> names[] = {
      {"rate", kRate},         {"weight_decay", kWeightDecay},
      {"momentum", kMomentum}, {"dampening", kDampening},
      {"beta1", kBeta1},       {"beta2", kBeta2},
      {"alpha", kBeta2},       {"eps", kEps},
      {"lr_decay", kLrDecay}};
  for (const auto& [name, h] : names) {
    const py::object given = fields.object(name);
    if (!given.is_none()) update.hyper[h] = read_rate(given, tensors);
  }
  const auto start = fields.read<std::vector<py::object>>("start");
  if (start.size() != static_cast<size_t>(states_of(update.form))) {
    throw std::invalid_argument("Update.start must hold " + std::to_string(states_of(update.form)) +
                                " states, got " + std::to_string(start.size()));
  }
  for (size_t j = 0; j < start.size(); ++j) update.start[j] = read_rate(start[j], tensors);
  const auto factors = fields.read<std::vector<py::object>>("factors");
  if (factors.size() > kMostFactors) {
    throw std::invalid_argument("Update.factors must be at most " + std::to_string(kMostFactors) + ", got " +
                                std::to_string(factors.size()));
  }
  for (const py::object& factor : factors) {
    const int f = update.factors++;
    read_factor(factor, tensors, update.factor[f], update.factor_form[f]);
  }
  fields.done();
  return update;
}

Parameter read_parameter(Fields& fields, Operation operation) {
  const std::string role = fields.read<std::string>("role");
  Parameter p{fields.read<int64_t>("size"), fields.read<int64_t>("rows"), fields.read<int64_t>("taps"),
              named(kRoles, role, "role"), fields.read<int64_t>("slots")};
  if (p.slots < 1 || p.rows < 1 || p.taps < 1 || p.size < 1 || p.size % (p.slots * p.rows * p.taps) != 0) {
    throw std::invalid_argument("Parameter.size must be a multiple of its slots, rows and taps, got " +
                                std::to_string(p.size));
  }
  // The building blocks run at parameters that each task brings, of one slot that the caller has chosen: all
  // of them can change, but a buffer is a constant.
  if (at_own_parameters(operation)) {
    p.size /= std::exchange(p.slots, 1);
    if (role != "buffer") p.role = Role::adapted;
  }
  // The direction of a Fisher-vector product moves every parameter that is trained. Those that the inner loop
  // leaves alone are adapted at a rate of zero.
  if (is_fisher(operation) && p.role == Role::outer) {
    if (p.slots > 1) {
      throw Unsupported("a Fisher-vector product takes no parameters with a slot for each step");
    }
    p.role = Role::adapted;
  }
  return p;
}

RateTensor read_rate_tensor(py::handle object, size_t parameters, Operation operation) {
  Fields fields(object);
  RateTensor tensor{fields.read<int64_t>("size"), fields.read<int64_t>("steps")};
  if (tensor.steps == 0 ? tensor.size != 0 : tensor.steps < 0 || tensor.size % tensor.steps != 0) {
    throw std::invalid_argument("RateTensor.size must be a multiple of its steps, got " +
                                std::to_string(tensor.size));
  }
  if (const auto parameter = fields.read<std::optional<int>>("parameter")) {
    tensor.parameter = index_of(*parameter, parameters, "RateTensor.parameter");
  }
  tensor.learned = fields.read<bool>("learned") && !is_fisher(operation);
  fields.done();
  return tensor;
}

MetaGradient read_meta_gradient(py::handle object) {
  Fields fields(object);
  MetaGradient gradient{named(kOuters, fields.read<std::string>("kind"), "meta-gradient"),
                        fields.read("truncate", 0), fields.read("proximal", 0.0), fields.read("cg_steps", 0),
                        fields.read("cg_tolerance", 0.0)};
  if (gradient.truncate < 0) {
    throw std::invalid_argument("MetaGradient.truncate must be at least 1 or None, got " +
                                std::to_string(gradient.truncate));
  }
  if ((gradient.kind == Outer::implicit) != (gradient.proximal > 0)) {
    throw std::invalid_argument("MetaGradient.proximal must be above 0 if it is implicit, else None, got " +
                                std::to_string(gradient.proximal));
  }
  fields.done();
  return gradient;
}

DataGradient read_data_gradient(const std::vector<std::string>& names) {
  DataGradient data;
  for (const std::string& name : names) {
    if (name == "x_spt") {
      data.x_support = true;
    } else if (name == "y_spt") {
      data.y_support = true;
    } else if (name == "x_qry") {
      data.x_query = true;
    } else if (name == "y_qry") {
      data.y_query = true;
    } else if (name == "spt_weights") {
      data.weights_support = true;
    } else {
      throw std::invalid_argument("Plan.data_gradient must hold names of data, got " + name);
    }
  }
  return data;
}

/// Whether the factors of transforms have the sizes of their parameters.
void check_factors(const ReadPlan& plan) {
  for (size_t i = 0; i < plan.updates.size(); ++i) {
    const int64_t size = plan.graph.parameters[i].size;
    for (int f = 0; f < plan.updates[i].factors; ++f) {
      const FactorForm& form = plan.updates[i].factor_form[f];
      const RateTensor& tensor = plan.rate_tensors[plan.updates[i].factor[f].slot];
      const bool fits = form.n > 0 ? size % (form.n * form.inner) == 0 && tensor.size == form.n * form.n
                                   : tensor.size == size;
      if (fits) continue;
      throw std::invalid_argument("RateTensor.size must be that of a factor of " + std::to_string(size) +
                                  " elements, got " + std::to_string(tensor.size));
    }
  }
}

}  // namespace

Operation operation_named(const std::string& name) { return named(kOperations, name, "operation"); }

ReadPlan read_plan(py::handle plan, Operation operation) {
  Fields fields(plan);
  ReadPlan found;
  const auto nodes = fields.read<std::vector<py::object>>("nodes");
  const auto parameters = fields.read<std::vector<py::object>>("parameters");
  const auto tensors = fields.read<std::vector<py::object>>("rate_tensors");
  if (nodes.empty()) throw std::invalid_argument("Plan.nodes must hold at least 1 node, got 0");
  for (const py::object& node : nodes) {
    found.graph.nodes.push_back(read_node(node, found.graph.nodes.size(), parameters.size()));
  }
  for (const py::object& parameter : parameters) {
    Fields of_one(parameter);
    found.graph.parameters.push_back(read_parameter(of_one, operation));
    found.updates.push_back(read_update(of_one.object("update"), tensors.size()));
    of_one.done();
  }
  for (const py::object& tensor : tensors) {
    found.rate_tensors.push_back(read_rate_tensor(tensor, parameters.size(), operation));
  }
  check_factors(found);
  if (at_own_parameters(operation)) {
    found.updates.clear();
    found.rate_tensors.clear();
  }
  const auto value = [&](int number) {
    return index_of(number, found.graph.nodes.size() + 1, "Plan's values");
  };
  found.graph.prediction = value(fields.read<int>("prediction"));
  found.graph.loss_value = value(fields.read("loss_value", 0));
  if (found.graph.prediction == 0 ||
      found.graph.nodes[found.graph.prediction - 1].layer.kind != Kind::flatten) {
    throw std::invalid_argument("Plan.prediction must be the value of a flatten, got " +
                                std::to_string(found.graph.prediction));
  }
  found.graph.loss = named(kLosses, fields.read<std::string>("loss"), "loss");
  found.graph.precision = named(kPrecisions, fields.read<std::string>("precision"), "precision");
  found.graph.recompute = fields.read<bool>("recompute");
  found.graph.segments = fields.read<bool>("segments");
  found.graph.meta_gradient = read_meta_gradient(fields.object("meta_gradient"));
  found.graph.per_step_support = fields.read<bool>("per_step_support");
  found.graph.clip.norm = fields.read("clip_norm", found.graph.clip.norm);
  found.graph.clip.value = fields.read("clip_value", found.graph.clip.value);
  found.graph.data_gradient = read_data_gradient(fields.read<std::vector<std::string>>("data_gradient"));
  found.backend = fields.read<std::string>("backend");
  const auto target = fields.read("target", int64_t{0});
  for (const Node& node : found.graph.nodes) {
    if (node.layer.kind != Kind::target || node.image.c == target) continue;
    throw std::invalid_argument("Plan.target must be the width of its node, " + std::to_string(node.image.c) +
                                ", got " + std::to_string(target));
  }
  fields.done({"cuda_graphs", "task_chunk"});
  return found;
}

}  // namespace maml
