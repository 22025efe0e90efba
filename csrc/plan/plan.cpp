#include "plan/plan.h"

#include <algorithm>
#include <cstdint>

#include "layers/functions.h"
#include "layers/patch_gram.h"

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
  int rank = 0;     // axes of a sample as the user sees them
  Image between{};  // Layer::between
};

std::vector<int64_t> dims(const Shaped& s) {
  if (s.rank == 1) return {s.image.c};
  if (s.rank == 2) return {s.image.c, s.image.w};
  return {s.image.c, s.image.h, s.image.w};
}

/// What a layer takes.
std::string names_of(unsigned ranks) {
  std::string names;
  const char* of[] = {"", "features [n, features]", "signals [n, channels, length]",
                      "images [n, channels, height, width]"};
  for (int rank = 1; rank <= 3; ++rank) {
    if (ranks >> rank & 1) names += (names.empty() ? "" : " or ") + std::string(of[rank]);
  }
  return names;
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
  if (node.ranks != 0 && (node.ranks >> x.rank & 1) == 0) {
    throw Unsupported(node.name + " is fused on " + names_of(node.ranks) + ", got samples of shape " +
                      text_of(dims(x)));
  }
  if (node.in_features != 0 && x.image.c != node.in_features) {
    wrong(node.name + " expects " + std::to_string(node.in_features) +
          (x.rank == 1 ? " features" : " channels") + ", got samples of shape " + text_of(dims(x)));
  }
  if (!node.sample.empty() && node.sample != dims(x)) {
    wrong(node.name + " expects samples of shape " + text_of(node.sample) + ", got " + text_of(dims(x)));
  }
  Shaped y{x.image, x.rank};
  if (node.out_rank != 0) y.rank = node.out_rank;
  if (node.out_features != 0) y.image.c = node.out_features;
  const Window& window = layer.window;
  const std::string& sliding = layer.kind == Kind::block ? node.pool_name : node.name;
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
  auto sums = [&](const std::string& name, const Shaped& a, const Shaped& b) {
    if (a.rank < 1 || a.rank > 3) {
      throw Unsupported("the sum " + name + " is fused on samples of 1 to 3 axes, got samples of " +
                        std::to_string(a.rank));
    }
    if (a.rank != b.rank || dims(a) != dims(b)) {
      throw Unsupported("the sum " + name + " of samples of shapes " + text_of(dims(a)) + " and " +
                        text_of(dims(b)) + " broadcasts, which is not fused");
    }
  };
  auto normalises = [&](const std::string& name, const Image& image) {
    if (n * image.h * image.w == 1) {
      wrong(name + " expects more than 1 value per channel in batch statistics, got 1 sample of shape " +
            text_of(dims({image, x.rank})));
    }
  };
  switch (layer.kind) {
    case Kind::conv2d:
    case Kind::max_pool:
    case Kind::avg_pool:
      slides();
      break;
    case Kind::batch_norm:
    case Kind::block:
      normalises(node.name, x.image);
      if (layer.pooled) slides();
      break;
    case Kind::group_norm: {
      const int64_t pixels = x.image.h * x.image.w, groups = layer.groups;
      if (groups > 0 && x.image.c % groups != 0) {
        wrong(node.name + " expects channels that make " + std::to_string(groups) +
              " groups, got samples of shape " + text_of(dims(x)));
      }
      // What torch refuses: InstanceNorm of one value, GroupNorm of one in all samples together.
      const bool single = groups == 0 ? pixels == 1 : n * (x.image.c / groups) * pixels == 1;
      if (single && node.sample.empty()) {
        wrong(node.name + " expects more than 1 value per " + (groups == 0 ? "channel" : "group") + ", got " +
              std::to_string(n) + " samples of shape " + text_of(dims(x)));
      }
      break;
    }
    case Kind::patch_gram:
    case Kind::stem:
    case Kind::conv_block:
      slides();
      y.between = y.image;
      if (layer.kind == Kind::patch_gram) {
        y.image = {patch_gram_size(patch_size(window, x.image)), 1, 1};
        break;
      }
      normalises(node.norm_name, y.between);
      if (layer.kind == Kind::conv_block && other) sums(node.sum_name, {y.between, y.rank}, *other);
      if (layer.pooled) {
        y.image.h = slide(node.pool_name, y.between.h, 2, 2, 0, 0, {y.between, y.rank});
        y.image.w = slide(node.pool_name, y.between.w, 2, 2, 0, 0, {y.between, y.rank});
      }
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
      sums(node.name, x, *other);
      break;
    case Kind::channels_last:
    case Kind::running_norm:
    case Kind::pointwise:
    case Kind::append:
      break;
  }
  return y;
}

