// Fuses chains of nodes into one layer. Where the backend has conv_block, a convolution with its BatchNorm:
//
//   conv2d, batch_norm [, add] [, relu or leaky_relu] [, max_pool]      conv_block
//
// The other input of add may be any value, as in a residual network. A 2 x 2 max-pool is moved before a
// non-decreasing function, which then has a quarter of the values to compute; functions other than relu and
// leaky_relu remain layers of their own after the pool. On a constant image with few taps, the chain becomes
// patch_gram and stem, on any backend, without the sum; the stem of a backend without conv_block has any
// function that kernels can choose at run time, before a max-pool or behind it. Where the backend has
// norm_block, batch_norm, a function and optionally max_pool become one layer.
#include "plan/fuse.h"

#include <algorithm>

#include "layers/functions.h"
#include "layers/kinds.h"
#include "layers/patch_moments.h"
#include "layers/registry.h"

namespace maml {
namespace {

/// Whether f is linear with slope one above zero and a slope a >= 0 below.
bool kinks(const Layer& f) {
  return f.function == Function::relu || (f.function == Function::leaky_relu && f.a >= 0);
}

/// Whether a max-pool has disjoint windows of 2 x 2 pixels.
bool pools_pairs(const Node& pool) {
  const Window& w = pool.layer.window;
  return w.kernel_h == 2 && w.kernel_w == 2 && w.stride_h == 2 && w.stride_w == 2 && w.pad_top == 0 &&
         w.pad_left == 0 && pool.pad_end == std::array<int64_t, 2>{};
}

class Chains {
 public:
  Chains(const Graph& graph, Kind chain, bool weighted)
      : graph_(graph),
        chain_(chain),
        result_(graph),
        readers_(graph.nodes.size() + 1, 0),
        number_(graph.nodes.size() + 1, 0),
        taken_(graph.nodes.size(), false) {
    const bool stems = chain == Kind::conv_block || !weighted;  // on the CPU a task has its own count
    constant_.push_back(stems && !graph.data_gradient.x_support && !graph.data_gradient.x_query);
    for (const Node& node : graph.nodes) {
      bool constant = true;
      for (int input : node.inputs) {
        ++readers_[input];
        constant = constant && constant_[input];
      }
      for (int p : node.parameters) {
        if (p < 0) continue;
        constant = constant && graph.parameters[p].role == Role::frozen && graph.parameters[p].slots == 1;
      }
      constant_.push_back(constant);
    }
  }

  Graph fused() {
    result_.nodes.clear();
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
      if (taken_[i] || conv_block(i) || sum(i) || (chain_ == Kind::norm_block && norm_block(i))) continue;
      take(i, i + 1, append(renumbered(graph_.nodes[i])));
    }
    result_.prediction = number_[graph_.prediction];
    result_.loss_value = number_[graph_.loss_value];
    return result_;
  }

 private:
  /// Whether node i is of this kind and is the only reader of the value of node i - 1.
  bool continues(size_t i, Kind kind) const {
    return i < graph_.nodes.size() && graph_.nodes[i].layer.kind == kind && !graph_.nodes[i].inputs.empty() &&
           graph_.nodes[i].inputs[0] == static_cast<int>(i) && readers_[i] == 1;
  }
  Node renumbered(Node node) const {
    for (int& input : node.inputs) input = number_[input];
    return node;
  }
  /// Appends a node to the result; returns the number of its value.
  int append(Node node) {
    result_.nodes.push_back(std::move(node));
    return static_cast<int>(result_.nodes.size());
  }
  /// Marks nodes [first, end) as done; their last value has this number in the result.
  void take(size_t first, size_t end, int value) {
    for (size_t i = first; i < end; ++i) taken_[i] = true, number_[i + 1] = value;
  }

  /// Appends the chain that starts with node i as one layer; returns false if there is no such chain.
  bool norm_block(size_t i) {
    if (graph_.nodes[i].layer.kind != Kind::batch_norm || !continues(i + 1, Kind::pointwise)) return false;
    Node node = renumbered(graph_.nodes[i]);
    Layer& layer = node.layer;
    const Layer& f = graph_.nodes[i + 1].layer;
    layer.kind = Kind::norm_block;
    layer.function = f.function;
    layer.a = f.a, layer.b = f.b, layer.c = f.c;
    layer.pooled = continues(i + 2, Kind::max_pool);
    if (layer.pooled) {
      const Node& pool = graph_.nodes[i + 2];
      layer.window = pool.layer.window;
      node.pad_end = pool.pad_end;
      node.pool_name = pool.name;
    }
    take(i, i + (layer.pooled ? 3 : 2), append(node));
    return true;
  }

  bool is_stem(size_t i) const {
    const Node& convolution = graph_.nodes[i];
    const Window& window = convolution.layer.window;
    return constant_[convolution.inputs[0]] &&
           window.kernel_h * window.kernel_w * convolution.in_features <= kMostPatch &&
           (chain_ == Kind::conv_block || convolution.out_features <= kMostStemFilters);
  }
  /// Whether a value is the plan's input with channels last: the stem of a backend without conv_block reads
  /// the input as it is.
  bool is_users_image(int value) const {
    return value > 0 && graph_.nodes[value - 1].layer.kind == Kind::channels_last &&
           graph_.nodes[value - 1].inputs[0] == 0;
  }
  /// Whether node i is a convolution followed by its BatchNorm.
  bool is_normalised(size_t i) const {
    if (graph_.nodes[i].layer.kind != Kind::conv2d || !continues(i + 1, Kind::batch_norm)) return false;
    const Node &convolution = graph_.nodes[i], &norm = graph_.nodes[i + 1];
    return norm.in_features == convolution.out_features &&
           (norm.layouts.empty() ||
            std::find_first_of(norm.layouts.begin(), norm.layouts.end(), convolution.layouts.begin(),
                               convolution.layouts.end()) != norm.layouts.end());
  }

