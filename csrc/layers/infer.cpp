#include "layers/infer.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "layers/kinds.h"

namespace maml {

Shape output_like_input(const Node& node, const Shape& x) {
  const auto& layouts = node.layouts;
  if (!layouts.empty() && std::find(layouts.begin(), layouts.end(), x.layout) == layouts.end()) {
    throw Unsupported(node.name + " is fused on " + text_of(layouts) + ", got samples of shape " +
                      text_of(x));
  }
  if (node.in_features != 0 && x.image.c != node.in_features) {
    throw std::invalid_argument(node.name + " expects " + std::to_string(node.in_features) +
                                (x.layout == SampleLayout::features ? " features" : " channels") +
                                ", got samples of shape " + text_of(x));
  }
  if (!node.sample.empty() && node.sample != axes_of(x)) {
    throw std::invalid_argument(node.name + " expects samples of shape " + text_of(node.sample) + ", got " +
                                text_of(x));
  }
  Shape y{node.out_layout.value_or(x.layout), x.image};
  y.rows = x.rows;
  if (node.out_features != 0) y.image.c = node.out_features;
  return y;
}

Image slide(const std::string& name, const Window& window, const std::array<int64_t, 2>& padding_end,
            const Shape& x) {
  if (window.kernel_h > kMostKernelRows) {
    throw Unsupported(name + " has a kernel of " + std::to_string(window.kernel_h) +
                      " rows; fused are at most " + std::to_string(kMostKernelRows));
  }
  auto positions = [&](int64_t in, int64_t kernel, int64_t stride, int64_t before, int64_t after) {
    const int64_t room = in + before + after - kernel;
    if (room < 0) {
      throw std::invalid_argument(name + " has a kernel of " + std::to_string(kernel) + " on an input of " +
                                  text_of(x) +
                                  " a sample: the input must be at least as large as the kernel");
    }
    return room / stride + 1;
  };
  Image y = x.image;
  y.h = positions(x.image.h, window.kernel_h, window.stride_h, window.pad_top, padding_end[0]);
  y.w = positions(x.image.w, window.kernel_w, window.stride_w, window.pad_left, padding_end[1]);
  return y;
}

void check_batch_statistics(const std::string& name, const Shape& x, int64_t n) {
  if (n * x.image.h * x.image.w == 1) {
    throw std::invalid_argument(name +
                                " expects more than 1 value per channel in batch statistics, got 1 sample of "
                                "shape " +
                                text_of(x));
  }
}

namespace {

/// Throws unless loops come to each element of the output once; layers that sum, along the axes that it has.
/// The loops of a map come to them in their order.
void check_output(const Node& node) {
  const Kind kind = node.layer.kind;
  const bool sums = kind == Kind::reduce || kind == Kind::extreme || kind == Kind::contract ||
                    kind == Kind::depthwise || kind == Kind::attention;
  const bool ordered = kind == Kind::map;
  const bool copies = kind == Kind::softmax || kind == Kind::log_softmax || kind == Kind::stop ||
                      kind == Kind::gather || kind == Kind::sort || kind == Kind::dropout;
  if (!sums && !ordered && !copies) return;
  const Loops& loops = node.loops->front();
  const View& y = loops.y;
  std::vector<int> axes;
  bool samples = false, once = y.offset == 0;
  for (int a = 0; a < loops.axes; ++a) {
    if (loops.size[a] == 1 || (sums && y.stride[a] == 0)) continue;
    if (loops.size[a] != kSamples) {
      axes.push_back(a);
      continue;
    }
    samples = y.stride[a] == y.size;
    once = once && samples && !(ordered && !axes.empty());
  }
  std::reverse(axes.begin(), axes.end());
  if (!ordered) {
    std::stable_sort(axes.begin(), axes.end(), [&](int a, int b) { return y.stride[a] < y.stride[b]; });
  }
  int64_t size = 1;
  for (int a : axes) {
    once = once && y.stride[a] == size;
    size *= loops.size[a];
  }
  if (once && size == y.size && samples == y.samples) return;
  throw std::invalid_argument(node.name + " expects loops that come to each of the " +
                              std::to_string(y.size) + " elements of its output once" +
                              (ordered ? ", in their order" : ""));
}

/// Whether loops over the axes that an operand has come to no element of it twice, with an axis of its own.
bool comes_once(const Loops& loops, const View& view, const Axis& axis) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  if (axis.size > 1) axes.push_back({std::abs(axis.stride), axis.size});
  for (int a = 0; a < loops.axes; ++a) {
    if (loops.size[a] == kSamples || loops.size[a] == 1 || view.stride[a] == 0) continue;
    axes.push_back({std::abs(view.stride[a]), loops.size[a]});
  }
  std::sort(axes.begin(), axes.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : axes) {
    if (stride <= reach) return false;
    reach += (size - 1) * stride;
  }
  return true;
}

/// Throws unless threads can share what a lookup writes.
void check_lookup(const Node& node) {
  const Loops& loops = node.loops->front();
  const bool scatters = node.layer.kind == Kind::scatter;
  if (loops.axis.size >= 1 && comes_once(loops, loops.x[0], scatters ? Axis{1, 0} : loops.axis) &&
      comes_once(loops, loops.y, scatters ? loops.axis : Axis{1, 0})) {
    return;
  }
  throw std::invalid_argument(node.name +
                              " expects an axis for its index, and loops that come to no element of an "
                              "operand twice along the axes that it has");
}

/// Throws unless the last axis, whose elements are sorted, is contiguous in the output.
void check_sort(const Node& node) {
  const Loops& loops = node.loops->front();
  const int last = loops.axes - 1;
  if (last >= 0 && loops.size[last] != kSamples && (loops.size[last] == 1 || loops.y.stride[last] == 1))
    return;
  throw std::invalid_argument(node.name +
                              " expects a last axis that is contiguous in its output, and not that of the "
                              "samples");
}

}  // namespace