/// Whether a layer makes every sample depend on the others of its task.
bool normalises(Kind kind) {
  return kind == Kind::batch_norm || kind == Kind::block || kind == Kind::conv_block || kind == Kind::stem;
}

/// Multiply-adds of a forward pass, roughly.
int64_t work_of(const Layer& l) {
  const int64_t patch = patch_size(l.window, l.in), patches = l.n * l.between.h * l.between.w;
  switch (l.kind) {
    case Kind::conv2d:
      return l.n * size(l.out) * patch;
    case Kind::patch_gram:
      return patches * patch * patch;
    case Kind::stem:
    case Kind::conv_block:
      return patches * patch * l.out.c;
    default:
      return 4 * l.n * size(l.out);
  }
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
  auto append = [&](auto belongs) {
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (!belongs(parameters[i])) continue;
      at[i] = total;
      total += whole_lines(parameters[i].size);
    }
    return total;
  };
  adapted = append([](const Parameter& p) { return p.role == Role::adapted; });
  stepwise = append([](const Parameter& p) { return p.role == Role::outer && p.slots == 1; });
  trainable = append([](const Parameter& p) { return p.role == Role::outer && p.slots > 1; });
  append([](const Parameter& p) { return p.role == Role::frozen; });
  for (const Parameter& p : parameters) {
    slots_.push_back(p.slots);
    slot_size_.push_back(p.size / p.slots);
  }
}

namespace {

/// Whether f(x) tells f' as x does, and f'' is zero: then nobody misses x, or the cotangent of f(x).
bool forgets_argument(const Layer& f) { return !bends(f.function) && ascends(f); }

/// Sets the heir of whatever a convolution, linear layer or group_norm, whose passes do not read it, gives to
/// such a function alone.
void find_heirs(Stage& stage) {
  std::vector<int> readers(stage.values.size()), writer(stage.values.size(), -1);
  for (size_t i = 0; i < stage.steps.size(); ++i) {
    writer[stage.steps[i].output] = static_cast<int>(i);
    for (int input : stage.steps[i].inputs) {
      if (input >= 0) ++readers[input];
    }
  }
  ++readers[stage.output];
  for (const Stage::Step& step : stage.steps) {
    const int x = step.inputs[0];
    if (step.layer.kind != Kind::pointwise || !forgets_argument(step.layer) || readers[x] != 1) continue;
    if (writer[x] < 0) continue;
    const Kind kind = stage.steps[writer[x]].layer.kind;
    if (kind != Kind::conv2d && kind != Kind::group_norm) continue;
    stage.values[x].heir = step.output;
  }
}

}  // namespace

