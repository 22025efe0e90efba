#include "plan.h"

#include <algorithm>
#include <cstdint>

namespace maml {
namespace {

[[noreturn]] void wrong(const std::string& text) { throw std::invalid_argument(text); }

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

struct Shaped {
  Image image{};
  int rank = 0;  // axes of a sample as the user sees them
};

std::vector<int64_t> dims(const Shaped& s) {
  if (s.rank == 1) return {s.image.c};
  return {s.image.c, s.image.h, s.image.w};
}

int64_t slide(const std::string& name, int64_t in, int64_t kernel, int64_t stride, int64_t before,
              int64_t after, const Shaped& x) {
  const int64_t room = in + before + after - kernel;
  if (room < 0) {
    wrong(name + " has a kernel of " + std::to_string(kernel) + " on an input of " + text_of(dims(x)) +
          " a sample: the input must be at least as large as the kernel");
  }
  return room / stride + 1;
}

/// The output of `node` on `x`, or an exception that names the module.
Shaped infer(const Node& node, const Shaped& x, const Shaped* other, int64_t n) {
  const Layer& layer = node.layer;
  if (node.rank != 0 && x.rank != node.rank) {
    throw Unsupported(node.name + " is fused on " +
                      (node.rank == 1 ? "features [n, features]" : "images [n, channels, height, width]") +
                      ", got samples of shape " + text_of(dims(x)));
  }
  if (node.in_features != 0 && x.image.c != node.in_features) {
    wrong(node.name + " expects " + std::to_string(node.in_features) +
          (x.rank == 1 ? " features" : " channels") + ", got samples of shape " + text_of(dims(x)));
  }
  Shaped y = x;
  if (node.out_rank != 0) y.rank = node.out_rank;
  if (node.out_features != 0) y.image.c = node.out_features;
  const Window& window = layer.window;
  const std::string& sliding = node.pool_name.empty() ? node.name : node.pool_name;
  if (window.kernel_h > kMostKernelRows) {
    throw Unsupported(sliding + " has a kernel of " + std::to_string(window.kernel_h) +
                      " rows; fused are at most " + std::to_string(kMostKernelRows));
  }
  auto slides = [&] {
    y.image.h =
        slide(sliding, x.image.h, window.kernel_h, window.stride_h, window.pad_top, node.pad_end[0], x);
    y.image.w =
        slide(sliding, x.image.w, window.kernel_w, window.stride_w, window.pad_left, node.pad_end[1], x);
  };
  switch (layer.kind) {
    case Kind::conv2d:
    case Kind::max_pool:
    case Kind::avg_pool:
      slides();
      break;
    case Kind::batch_norm:
    case Kind::block:
      if (n * x.image.h * x.image.w == 1) {
        wrong(node.name +
              " expects more than 1 value per channel in batch statistics, got 1 sample of shape " +
              text_of(dims(x)));
      }
      if (layer.pooled) slides();
      break;
    case Kind::mean_pool:
      y.image.h = y.image.w = 1;
      break;
    case Kind::flatten:
      if (node.out_features != 0 && node.out_features != size(x.image)) {
        throw Unsupported(node.name + " reshapes samples of shape " + text_of(dims(x)) + " into rows of " +
                          std::to_string(node.out_features) + ", which mixes samples");
      }
      y.image = {size(x.image), 1, 1};
      break;
    case Kind::add:
      if (x.rank != 1 && x.rank != 3) {
        throw Unsupported("the sum " + node.name + " is fused on features and images, got samples of " +
                          std::to_string(x.rank) + " axes");
      }
      if (other->rank != x.rank || dims(*other) != dims(x)) {
        throw Unsupported("the sum " + node.name + " of samples of shapes " + text_of(dims(x)) + " and " +
                          text_of(dims(*other)) + " broadcasts, which is not fused");
      }
      break;
    case Kind::channels_last:
    case Kind::pointwise:
      break;
  }
  return y;
}

/// Whether the node's output is its input's memory, read differently.
bool moves_nothing(const Node& node, const Image& in, bool reads_input) {
  const bool one_order = in.c == 1 || in.h * in.w == 1;
  if (node.layer.kind == Kind::channels_last) return one_order;
  return node.layer.kind == Kind::flatten && (one_order || reads_input);
}

/// Offsets in one region, first fit: two blocks share memory where their lifetimes do not meet.
class Region {
 public:
  int64_t place(int64_t size, int first, int last) {
    size = whole_lines(size);
    int64_t at = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (const Block& b : blocks_) {
        if (first <= b.last && b.first <= last && at < b.at + b.size && b.at < at + size) {
          at = b.at + b.size;
          moved = true;
        }
      }
    }
    blocks_.push_back({at, size, first, last});
    extent_ = std::max(extent_, at + size);
    return at;
  }
  int64_t extent() const { return extent_; }

