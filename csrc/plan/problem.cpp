#include "plan/problem.h"

#include <cmath>
#include <utility>

#include "layers/kinds.h"
#include "layers/registry.h"
#include "plan/fuse.h"

namespace maml {

Problem::Problem(Graph graph_, Operation operation_, std::vector<Update> updates_,
                 std::vector<RateTensor> rate_tensors_, const std::vector<int64_t>& sample_,
                 int64_t n_support, int64_t n_query, int steps_, bool first_order_,
                 const std::vector<int>& query_steps_, bool weighted_, int64_t element_bytes_,
                 const LayerTraits& traits)
    : graph(with_chains(graph_, traits.chain, weighted_)),
      operation(operation_),
      updates(std::move(updates_)),
      rate_tensors(std::move(rate_tensors_)),
      steps(steps_),
      first_order(first_order_),
      query_steps(query_steps_),
      weighted(weighted_),
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
  slice_updates();
  if (has_optimizer() && is_fisher(operation)) {
    throw Unsupported("fused Fisher-vector products go through plain gradient descent, without an optimizer");
  }
  support.n = n_support;
  query.n = n_query;
  // A backend without conv_block reads a weight as fast in either order; a factor knows one of them.
  if (traits.chain == Kind::norm_block && factors == 0)
    read_images_unflattened(graph, sample, std::max(n_support, n_query));
  lay_out(traits);
}

void Problem::lay_out(const LayerTraits& of_backend) {
  LayerTraits traits = of_backend;
  if (weighted) traits.statistics_rows = nullptr;  // a convolution would count padding
  const bool products = second_order() || is_implicit() || operation == Operation::hvp;
  const bool query_gradient =
      (operation == Operation::meta_gradient && !is_reptile()) || operation == Operation::predict_backward;
  DataGradient& data = graph.data_gradient;
  if (operation == Operation::adapt_backward) {
    data.x_query = data.y_query = false;
  } else if (operation != Operation::meta_gradient) {
    data = {};
  }
  if (!second_order()) {  // the inner loop is constant
    data.x_support = data.y_support = data.weights_support = false;
  }
  const Keep of_query = is_fisher(operation) ? Keep::products
                        : query_gradient     ? Keep::gradient
                                             : Keep::values;
  if (support.n > 0) {
    support =
        make_stage(graph, sample, support.n, support_sets() > 1 ? Data::per_step_support : Data::support,
                   products ? Keep::products : Keep::gradient, true, traits, data.x_support, data.y_support);
  }
  if (query.n > 0) {
    const bool predicts = operation == Operation::predict || operation == Operation::predict_backward;
    query = make_stage(graph, sample, query.n, Data::query, of_query, !predicts, traits, data.x_query,
                       data.y_query);
  }
  if (data.any()) place_data_gradients();
  const int64_t queries = std::max<int64_t>(static_cast<int64_t>(query_steps.size()), 1);
  const int differentiated = steps - first_differentiated();
  const int products_of_steps = second_order()  ? differentiated
                                : is_implicit() ? graph.meta_gradient.cg_steps
                                                : 0;
  work = 3 * queries * query.work + (3 * std::max(steps, 1) + 6 * products_of_steps) * support.work;
  const bool support_pass = steps > 0 || is_implicit() || at_own_parameters(operation);
  const bool keeps_all = operation == Operation::kept_fisher;
  const bool keeps = (second_order() || is_implicit()) && (keeps_all || !graph.recompute);
  const int64_t most = keeps_all ? INT64_MAX : support.tiles == 1 ? traits.saved_bytes : traits.kept_bytes;
  const int64_t bytes = support.tiles * support.step_size * element_bytes;
  saved_steps = keeps && !is_implicit() && differentiated * bytes <= most ? differentiated
                : support_pass                                            ? 1
                                                                          : 0;
  kept_tiles = keeps && bytes <= most ? support.tiles : 1;
  const bool in_segments = graph.segments && keeps_parameters() && !keeps_all;
  segment = in_segments ? std::max(static_cast<int>(std::ceil(std::sqrt(steps - first_kept()))), 1) : 1;
}

void Problem::place_data_gradients() {
  const DataGradient& data = graph.data_gradient;
  auto take = [&](bool wanted, int64_t copies, const Stage& stage, int64_t width) {
    return std::exchange(data_size, data_size + (wanted ? copies * stage.n * width : 0));
  };
  auto width = [&](const Stage& stage) { return target_columns(graph.loss, stage); };
  const int64_t queries = std::max<int64_t>(static_cast<int64_t>(query_steps.size()), 1);
  data_size = 0;
  x_support_at = take(data.x_support, steps, support, support.values[0].size);
  y_support_at = take(data.y_support, steps, support, width(support));
  x_query_at = take(data.x_query, queries, query, query.n ? query.values[0].size : 0);
  y_query_at = take(data.y_query, queries, query, query.n ? width(query) : 0);
  weights_support_at =
      take(data.weights_support, 2 * steps, support, support.n ? support.values[support.output].size : 0);
}