Stage make_stage(const Graph& graph, const std::vector<int64_t>& sample, int64_t n, Data data, Keep keep,
                 const LayerTraits& traits) {
  const int count = static_cast<int>(graph.nodes.size());
  Stage stage;
  stage.n = n;
  const bool independent = std::none_of(graph.nodes.begin(), graph.nodes.end(),
                                        [](const Node& node) { return normalises(node.layer.kind); });
  if (independent) stage.tiles = (n - 1) / traits.tile + 1;  // rounded up, as is what follows
  const int64_t most = (n - 1) / stage.tiles + 1;            // samples of a tile
  stage.values.resize(count + 1);

  // Shapes, and which values share memory.
  std::vector<Shaped> shapes(count + 1);
  Shaped& input = shapes[0];
  input.rank = static_cast<int>(sample.size());
  input.image = {sample.empty() ? 1 : sample[0], sample.size() > 2 ? sample[1] : 1, 1};  // a signal: one row
  for (size_t i = sample.size() > 2 ? 2 : 1; i < sample.size(); ++i) input.image.w *= sample[i];
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
  if (const int rank = shapes[graph.nodes[count - 1].inputs[0]].rank; rank < 1 || rank > 3) {
    throw Unsupported("a prediction of " + std::to_string(rank) +
                      " axes a sample is not fused; of 1 to 3 it is");
  }
  if (takes_classes(graph.loss) && stage.prediction.size() != 1) {
    throw Unsupported(std::string("the fused ") +
                      (is_policy(graph.loss) ? "categorical policy" : "cross_entropy") +
                      " takes a prediction [n, classes], got samples of shape " + text_of(stage.prediction));
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
    step.layer.between = shapes[i + 1].between;
    if (!node.sample.empty()) step.layer.in = step.layer.out = {size(step.layer.in), 1, 1};
    if (step.layer.groups == 0) step.layer.groups = step.layer.in.c;
    step.output = i + 1;
    step.parameters = node.parameters;
    step.add_x = {};
    step.add_w = {};
    Stage::Value& y = stage.values[i + 1];
    for (int j = 0; j < 2; ++j) {
      step.inputs[j] = node.inputs[j] < 0 ? -1 : stage.values[node.inputs[j]].root;
      if (step.inputs[j] >= 0) {
        y.active |= stage.values[step.inputs[j]].active;
        y.moving |= stage.values[step.inputs[j]].moving;
        y.stepwise |= stage.values[step.inputs[j]].stepwise;
      }
    }
    for (int p : node.parameters) {
      if (p < 0) continue;
      y.active |= graph.parameters[p].role != Role::frozen;
      y.moving |= graph.parameters[p].role == Role::adapted;
      y.stepwise |= graph.parameters[p].slots > 1;
    }
    stage.steps.push_back(step);
  }
  if (traits.in_place) find_heirs(stage);
  std::vector<bool> value_written(count + 1), parameter_written(graph.parameters.size());
  for (auto step = stage.steps.rbegin(); step != stage.steps.rend(); ++step) {
    for (int j = 0; j < 2; ++j) {
      if (step->inputs[j] >= 0) {
        step->add_x[j] = value_written[step->inputs[j]];
        value_written[step->inputs[j]] = true;
      }
    }
    for (int j = 0; j < kMostParameters; ++j) {
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
  // Who leaves his place to an heir lives as long, and has it from the beginning.
  std::vector<bool> inherits(count + 1);
  for (int v = 0; v <= count; ++v) {
    const int heir = stage.values[v].heir;
    if (heir < 0) continue;
    last_reader[v] = last_reader[heir];
    inherits[heir] = true;
  }
  Region fixed, step_region, tangent;
  const int forever = 2 * steps + 1;
  const bool products = keep == Keep::products;
  // Of a query: before all else.
  const auto early = [&](const Stage::Value& y) { return data == Data::query && !y.active; };
  int64_t constants_scratch = 0;
  for (int i = 0; i < steps; ++i) {
    Stage::Step& step = stage.steps[i];
    Stage::Value& y = stage.values[step.output];
    const Footprint needs = traits.footprint(step.layer);
    stage.has_constants |= !y.active;
    if (early(y)) constants_scratch = std::max(constants_scratch, needs.scratch);
    const Layer& l = step.layer;
    Layer whole = l;
    whole.n = n;
    stage.work += work_of(whole);
    stage.scratch_size = std::max(stage.scratch_size, needs.scratch);
    y.fixed = data == Data::support && !y.moving && !y.stepwise;
    const bool stays = y.fixed || products;
    Region& region = y.fixed ? fixed : step_region;
    const int first = stays || early(y) ? 0 : i;
    const int last = stays ? forever : keep == Keep::values ? last_reader[step.output] : back(i);
    // The moments of a constant image are those of all samples.
    if (!inherits[step.output]) {
      y.at = region.place((l.kind == Kind::patch_gram ? 1 : most) * y.size, first, last);
    }
    if (y.heir >= 0) stage.values[y.heir].at = y.at;
    step.saved_at = region.place(needs.saved, first, !stays && keep == Keep::values ? i : last);
  }
  if (constants_scratch > 0) stage.constants_scratch_at = step_region.place(constants_scratch, 0, 0);
  if (keep != Keep::values) {
    for (int i = steps - 1; i >= 0; --i) {
      const int output = stage.steps[i].output;
      Stage::Value& y = stage.values[output];
      const int written = back(last_reader[output]);
      if (inherits[output]) continue;
      if (data == Data::support ? y.moving : y.active) {
        y.grad_at = step_region.place(most * y.size, products ? 0 : written, products ? forever : back(i));
      }
      if (products && y.moving) {
        Stage::Step& step = stage.steps[i];
        y.dot_at = tangent.place(most * y.size, i, back(i));
        step.saved_dot_at = tangent.place(traits.footprint(step.layer).saved_dot, i, back(i));
      }
      if (products && y.active) y.grad_dot_at = tangent.place(most * y.size, written, back(i));
      if (y.heir < 0) continue;
      Stage::Value& heir = stage.values[y.heir];
      heir.grad_at = y.grad_at, heir.dot_at = y.dot_at, heir.grad_dot_at = y.grad_dot_at;
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
                                : step_region.place(tiles * 2 * image.c, early(y) ? 0 : from, i);
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
                 int64_t n_support, int64_t n_query, int steps_, bool first_order_,
                 const std::vector<int>& query_steps_, int64_t element_bytes_, const LayerTraits& traits)
    : graph(with_chains(graph_, traits.chain)),
      operation(operation_),
      rates(std::move(rates_)),
      rate_tensors(std::move(rate_tensors_)),
      steps(steps_),
      first_order(first_order_),
      query_steps(query_steps_),
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
  const Keep of_query = is_fisher(operation) ? Keep::products
                        : query_gradient     ? Keep::gradient
                                             : Keep::values;
  if (support.n > 0) {
    support = make_stage(graph, sample, support.n, Data::support, products ? Keep::products : Keep::gradient,
                         traits);
  }
  if (query.n > 0) {
    query = make_stage(graph, sample, query.n, Data::query, of_query, traits);
  }
  const int64_t queries = std::max<int64_t>(static_cast<int64_t>(query_steps.size()), 1);
  work = 3 * queries * query.work + (second_order() ? 9 : 3) * std::max(steps, 1) * support.work;
  const bool support_pass = steps > 0 || at_own_parameters(operation);
  const bool keeps_all = operation == Operation::kept_fisher;
  const bool keeps = second_order() && (keeps_all || !graph.recompute);
  const int64_t most = keeps_all ? INT64_MAX : support.tiles == 1 ? kSavedBytes : traits.kept_bytes;
  const int64_t bytes = support.tiles * support.step_size * element_bytes;
  saved_steps = keeps && steps * bytes <= most ? steps : support_pass ? 1 : 0;
  kept_tiles = keeps && bytes <= most ? support.tiles : 1;
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

bool Problem::is_linear() const {
  for (const Stage* stage : {&support, &query}) {
    for (const Stage::Step& step : stage->steps) {
      const Layer& l = step.layer;
      const bool features = l.in.h * l.in.w == 1 && l.out.h * l.out.w == 1;
      // A tap on padding alone meets nothing of a single pixel.
      const bool one_tap =
          l.window.kernel_h * l.window.kernel_w == 1 && l.window.pad_top + l.window.pad_left == 0;
      const bool linear = l.kind == Kind::conv2d && one_tap && features;
      const bool others = l.kind == Kind::pointwise || l.kind == Kind::add || l.kind == Kind::append;
      if (!linear && !others) return false;
    }
  }
  return true;
}

int64_t Problem::task_size() const {
  return support.tiles * support.fixed_size + regions() * support.step_size +
         query_regions() * query.step_size + shared_size() +
         whole_lines(std::max(support.scratch_size, query.scratch_size)) +
         kept_parameters() * packing.adapted + kept_gradients() * packing.adapted + packing.adapted +
         packing.trainable + whole_lines(weighs_queries() ? 1 : 0);
}

}  // namespace maml