 private:
  struct Block {
    int64_t at, size;
    int first, last;
  };
  std::vector<Block> blocks_;
  int64_t extent_ = 0;
};

}  // namespace

Packing::Packing(const std::vector<Parameter>& parameters) : at(parameters.size()) {
  auto append = [&](Role role) {
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (parameters[i].role != role) continue;
      at[i] = total;
      total += whole_lines(parameters[i].size);
    }
  };
  append(Role::adapted);
  adapted = total;
  append(Role::outer);
  trainable = total;
  append(Role::frozen);
}

Graph with_blocks(const Graph& graph) {
  const int count = static_cast<int>(graph.nodes.size());
  std::vector<int> readers(count + 1, 0);
  for (const Node& node : graph.nodes) {
    for (int input : node.inputs) readers[std::max(input, 0)] += input >= 0;
  }
  // Whether node i alone reads node i - 1's value, and is of this kind.
  auto continues = [&](int i, Kind kind) {
    return i < count && graph.nodes[i].layer.kind == kind && graph.nodes[i].inputs[0] == i && readers[i] == 1;
  };
  Graph fused = graph;
  fused.nodes.clear();
  std::vector<int> number(count + 1, 0);  // of a value, in the new graph
  for (int i = 0; i < count; ++i) {
    Node node = graph.nodes[i];
    for (int& input : node.inputs) input = input < 0 ? input : number[input];
    if (node.layer.kind == Kind::batch_norm && continues(i + 1, Kind::pointwise)) {
      Layer& block = node.layer;
      const Layer& f = graph.nodes[++i].layer;
      block.kind = Kind::block;
      block.function = f.function;
      block.a = f.a, block.b = f.b, block.c = f.c;
      if (continues(i + 1, Kind::max_pool)) {
        const Node& pool = graph.nodes[++i];
        block.pooled = true;
        block.window = pool.layer.window;
        node.pad_end = pool.pad_end;
        node.pool_name = pool.name;
      }
    }
    fused.nodes.push_back(node);
    number[i + 1] = static_cast<int>(fused.nodes.size());
  }
  return fused;
}

