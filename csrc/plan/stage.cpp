#include "plan/stage.h"

#include <algorithm>

#include "layers/kinds.h"
#include "layers/registry.h"

namespace maml {
namespace {

/// Whether a layer takes the samples together to a value without.
bool sums_samples(const Graph& graph, const Stage& stage, size_t i) {
  const Node& node = graph.nodes[i];
  return !stage.values[i + 1].samples &&
         std::any_of(node.inputs.begin(), node.inputs.end(), [&](int x) { return stage.values[x].samples; });
}

/// Whether a sample of the output depends on other samples.
bool mixes_samples(const Graph& graph, const Stage& stage, size_t i) {
  return properties(graph.nodes[i].layer.kind).mixes_samples || sums_samples(graph, stage, i);
}

/// Samples go through the layers in tiles if none of them mixes samples.
int64_t tiles_of(const Graph& graph, const Stage& stage, const LayerTraits& traits) {
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    if (mixes_samples(graph, stage, i)) return 1;
  }
  return (stage.n - 1) / traits.tile + 1;
}

/// The layers that take several images a sample; those over loops do not look at images at all.
bool takes_rows(const Node& node) {
  const Kind kind = node.layer.kind;
  return kind == Kind::conv2d || kind == Kind::group_norm || kind == Kind::view || node.loops;
}

/// The shapes of all values; and of each value of the stage its size and whose memory it is.
std::vector<Shape> infer_shapes(const Graph& graph, const std::vector<int64_t>& sample, Stage& stage) {
  const size_t count = graph.nodes.size();
  std::vector<Shape> shapes(count + 1);
  stage.values.resize(count + 1);
  shapes[0] = shape_of(sample);
  stage.values[0].size = size(shapes[0]);
  for (size_t i = 0; i < count; ++i) {
    const Node& node = graph.nodes[i];
    const Properties& kind = properties(node.layer.kind);
    const int given = static_cast<int>(node.inputs.size());
    if (given < kind.fewest_inputs || given > kind.most_inputs) {
      throw std::invalid_argument(node.name + " (" + kind.name + ") expects " +
                                  std::to_string(kind.fewest_inputs) + " to " +
                                  std::to_string(kind.most_inputs) + " inputs, got " + std::to_string(given));
    }
    std::vector<Shape> inputs;
    for (int input : node.inputs) {
      inputs.push_back(shapes[input]);
      if (shapes[input].rows != 1 && !takes_rows(node)) {
        throw std::invalid_argument(node.name + " (" + kind.name + ") takes one image a sample, got " +
                                    std::to_string(shapes[input].rows));
      }
    }
    shapes[i + 1] = kind.infer(node, inputs, stage.n);
    Stage::Value& y = stage.values[i + 1];
    y.size = size(shapes[i + 1]);
    y.samples = shapes[i + 1].samples;
    if (node.layer.kind == Kind::parameter) y.parameter = node.parameters.at(0);
    y.target = node.layer.kind == Kind::target;
    if (y.target) stage.target_width = y.size;
    if (stage.n * y.size > INT32_MAX) {
      throw Unsupported(node.name + " has " + std::to_string(stage.n * y.size) +
                        " values a task; fused are fewer than 2^31");
    }
    const bool view = given > 0 && kind.is_view(inputs[0].image, node.inputs[0] == 0);
    y.root = view ? stage.values[node.inputs[0]].root : static_cast<int>(i) + 1;
  }
  return shapes;
}

/// A flatten into the user's order of elements writes the prediction, which has the shape of its input.
void check_prediction(const Graph& graph, const std::vector<Shape>& shapes, Stage& stage) {
  const Shape& prediction = shapes[graph.nodes[graph.prediction - 1].inputs.at(0)];
  if (prediction.layout == SampleLayout::other) {
    throw Unsupported(
        "a prediction of features, a signal or an image a sample is fused, got one of more axes");
  }
  stage.prediction = axes_of(prediction);
  if (takes_classes(graph.loss) && prediction.layout != SampleLayout::features) {
    throw Unsupported(std::string("the fused ") +
                      (is_policy(graph.loss) ? "categorical policy" : "cross_entropy") +
                      " takes a prediction [n, classes], got samples of shape " + text_of(prediction));
  }
  stage.output = stage.values[graph.prediction].root;
  if (!stage.values[stage.output].samples) {
    throw Unsupported("a prediction for each sample is fused, got one that is the same for all");
  }
}

/// For each value, whether one of these depends on it.
std::vector<bool> leading_to(const Graph& graph, std::vector<int> pending) {
  std::vector<bool> leads(graph.nodes.size() + 1, false);
  while (!pending.empty()) {
    const int value = pending.back();
    pending.pop_back();
    if (leads[value]) continue;
    leads[value] = true;
    if (value == 0) continue;
    const std::vector<int>& inputs = graph.nodes[value - 1].inputs;
    pending.insert(pending.end(), inputs.begin(), inputs.end());
  }
  return leads;
}

/// What is differentiated, and what it depends on.
void find_differentiated(const Graph& graph, bool has_target, Stage& stage) {
  const bool computes = graph.loss == Loss::computed && has_target;
  const int value = computes ? graph.loss_value : graph.prediction;
  stage.differentiated = stage.values[value].root;
  if (computes &&
      (stage.values[stage.differentiated].samples || stage.values[stage.differentiated].size != 1)) {
    throw std::invalid_argument("a computed loss must be one number a task");
  }
  const std::vector<bool> leads = leading_to(graph, {value});
  for (size_t v = 0; v < leads.size(); ++v) {
    if (leads[v]) stage.values[stage.values[v].root].leads = true;
  }
}

/// The layers that compute something, with their shapes, and what each value depends on.
void add_steps(const Graph& graph, Data data, bool has_target, bool y_active,
               const std::vector<Shape>& shapes, Stage& stage) {
  std::vector<int> wanted = {graph.prediction};
  if (has_target && graph.loss == Loss::computed) wanted.push_back(graph.loss_value);
  const std::vector<bool> computed = leading_to(graph, wanted);
  const int64_t samples = (stage.n - 1) / stage.tiles + 1;  // of the largest tile
  const bool fresh = data == Data::per_step_support;
  stage.values[0].stepwise = fresh;
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    const Node& node = graph.nodes[i];
    const int output = static_cast<int>(i) + 1;
    Stage::Value& y = stage.values[output];
    if (y.root != output) continue;
    for (int p : node.parameters) {
      if (p < 0) continue;
      const Parameter& parameter = graph.parameters[p];
      y.active |= parameter.role != Role::frozen;
      y.moving |= parameter.role == Role::adapted;
      y.stepwise |= parameter.slots > 1;
    }
    y.stepwise |= node.layer.kind == Kind::dropout;  // another mask in each inner step
    y.stepwise |= y.target && fresh;
    y.active |= y.target && y_active;
    if (y.parameter >= 0 || y.target || !computed[output]) continue;
    Stage::Step step;
    Layer& layer = step.layer = node.layer;
    layer.precision = graph.precision;
    step.rows = shapes[output].rows;
    layer.n = samples * step.rows;
    if (node.loops) layer.loops = node.loops->data();
    layer.expression = node.expression.get();
    layer.mask = node.mask.get();
    layer.in = shapes[node.inputs[0]].image;
    layer.out = shapes[output].image;
    layer.between = shapes[output].between;
    if (!node.sample.empty()) layer.in = layer.out = {size(layer.in), 1, 1};
    if (layer.groups == 0) layer.groups = layer.in.c;
    step.output = output;
    step.parameters = node.parameters;
    for (int input : node.inputs) {
      const int root = stage.values[input].root;
      const Stage::Value& x = stage.values[root];
      step.inputs.push_back(root);
      y.active |= x.active;
      y.moving |= x.moving;
      y.stepwise |= x.stepwise;
    }
    stage.steps.push_back(std::move(step));
  }
}