/// Of a parameter of `size` elements.
Source Problem::source(const Rate& rate, int64_t size, int64_t step) const {
  Source found{rate.constant};
  if (rate.slot < 0) return found;
  const RateTensor& tensor = rate_tensors[rate.slot];
  const int64_t own = std::min(step, tensor.steps - 1);
  const int64_t offset = rate.per_step ? own * (rate.elementwise ? size : 1) : 0;
  found.at = rate_at[rate.slot] + offset;
  if (tensor.learned) found.grad_at = rate_grad_at[rate.slot] + offset;
  found.elementwise = rate.elementwise;
  return found;
}

void Problem::slice_rates() {
  int64_t most_steps = 1;
  for (const RateTensor& rate : rate_tensors) most_steps = std::max(most_steps, rate.steps);
  slices.resize(most_steps);
  for (int64_t k = 0; k < most_steps; ++k) {
    for (size_t i = 0; i < updates.size(); ++i) {
      const int64_t size = graph.parameters[i].size;
      if (graph.parameters[i].role != Role::adapted) continue;
      const Source rate = source(updates[i].rate(), size, k);
      slices[k].push_back({packing.at[i], size, rate.constant, rate.at, rate.grad_at, rate.elementwise});
    }
  }
}

void Problem::slice_updates() {
  bool plain = graph.clip.is_none();
  for (size_t i = 0; i < updates.size(); ++i) {
    plain = plain && (graph.parameters[i].role != Role::adapted || updates[i].is_plain());
  }
  if (updates.empty() || plain) return;
  update_slices.resize(slices.size());
  for (size_t k = 0; k < slices.size(); ++k) {
    for (size_t i = 0; i < updates.size(); ++i) {
      if (graph.parameters[i].role != Role::adapted) continue;
      UpdateSlice slice{packing.at[i], graph.parameters[i].size, packing.adapted, updates[i].form};
      slice.clip = graph.clip;
      for (int h = 0; h < kHyperparameters; ++h) {
        slice.hyper[h] = source(updates[i].hyper[h], slice.size, static_cast<int64_t>(k));
        slice.elementwise |= slice.hyper[h].elementwise;
        slice.learns |= slice.hyper[h].grad_at != kNowhere;
      }
      for (int j = 0; j < kMostStates; ++j) slice.start[j] = source(updates[i].start[j], slice.size, 0);
      slice.factors = updates[i].factors;
      for (int f = 0; f < slice.factors; ++f) {
        slice.factor[f] = source(updates[i].factor[f], slice.size, 0);
        slice.factor_form[f] = updates[i].factor_form[f];
        learns_factors |= slice.factor[f].grad_at != kNowhere;
      }
      factors = std::max(factors, slice.factors);
      update_slices[k].push_back(slice);
    }
  }
}

int64_t Problem::state_size() const {
  int states = 0;
  if (has_optimizer()) {
    for (const UpdateSlice& slice : update_slices[0]) states = std::max(states, states_of(slice.form));
  }
  return states * packing.adapted;
}

bool Problem::is_small_network(bool Properties::* has_kind) const {
  for (const Stage* stage : {&support, &query}) {
    for (const Stage::Step& step : stage->steps) {
      const Layer& l = step.layer;
      if (!(properties(l.kind).*has_kind)) return false;
      if (l.kind == Kind::conv2d && !is_linear(l)) return false;
    }
  }
  return true;
}

bool Problem::runs_in_lanes() const { return is_small_network(&Properties::in_lanes) && !is_tiled(); }
bool Problem::runs_in_megakernel() const {
  const bool has_functions = std::all_of(graph.nodes.begin(), graph.nodes.end(), [](const Node& node) {
    return node.layer.kind != Kind::pointwise || in_megakernel(node.layer.function);
  });
  return has_functions && !has_optimizer() && is_small_network(&Properties::in_megakernel);
}

int64_t Problem::task_size() const {
  return support.tiles * support.fixed_size + regions() * support.step_size +
         query_regions() * query.step_size + shared_size() +
         whole_lines(std::max(support.scratch_size, query.scratch_size)) +
         kept_parameters() * packing.adapted + kept_gradients() * packing.adapted + packing.adapted +
         packing.trainable + whole_lines(weighs_queries() ? 1 : 0) +
         (kept_states() + (has_update_adjoint() ? 1 : 0)) * state_size() +
         kept_clips() * whole_lines(kClipNumbers) + factors * packing.adapted +
         (is_implicit() ? packing.adapted + whole_lines(2) : 0);
}

}  // namespace maml