Stage make_stage(const Graph& graph, const std::vector<int64_t>& sample, int64_t n, Data data, Keep keep,
                 const LayerTraits& traits) {
  const int count = static_cast<int>(graph.nodes.size());
  Stage stage;
  stage.n = n;
  const bool independent = std::none_of(graph.nodes.begin(), graph.nodes.end(), [](const Node& node) {
    return node.layer.kind == Kind::batch_norm || node.layer.kind == Kind::block;
  });
  if (independent) stage.tiles = (n - 1) / traits.tile + 1;  // rounded up, as is what follows
  const int64_t most = (n - 1) / stage.tiles + 1;            // samples of a tile
  stage.values.resize(count + 1);

  // Shapes, and which values share memory.
  std::vector<Shaped> shapes(count + 1);
  Shaped& input = shapes[0];
  input.rank = static_cast<int>(sample.size());
  input.image = {sample.empty() ? 1 : sample[0], sample.size() > 1 ? sample[1] : 1, 1};
  for (size_t i = 2; i < sample.size(); ++i) input.image.w *= sample[i];
  stage.values[0].size = size(input.image);
  for (int i = 0; i < count; ++i) {
    const Node& node = graph.nodes[i];
    const Shaped& x = shapes[node.inputs[0]];
    const Shaped* other = node.inputs[1] < 0 ? nullptr : &shapes[node.inputs[1]];
    shapes[i + 1] = infer(node, x, other, n);
    Stage::Value& y = stage.values[i + 1];
    y.size = size(shapes[i + 1].image);
    if (n * y.size > INT32_MAX) {
      throw Unsupported(node.name + " has " + std::to_string(n * y.size) +
                        " values a task; fused are fewer than 2^31");
    }
    const bool shares = moves_nothing(node, x.image, node.inputs[0] == 0);
    y.root = shares ? stage.values[node.inputs[0]].root : i + 1;
  }
  stage.output = stage.values[count].root;
  // The last node is a flatten into the user's order: its input's shape is the prediction's.
  stage.prediction = dims(shapes[graph.nodes[count - 1].inputs[0]]);
  if (const int rank = shapes[graph.nodes[count - 1].inputs[0]].rank; rank != 1 && rank != 3) {
    throw Unsupported("a prediction of " + std::to_string(rank) +
                      " axes a sample is not fused; of 1 or 3 it is");
  }
  if (graph.loss == Loss::cross_entropy && stage.prediction.size() != 1) {
    throw Unsupported("the fused cross_entropy takes a prediction [n, classes], got samples of shape " +
                      text_of(stage.prediction));
  }

  // What runs, what depends on what, and who is the first to write a cotangent (backwards, so the last to
  // read).
  for (int i = 0; i < count; ++i) {
    const Node& node = graph.nodes[i];
    if (stage.values[i + 1].root != i + 1) continue;
    Stage::Step step;
    step.layer = node.layer;
    step.layer.precision = graph.precision;
    step.layer.n = most;
    step.layer.in = shapes[node.inputs[0]].image;
    step.layer.out = shapes[i + 1].image;
    step.output = i + 1;
    step.parameters = node.parameters;
    step.add_x = step.add_w = {false, false};
    Stage::Value& y = stage.values[i + 1];
    for (int j = 0; j < 2; ++j) {
      step.inputs[j] = node.inputs[j] < 0 ? -1 : stage.values[node.inputs[j]].root;
      if (step.inputs[j] >= 0) {
        y.active |= stage.values[step.inputs[j]].active;
        y.moving |= stage.values[step.inputs[j]].moving;
      }
      if (node.parameters[j] >= 0) {
        const Role role = graph.parameters[node.parameters[j]].role;
        y.active |= role != Role::frozen;
        y.moving |= role == Role::adapted;
      }
    }
    stage.steps.push_back(step);
  }
  std::vector<bool> value_written(count + 1), parameter_written(graph.parameters.size());
  for (auto step = stage.steps.rbegin(); step != stage.steps.rend(); ++step) {
    for (int j = 0; j < 2; ++j) {
      if (step->inputs[j] >= 0) {
        step->add_x[j] = value_written[step->inputs[j]];
        value_written[step->inputs[j]] = true;
      }
      if (step->parameters[j] >= 0) {
        step->add_w[j] = parameter_written[step->parameters[j]];
        parameter_written[step->parameters[j]] = true;
      }
    }
  }

  // Memory. Forward, step i runs at time i; backward, at time 2 * steps - i.
  const int steps = static_cast<int>(stage.steps.size());
  auto back = [&](int i) { return 2 * steps - i; };
  std::vector<int> last_reader(count + 1, 0);
  for (int i = 0; i < steps; ++i) {
    for (int input : stage.steps[i].inputs) {
      if (input >= 0) last_reader[input] = i;
    }
  }
  last_reader[stage.output] = steps;
  Region fixed, step_region, tangent;
  const int forever = 2 * steps + 1;
  const bool products = keep == Keep::products;
  for (int i = 0; i < steps; ++i) {
    Stage::Step& step = stage.steps[i];
    Stage::Value& y = stage.values[step.output];
    const Footprint needs = traits.footprint(step.layer);
    const Layer& l = step.layer;
    stage.work += n * y.size * (l.kind == Kind::conv2d ? l.in.c * l.window.kernel_h * l.window.kernel_w : 4);
    stage.scratch_size = std::max(stage.scratch_size, needs.scratch);
    y.fixed = data == Data::support && !y.moving;
    const bool stays = y.fixed || products;
    Region& region = y.fixed ? fixed : step_region;
    const int first = stays ? 0 : i;
    const int last = stays ? forever : keep == Keep::values ? last_reader[step.output] : back(i);
    y.at = region.place(most * y.size, first, last);
    step.saved_at = region.place(needs.saved, first, !stays && keep == Keep::values ? i : last);
  }
  if (keep != Keep::values) {
    for (int i = steps - 1; i >= 0; --i) {
      const int output = stage.steps[i].output;
      Stage::Value& y = stage.values[output];
      const int written = back(last_reader[output]);
      if (data == Data::support ? y.moving : y.active) {
        y.grad_at = step_region.place(most * y.size, products ? 0 : written, products ? forever : back(i));
      }
      if (!products) continue;
      if (y.moving) y.dot_at = tangent.place(most * y.size, i, back(i));
      if (y.active) y.grad_dot_at = tangent.place(most * y.size, written, back(i));
    }
    stage.loss_at = step_region.place(most * stage.values[stage.output].size, products ? 0 : steps,
                                      products ? forever : steps);
  }
  if (traits.statistics_rows) {
    std::vector<int> readers(count + 1, 0);
    for (const Stage::Step& step : stage.steps) {
      for (int input : step.inputs) readers[std::max(input, 0)] += input >= 0;
    }
    ++readers[stage.output];
    for (int i = 1; i < steps; ++i) {
      const Stage::Step& reader = stage.steps[i];
      const int input = reader.inputs[0];
      const auto writer = std::find_if(stage.steps.begin(), stage.steps.end(),
                                       [&](const Stage::Step& s) { return s.output == input; });
      if (reader.layer.kind != Kind::batch_norm && reader.layer.kind != Kind::block) continue;
      if (writer == stage.steps.end() || writer->layer.kind != Kind::conv2d || readers[input] != 1) continue;
      Stage::Value& y = stage.values[input];
      const int from = static_cast<int>(writer - stage.steps.begin());
      const Image& image = writer->layer.out;
      const int64_t rows = traits.statistics_rows(writer->layer);
      const int64_t tiles = (n * image.h * image.w + rows - 1) / rows;
      y.statistics_at = y.fixed ? fixed.place(tiles * 2 * image.c, 0, forever)
                                : step_region.place(tiles * 2 * image.c, from, i);
      if (y.dot_at != kNowhere) y.statistics_dot_at = tangent.place(tiles * 3 * image.c, from, i);
    }
  }
  stage.fixed_size = fixed.extent();
  stage.step_size = step_region.extent();
  stage.tangent_size = tangent.extent();
  return stage;
}