  /// The convolution whose normalised output is an input of the sum of node j and is read by nothing else. If
  /// both inputs are such, the later one; -1 if none is.
  int summand_of(size_t j) const {
    const Node& sum = graph_.nodes[j];
    if (chain_ != Kind::conv_block || sum.layer.kind != Kind::add) return -1;
    int found = -1;
    for (int value : sum.inputs) {
      const int i = value - 2;
      if (i > found && readers_[value] == 1 && is_normalised(i) && !is_stem(i)) found = i;
    }
    return found;
  }
  /// Whether the only reader of the value of node i + 1 is a sum that is fused with convolution i.
  bool waits(size_t i) const {
    const int value = static_cast<int>(i) + 2;
    for (size_t j = i + 2; j < graph_.nodes.size(); ++j) {
      const auto& inputs = graph_.nodes[j].inputs;
      if (std::find(inputs.begin(), inputs.end(), value) != inputs.end()) {
        return summand_of(j) == static_cast<int>(i);
      }
    }
    return false;
  }

  /// Appends the chain that starts with node i as one layer, unless a later sum will; false if there is no
  /// such chain.
  bool conv_block(size_t i) {
    if (!is_normalised(i) || (!is_stem(i) && chain_ != Kind::conv_block)) return false;
    taken_[i + 1] = true;
    if (!waits(i)) emit(i, i + 1);
    return true;
  }

  bool sum(size_t j) {
    const int i = summand_of(j);
    if (i >= 0) emit(static_cast<size_t>(i), j);
    return i >= 0;
  }

  /// Whether this function becomes part of the layer.
  bool takes(bool stem, const Layer& f) const {
    return chain_ == Kind::conv_block ? kinks(f) : stem && in_megakernel(f.function);
  }
  static void set_function(Layer& layer, const Layer& f) {
    layer.function = f.function;
    static_cast<Constants&>(layer) = f;
    if (f.function == Function::relu) layer.a = 0;
  }

  /// Appends the chain of convolution i and its BatchNorm; if `last` is a sum, with that sum.
  void emit(size_t i, size_t last) {
    Node node = renumbered(graph_.nodes[i]);
    const Node& norm = graph_.nodes[i + 1];
    const bool stem = is_stem(i), sums = last > i + 1;
    if (stem) {
      const int image = graph_.nodes[i].inputs[0];
      if (chain_ == Kind::norm_block && is_users_image(image)) node.inputs[0] = 0;
      Node gram = node;
      gram.layer.kind = Kind::patch_gram;
      gram.parameters.clear();
      node.inputs.push_back(append(gram));
    }
    if (sums) {
      const Node& sum = graph_.nodes[last];
      node.inputs.push_back(number_[sum.inputs[sum.inputs[0] == static_cast<int>(i) + 2 ? 1 : 0]]);
      node.sum_name = sum.name;
    }
    node.layer.kind = stem ? Kind::stem : Kind::conv_block;
    node.layer.eps = norm.layer.eps;
    node.norm_name = norm.name;
    node.parameters.resize(2, -1);
    node.parameters.insert(node.parameters.end(), norm.parameters.begin(), norm.parameters.end());
    node.layer.function = Function::leaky_relu, node.layer.a = 1;  // no function
    size_t end = last + 1;
    const bool f = continues(end, Kind::pointwise), fused = f && takes(stem, graph_.nodes[end].layer);
    const bool before_pool = f && !ascends(graph_.nodes[end].layer);
    const size_t pool = end + f;
    node.layer.pooled = !before_pool && continues(pool, Kind::max_pool) && pools_pairs(graph_.nodes[pool]);
    if (fused) set_function(node.layer, graph_.nodes[end].layer);
    const bool apart = node.layer.pooled && f && !fused;  // f becomes a layer behind the pool
    const size_t function = end;
    end = node.layer.pooled ? pool + 1 : end + fused;
    if (node.layer.pooled) {
      node.pool_name = graph_.nodes[pool].name;
      if (chain_ == Kind::norm_block && !f && continues(end, Kind::pointwise) &&
          takes(stem, graph_.nodes[end].layer)) {
        set_function(node.layer, graph_.nodes[end++].layer);
      }
    }
    int value = append(node);
    if (apart) {
      Node behind = graph_.nodes[function];
      behind.inputs[0] = value;
      value = append(behind);
    }
    take(last, end, value);
  }

  const Graph& graph_;
  const Kind chain_;
  Graph result_;
  std::vector<int> readers_, number_;  // for each value: how often it is read; its number in the result
  std::vector<bool> taken_;            // for each node: it is part of a chain
  std::vector<bool> constant_;         // for each value: it depends on nothing that has a gradient
};

}  // namespace

Graph with_chains(const Graph& graph, Kind chain, bool weighted) {
  return Chains(graph, chain, weighted).fused();
}

}  // namespace maml