/// How often each value is read, by layers and as the prediction.
std::vector<int> count_readers(const Stage& stage) {
  std::vector<int> readers(stage.values.size(), 0);
  for (const Stage::Step& step : stage.steps) {
    for (int input : step.inputs) ++readers[input];
  }
  ++readers[stage.output];
  if (stage.differentiated != stage.output) ++readers[stage.differentiated];
  return readers;
}

/// Finds functions that can be computed in place, over their argument x. The function f must have f'' = 0 and
/// an f' that follows from f(x): then no pass needs x, or the cotangent of f(x), once f is computed. And the
/// layer that writes x must read it in none of its passes, and f must be the only reader of x.
void find_functions_in_place(Stage& stage) {
  const std::vector<int> readers = count_readers(stage);
  std::vector<const Stage::Step*> writer(stage.values.size(), nullptr);
  for (const Stage::Step& step : stage.steps) writer[step.output] = &step;
  for (const Stage::Step& step : stage.steps) {
    const Layer& f = step.layer;
    const int x = step.inputs[0];
    if (f.kind != Kind::pointwise || bends(f.function) || !ascends(f)) continue;
    if (readers[x] != 1 || !writer[x]) continue;
    if (properties(writer[x]->layer.kind).function_in_place) stage.values[x].overwritten_by = step.output;
  }
}