namespace {

/// Above this much saved state a task, the gradient pass is run again for each Hessian-vector product
/// instead: the bits are the same, the memory does not grow with the steps, and streaming it from memory
/// would cost as much.
constexpr int64_t kSavedBytes = int64_t{192} << 20;

}  // namespace

Problem::Problem(Graph graph_, Operation operation_, std::vector<Rate> rates_,
                 std::vector<RateTensor> rate_tensors_, const std::vector<int64_t>& sample_,
                 int64_t n_support, int64_t n_query, int steps_, bool first_order_, int64_t element_bytes_,
                 const LayerTraits& traits)
    : graph(traits.blocks ? with_blocks(graph_) : std::move(graph_)),
      operation(operation_),
      rates(std::move(rates_)),
      rate_tensors(std::move(rate_tensors_)),
      steps(steps_),
      first_order(first_order_),
      sample(sample_),
      element_bytes(element_bytes_),
      packing(graph.parameters) {
  result_size = packing.trainable;
  for (const RateTensor& rate : rate_tensors) {
    rate_at.push_back(rates_size);
    rates_size += whole_lines(rate.size);
    rate_grad_at.push_back(rate.learned ? result_size : kNowhere);
    if (rate.learned) result_size += whole_lines(rate.size);
  }
  slice_rates();
  support.n = n_support;
  query.n = n_query;
  lay_out(traits);
}

void Problem::lay_out(const LayerTraits& traits) {
  const bool products = second_order() || operation == Operation::hvp;
  const bool query_gradient =
      operation == Operation::meta_gradient || operation == Operation::predict_backward;
  if (support.n > 0) {
    support = make_stage(graph, sample, support.n, Data::support, products ? Keep::products : Keep::gradient,
                         traits);
  }
  if (query.n > 0) {
    query = make_stage(graph, sample, query.n, Data::query, query_gradient ? Keep::gradient : Keep::values,
                       traits);
  }
  work = 3 * query.work + (second_order() ? 9 : 3) * std::max(steps, 1) * support.work;
  const bool small = support.tiles == 1 && support.step_size * steps * element_bytes <= kSavedBytes;
  saved_steps = second_order() && !graph.recompute && small ? steps : 1;
}

void Problem::slice_rates() {
  int64_t most_steps = 1;
  for (const RateTensor& rate : rate_tensors) most_steps = std::max(most_steps, rate.steps);
  slices.resize(most_steps);
  for (int64_t k = 0; k < most_steps; ++k) {
    for (size_t i = 0; i < rates.size(); ++i) {
      if (graph.parameters[i].role != Role::adapted) continue;
      const Rate& rate = rates[i];
      RateSlice slice{packing.at[i], graph.parameters[i].size, rate.constant};
      if (rate.slot >= 0) {
        const int64_t step = std::min(k, rate_tensors[rate.slot].steps - 1);
        const int64_t offset = rate.per_step ? step * (rate.elementwise ? slice.size : 1) : 0;
        slice.rate_at = rate_at[rate.slot] + offset;
        if (rate_tensors[rate.slot].learned) slice.grad_at = rate_grad_at[rate.slot] + offset;
        slice.elementwise = rate.elementwise;
      }
      slices[k].push_back(slice);
    }
  }
}

int64_t Problem::task_size() const {
  return support.tiles * support.fixed_size + saved_steps * support.step_size +
         std::max(support.tangent_size, query.step_size) +
         whole_lines(std::max(support.scratch_size, query.scratch_size)) +
         kept_parameters() * packing.adapted + kept_gradients() * packing.adapted + packing.adapted +
         packing.trainable;
}

}  // namespace maml