Shape output_of_loops(const Node& node, std::span<const Shape> x) {
  const bool apart = node.layer.kind == Kind::move || node.layer.kind == Kind::recurrence;
  const size_t nests = apart ? x.size() : 1;
  if (!node.loops || node.loops->size() != nests) {
    throw std::invalid_argument(node.name + " expects " + std::to_string(nests) + " nests of loops, got " +
                                std::to_string(node.loops ? node.loops->size() : 0));
  }
  for (size_t i = 0; i < x.size(); ++i) {
    const View& view = apart ? (*node.loops)[i].x[0] : node.loops->front().x[i];
    if (view.size == size(x[i]) && view.samples == x[i].samples) continue;
    throw std::invalid_argument(node.name + " expects operand " + std::to_string(i) + " of " +
                                std::to_string(view.size) + " elements, got " + std::to_string(size(x[i])));
  }
  const View& y = node.loops->front().y;
  for (const Loops& loops : *node.loops) {
    if (loops.y.size == y.size && loops.y.samples == y.samples) continue;
    throw std::invalid_argument(node.name + " expects one output, got several");
  }
  check_output(node);
  if (node.layer.kind == Kind::gather || node.layer.kind == Kind::scatter) check_lookup(node);
  if (node.layer.kind == Kind::map && !node.expression) {
    throw std::invalid_argument(node.name + " expects at least 1 instruction, got 0");
  }
  if (node.layer.kind == Kind::dropout && !node.mask) {
    throw std::invalid_argument(node.name + " expects a mask, got none");
  }
  if ((node.layer.kind == Kind::softmax || node.layer.kind == Kind::log_softmax) &&
      node.loops->front().axes == 0) {
    throw std::invalid_argument(node.name + " expects at least 1 axis, got 0");
  }
  if (node.layer.kind == Kind::sort) check_sort(node);
  Shape shape{SampleLayout::other, {y.size, 1, 1}};
  shape.samples = y.samples;
  return shape;
}

