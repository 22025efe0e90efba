#include "python/loops.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <vector>

#include "layers/kinds.h"
#include "layers/registry.h"
#include "python/fields.h"

namespace py = pybind11;

namespace maml {
namespace {

using Objects = std::vector<py::object>;

/// Whether every element of the operand is visited, and visited once: sorted by stride, each axis steps over
/// exactly the elements of those before it.
bool is_whole(const Loops& loops, const View& view) {
  std::vector<int> order;
  for (int a = 0; a < loops.axes; ++a) {
    if (loops.size[a] == 1) continue;
    if ((loops.size[a] == kSamples) != (view.samples && view.stride[a] == view.size)) return false;
    if (loops.size[a] != kSamples) order.push_back(a);
  }
  std::sort(order.begin(), order.end(), [&](int a, int b) { return view.stride[a] < view.stride[b]; });
  int64_t visited = 1;
  for (int a : order) {
    if (view.stride[a] != visited) return false;
    visited *= loops.size[a];
  }
  const bool all_samples = !view.samples || std::count(loops.size, loops.size + loops.axes, kSamples) == 1;
  return view.offset == 0 && visited == view.size && all_samples;
}

/// Whether the slides are over axes of the loops along which x has no stride of its own.
bool is_known(const Slide& s, const Loops& loops) {
  const auto is_free = [&](int a) {
    return a >= 0 && a < loops.axes && loops.size[a] != kSamples && loops.x[0].stride[a] == 0;
  };
  return is_free(s.position) && is_free(s.tap) && s.position != s.tap && s.size > 0 &&
         (s.size == 1 || s.x_stride != 0) && s.stride > 0 && s.dilation > 0;
}

void read_slides(const Objects& slides, const std::string& named_node, Loops& loops) {
  if (slides.size() > kMostSlides) {
    throw Unsupported(named_node + "fused are windows over at most " + std::to_string(kMostSlides) +
                      " axes, got " + std::to_string(slides.size()));
  }
  int64_t first = loops.x[0].offset, last = first;
  for (int a = 0; a < loops.axes; ++a) {
    if (loops.size[a] == kSamples) continue;
    (loops.x[0].stride[a] < 0 ? first : last) += (loops.size[a] - 1) * loops.x[0].stride[a];
  }
  for (const py::object& object : slides) {
    Fields fields(object);
    Slide& s = loops.slide[loops.slides++];
    s.position = fields.read<int>("position");
    s.tap = fields.read<int>("tap");
    s.size = fields.read<int64_t>("size");
    s.x_stride = fields.read<int64_t>("x_stride");
    s.stride = fields.read<int64_t>("stride");
    s.dilation = fields.read<int64_t>("dilation");
    s.padding = fields.read<int64_t>("padding");
    fields.done();
    if (!is_known(s, loops)) {
      throw std::invalid_argument(
          named_node + "Slide must name two axes of the loops along which x has " +
          "stride 0, and have a positive size, stride and dilation, and x_stride for more than one element");
    }
    (s.x_stride < 0 ? first : last) += (s.size - 1) * s.x_stride;
  }
  if (first < 0 || last >= loops.x[0].size) {
    throw std::invalid_argument(named_node + "windows of " + std::to_string(loops.x[0].size) +
                                " elements leave their operand");
  }
}

/// The axis of one operand along which another one is the index.
void read_axis(py::handle object, const std::string& named_node, bool of_output, Loops& loops) {
  if (object.is_none()) return;
  Fields fields(object);
  loops.axis.size = fields.read<int64_t>("size");
  loops.axis.stride = fields.read<int64_t>("stride");
  fields.done();
  const View& view = of_output ? loops.y : loops.x[0];
  int64_t first = view.offset, last = first;
  for (int a = 0; a < loops.axes; ++a) {
    if (loops.size[a] == kSamples) continue;
    (view.stride[a] < 0 ? first : last) += (loops.size[a] - 1) * view.stride[a];
  }
  (loops.axis.stride < 0 ? first : last) += (loops.axis.size - 1) * loops.axis.stride;
  if (loops.axis.size < 1 || first < 0 || last >= view.size) {
    throw std::invalid_argument(named_node + "Axis of " + std::to_string(loops.axis.size) +
                                " elements leaves its operand of " + std::to_string(view.size));
  }
}

View read_view(py::handle object, const Loops& loops, const std::string& named_node) {
  Fields fields(object);
  View view;
  view.size = fields.read<int64_t>("size");
  view.samples = fields.read<bool>("samples");
  view.offset = fields.read<int64_t>("offset");
  const auto strides = fields.read<std::vector<int64_t>>("strides");
  fields.done();
  if (static_cast<int>(strides.size()) != loops.axes) {
    throw std::invalid_argument(named_node + "View.strides must be " + std::to_string(loops.axes) +
                                " numbers, got " + std::to_string(strides.size()));
  }
  std::copy(strides.begin(), strides.end(), view.stride);
  int64_t first = view.offset, last = view.offset;
  bool fits = true;
  for (int a = 0; a < loops.axes; ++a) {
    if (loops.size[a] == kSamples) {
      fits = fits && (view.stride[a] == 0 || (view.samples && view.stride[a] == view.size));
    } else {
      (view.stride[a] < 0 ? first : last) += (loops.size[a] - 1) * view.stride[a];
    }
  }
  if (!fits || first < 0 || last >= view.size) {
    throw std::invalid_argument(named_node + "a view of " + std::to_string(view.size) +
                                " elements leaves its operand");
  }
  view.whole = is_whole(loops, view);
  return view;
}

Loops read_one(py::handle object, const std::string& named_node) {
  Fields fields(object);
  Loops loops;
  const auto sizes = fields.read<std::vector<std::optional<int64_t>>>("sizes");
  const auto inputs = fields.read<Objects>("inputs");
  if (sizes.size() > kMostAxes || inputs.size() > kMostInputs) {
    throw Unsupported(named_node + "fused are loops over at most " + std::to_string(kMostAxes) +
                      " axes and " + std::to_string(kMostInputs) + " inputs");
  }
  loops.axes = static_cast<int>(sizes.size());
  int sample_axes = 0;
  for (int a = 0; a < loops.axes; ++a) {
    loops.size[a] = sizes[a].value_or(kSamples);
    sample_axes += loops.size[a] == kSamples;
    if (loops.size[a] < 1 && loops.size[a] != kSamples) {
      throw std::invalid_argument(named_node + "Loops.sizes must be at least 1, got " +
                                  std::to_string(loops.size[a]));
    }
  }
  if (sample_axes > 1) {
    throw std::invalid_argument(named_node + "Loops.sizes must have at most 1 axis of samples, got " +
                                std::to_string(sample_axes));
  }
  for (size_t i = 0; i < inputs.size(); ++i) loops.x[i] = read_view(inputs[i], loops, named_node);
  loops.y = read_view(fields.object("output"), loops, named_node);
  fields.done();
  return loops;
}

/// The names of the table of a registry that begins with those of `Function`.
ExpressionStep read_instruction(py::handle object, int numbers, const std::string& named_node) {
  Fields fields(object);
  ExpressionStep step;
  const auto name = fields.read<std::string>("name");
  const auto arguments = fields.read<std::vector<int>>("arguments");
  const auto constants = fields.read<std::vector<double>>("constants");
  fields.done();
  const std::optional<Combination> combination = combination_named(name);
  step.unary = !combination;
  if (combination) {
    step.combination = *combination;
  } else {
    step.function = function_named(name);
  }
  const size_t takes = step.unary ? 1 : step.combination == Combination::where ? 3 : 2;
  const bool known = std::all_of(arguments.begin(), arguments.end(),
                                 [&](int argument) { return argument >= 0 && argument < numbers; });
  if (arguments.size() != takes || !known || constants.size() > 3) {
    throw std::invalid_argument(named_node + "Instruction " + name + " must have " + std::to_string(takes) +
                                " arguments from 0 to " + std::to_string(numbers - 1) +
                                " and at most 3 constants");
  }
  std::copy(arguments.begin(), arguments.end(), step.argument);
  if (constants.size() > 0) step.constants.a = constants[0];
  if (constants.size() > 1) step.constants.b = constants[1];
  if (constants.size() > 2) step.constants.c = constants[2];
  return step;
}

}  // namespace

Reduction reduction_named(const std::string& name) {
  for (int r = 0; r < static_cast<int>(Reduction::count); ++r) {
    if (name == name_of(static_cast<Reduction>(r))) return static_cast<Reduction>(r);
  }
  throw std::invalid_argument("unknown reduction " + name);
}

void read_loops(py::handle loops, py::handle slides, py::handle axis, py::handle instructions,
                const std::string& named_node, Node& node) {
  std::vector<Loops> all;
  for (const py::object& one : py::cast<Objects>(loops)) all.push_back(read_one(one, named_node));
  if (all.empty()) return;
  read_slides(py::cast<Objects>(slides), named_node, all.front());
  read_axis(axis, named_node, node.layer.kind == Kind::scatter, all.front());
  node.loops = std::make_shared<const std::vector<Loops>>(std::move(all));
  const auto steps = py::cast<Objects>(instructions);
  if (steps.empty()) return;
  if (steps.size() > kMostInstructions) {
    throw Unsupported(named_node + "fused are expressions of at most " + std::to_string(kMostInstructions) +
                      " operations, got " + std::to_string(steps.size()));
  }
  Expression expression;
  expression.operands = static_cast<int>(node.inputs.size());
  for (const py::object& step : steps) {
    expression.step[expression.count] =
        read_instruction(step, expression.operands + expression.count, named_node);
    ++expression.count;
  }
  node.expression = std::make_shared<const Expression>(expression);
}

void read_mask(py::handle object, const std::string& named_node, Node& node) {
  if (object.is_none()) return;
  Fields fields(object);
  Mask mask;
  mask.number = fields.read<uint32_t>("number");
  mask.keep = fields.read<uint64_t>("keep");
  const auto strides = fields.read<std::vector<int64_t>>("strides");
  const auto times_samples = fields.read<std::vector<bool>>("times_samples");
  fields.done();
  const size_t axes = node.loops ? node.loops->front().axes : 0;
  const bool negative = std::any_of(strides.begin(), strides.end(), [](int64_t s) { return s < 0; });
  if (strides.size() != axes || times_samples.size() != axes || negative) {
    throw std::invalid_argument(named_node +
                                "Mask.strides must be a number from 0 on for each axis of the loops");
  }
  std::copy(strides.begin(), strides.end(), mask.stride);
  std::copy(times_samples.begin(), times_samples.end(), mask.times_samples);
  node.mask = std::make_shared<const Mask>(mask);
}

}  // namespace maml