/// Finds the cotangents that are added to. Backward passes run in the reverse order of the steps: the first
/// to reach a cotangent writes it, the others add to it.
void find_added_cotangents(const Graph& graph, Stage& stage) {
  std::vector<bool> value_written(stage.values.size()), parameter_written(graph.parameters.size());
  for (auto step = stage.steps.rbegin(); step != stage.steps.rend(); ++step) {
    if (!stage.values[step->output].leads) continue;
    for (size_t j = 0; j < step->inputs.size(); ++j) {
      const int input = step->inputs[j], parameter = stage.values[input].parameter;
      const auto written =
          parameter < 0 ? value_written.begin() + input : parameter_written.begin() + parameter;
      step->add_x[j] = *written;
      *written = true;
    }
    for (size_t j = 0; j < step->parameters.size(); ++j) {
      if (step->parameters[j] < 0) continue;
      step->add_w[j] = parameter_written[step->parameters[j]];
      parameter_written[step->parameters[j]] = true;
    }
  }
}

}  // namespace

bool combines_samples(const Graph& graph, const Stage& stage) {
  for (size_t i = 0; stage.n > 0 && i < graph.nodes.size(); ++i) {
    const bool of_normalisation = graph.nodes[i].layer.kind == Kind::patch_gram;
    if (!of_normalisation && sums_samples(graph, stage, i)) return true;
  }
  return false;
}

void read_images_unflattened(Graph& graph, const std::vector<int64_t>& sample, int64_t n) {
  auto small = [](const Node& node) {
    return node.layer.kind == Kind::flatten || properties(node.layer.kind).in_megakernel;
  };
  if (std::all_of(graph.nodes.begin(), graph.nodes.end(), small)) return;
  Stage stage;
  stage.n = n;
  const std::vector<Shape> shapes = infer_shapes(graph, sample, stage);
  std::vector<int> uses(graph.parameters.size(), 0);
  for (const Node& node : graph.nodes) {
    for (int p : node.parameters) {
      if (p >= 0) ++uses[p];
    }
  }
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    Node& flatten = graph.nodes[i];
    const int value = static_cast<int>(i) + 1;
    const bool prediction = value == graph.prediction || value == graph.loss_value;
    if (flatten.layer.kind != Kind::flatten || prediction || stage.values[value].root != value) continue;
    const Image image = shapes[flatten.inputs[0]].image;
    auto reads = [&](const Node& node) {
      return std::find(node.inputs.begin(), node.inputs.end(), value) != node.inputs.end();
    };
    auto fits = [&](const Node& node) {
      if (!reads(node)) return true;
      const Window& w = node.layer.window;
      const int p = node.parameters.empty() ? -1 : node.parameters[0];
      return node.layer.kind == Kind::conv2d && w.kernel_h == 1 && w.kernel_w == 1 && p >= 0 &&
             uses[p] == 1 && graph.parameters[p].slots == 1 && graph.parameters[p].taps == 1;
    };
    if (!std::all_of(graph.nodes.begin(), graph.nodes.end(), fits)) continue;
    for (const Node& node : graph.nodes) {
      if (reads(node)) graph.parameters[node.parameters[0]].taps = image.h * image.w;
    }
    flatten.layer.kind = Kind::view;
    flatten.image = shapes[value].image;
    flatten.out_layout = shapes[value].layout;
  }
}

Stage make_stage(const Graph& graph, const std::vector<int64_t>& sample, int64_t n, Data data, Keep keep,
                 bool has_target, const LayerTraits& traits, bool x_active, bool y_active) {
  Stage stage;
  stage.n = n;
  const std::vector<Shape> shapes = infer_shapes(graph, sample, stage);
  stage.tiles = tiles_of(graph, stage, traits);
  check_prediction(graph, shapes, stage);
  find_differentiated(graph, has_target, stage);
  stage.values[0].active = x_active;
  add_steps(graph, data, has_target, y_active, shapes, stage);
  if (traits.in_place) find_functions_in_place(stage);
  find_added_cotangents(graph, stage);
  place_values(stage, data, keep, traits);
  return stage;
}

}  // namespace maml