void check_recurrence(const Node& node, int64_t n) {
  const Loops& loops = node.loops->front();
  const int states = states_of(node.layer.cell);
  const int64_t length = loops.size[1], in = loops.size[2], hidden = loops.y.stride[1];
  const View &x = loops.x[0], &y = loops.y;
  bool fits = node.loops->size() == 1 || static_cast<int>(node.loops->size()) == 1 + states;
  fits = fits && node.parameters.size() == 4 && node.parameters[0] >= 0 && node.parameters[1] >= 0;
  fits = fits && loops.axes == 3 && loops.size[0] == kSamples && x.samples && x.stride[0] == x.size;
  fits = fits && (in == 1 || x.stride[2] == 1) && (length == 1 || std::abs(x.stride[1]) >= in);
  fits = fits && y.samples && y.offset == 0 && hidden > 0 && y.size == (length + states - 1) * hidden;
  for (size_t j = 1; fits && j < node.loops->size(); ++j) {
    const Loops& state = (*node.loops)[j];
    fits = state.axes == 2 && state.size[0] == kSamples && state.size[1] == hidden;
    fits = fits && (hidden == 1 || state.x[0].stride[1] == 1);
    fits = fits && state.x[0].stride[0] == (state.x[0].samples ? state.x[0].size : 0);
  }
  if (!fits) {
    throw std::invalid_argument(node.name +
                                " expects a sequence [samples, length, features], states [samples, hidden] "
                                "and four parameters, got other loops");
  }
  constexpr int64_t kMostSaved = 6;  // of a unit at a step (cells.h)
  const int64_t saved = n * std::max(x.size, kMostSaved * length * hidden);
  if (saved > INT32_MAX) {
    throw Unsupported(node.name + " saves " + std::to_string(saved) +
                      " values a task; fused are fewer than 2^31");
  }
}

void check_depthwise(const Node& node) {
  bool fits = node.loops && node.loops->size() == 1 && node.loops->front().slides > 0;
  if (fits) {
    const Loops& loops = node.loops->front();
    const View &x = loops.x[0], &w = loops.x[1], &y = loops.y;
    const int channels = loops.axes - 1;
    int slid[kMostAxes] = {};  // how many slides name an axis
    bool is_tap[kMostAxes] = {};
    for (int i = 0; i < loops.slides; ++i) {
      ++slid[loops.slide[i].position], ++slid[loops.slide[i].tap];
      is_tap[loops.slide[i].tap] = true;
    }
    fits = slid[channels] == 0 && loops.size[channels] != kSamples && !w.samples;
    for (int a = 0; a < loops.axes; ++a) {
      fits = fits && slid[a] <= 1;
      if (loops.size[a] == 1) continue;
      fits = fits && (y.stride[a] != 0) == !is_tap[a] && (w.stride[a] != 0) == (is_tap[a] || a == channels);
      fits = fits && (x.stride[a] != 0 || slid[a] == 1);
      if (a == channels) fits = fits && x.stride[a] == 1 && w.stride[a] == 1 && y.stride[a] == 1;
    }
  }
  if (!fits) {
    throw std::invalid_argument(node.name +
                                " expects loops over positions, taps and contiguous channels, got others");
  }
}

void check_attention(const Node& node) {
  bool fits = node.loops && node.loops->size() == 1 && node.loops->front().axes >= 4;
  const Loops loops = fits ? node.loops->front() : Loops{};
  const int batch = loops.axes - 4;
  for (int a = 0; fits && a < loops.axes; ++a) {
    const int own = a - batch;  // of queries, keys, depth and width
    if (loops.size[a] == kSamples) fits = a == 0 && own < 0;
    if (loops.size[a] == 1) continue;
    const auto has = [&](const int (&axes)[2]) { return own < 0 || axes[0] == own || axes[1] == own; };
    for (int i = 0; i < kMostInputs; ++i) {
      fits = fits && (has(kAttentionAxes[i]) || loops.x[i].stride[a] == 0);
    }
    fits = fits && has(kAttentionAxes[4]) == (loops.y.stride[a] != 0);
  }
  if (!fits) {
    throw std::invalid_argument(node.name +
                                " expects loops over a batch, queries, keys, depth and width, got others");
  }
}

void check_sum(const std::string& name, const Shape& a, const Shape& b) {
  if (a.layout == SampleLayout::other) {
    throw Unsupported("the sum " + name +
                      " is fused on features, signals and images, got samples of another number of axes");
  }
  if (a.layout != b.layout || axes_of(a) != axes_of(b)) {
    throw Unsupported("the sum " + name + " of samples of shapes " + text_of(a) + " and " + text_of(b) +
                      " broadcasts, which is not fused");
  }
}

}  // namespace maml
