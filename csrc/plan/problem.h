// What a call computes, with all that follows from its signature.
#pragma once

#include <algorithm>
#include <vector>

#include "layers/registry.h"
#include "plan/packing.h"
#include "plan/stage.h"
#include "plan/update.h"

namespace maml {

/// What one call computes, for every task t of [0, tasks):
enum class Operation {
  meta_gradient,     // loss, task losses, logits, support losses, and the gradient of the loss
  meta_loss,         // the same without the gradient
  adapt,             // the adapted parameters and support losses
  adapt_backward,    // the gradient of <cotangent, adapted parameters>
  predict,           // the prediction at each task's own parameters
  predict_backward,  // the gradient of <cotangent, prediction> by each task's own parameters
  loss_and_grad,     // the loss and its gradient at each task's own parameters
  hvp,               // the Hessian-vector product at each task's own parameters
  fisher,            // J^T F J v: J of the adapted parameters in theta, F of the policy on the query set
  kept_fisher        // the same for many v: a task's workspace keeps whatever does not depend on v
};

inline bool is_fisher(Operation o) { return o == Operation::fisher || o == Operation::kept_fisher; }

/// Whether there is no inner loop, and each task has parameters of its own.
inline bool at_own_parameters(Operation o) {
  return o == Operation::predict || o == Operation::predict_backward || o == Operation::loss_and_grad ||
         o == Operation::hvp;
}
/// Whether the result is a gradient summed over tasks.
inline bool gives_gradient(Operation o) {
  return o == Operation::meta_gradient || o == Operation::adapt_backward || is_fisher(o);
}
/// Whether each task has an output with the shapes of the parameters.
inline bool gives_per_task(Operation o) {
  return o == Operation::adapt || o == Operation::predict_backward || o == Operation::loss_and_grad ||
         o == Operation::hvp;
}
/// Whether each task takes cotangents or directions with the shapes of the parameters.
inline bool takes_given(Operation o) {
  return o == Operation::adapt_backward || o == Operation::hvp || is_fisher(o);
}

/// A tensor of hyperparameters or initial states: of rates, mostly.
struct RateTensor {
  int64_t size;        // elements
  int64_t steps = 1;   // inner steps that it has values for
  int parameter = -1;  // elementwise: the parameter whose order of elements it has
  bool learned = false;
};

/// The rate of one adapted parameter in one inner step. Offsets are in packed vectors.
struct RateSlice {
  int64_t at, size;            // the parameter's elements
  double constant;             // the rate, if rate_at is kNowhere
  int64_t rate_at = kNowhere;  // the offset of the rate among the packed rates
  int64_t grad_at = kNowhere;  // the offset of its gradient in the result
  bool elementwise = false;    // one rate for each element
};

/// One step of conjugate gradients for (I + H / proximal) x = b, over the adapted parameters.
struct ConjugateStep {
  int64_t adapted, trainable;  // elements
  double proximal, tolerance;
  bool first;  // of the steps
};

/// The signature of a call, and everything that follows from it: computed once, shared by all calls with this
/// signature.
struct Problem {
  Graph graph;
  Operation operation;
  std::vector<Update> updates;  // one a parameter
  std::vector<RateTensor> rate_tensors;
  int steps = 0;
  bool first_order = false;
  // The k, ascending, for which the query loss at phi_k counts, weighted by the call. Empty: phi_steps only.
  std::vector<int> query_steps;
  bool weighted = false;        // samples have weights: the targets of the loss have a scale
  std::vector<int64_t> sample;  // shape of one sample
  int64_t element_bytes = 0;

  Packing packing;
  Stage support, query;
  std::vector<int64_t> rate_at;  // the offset of each rate tensor among the packed rates
  // The offset of each rate tensor's gradient in the result, after the trainable parameters; or kNowhere.
  std::vector<int64_t> rate_grad_at;
  int64_t rates_size = 0, result_size = 0;
  // Where the gradients of data stand in a task's part of Call::data_gradient: of the support set one for
  // each inner step, of the query set one for each query loss that counts. What the gradient of the support
  // weights follows from, in each inner step: the cotangent of the prediction, then its tangent along rate
  // times v.
  int64_t x_support_at = 0, y_support_at = 0, x_query_at = 0, y_query_at = 0, weights_support_at = 0;
  int64_t data_size = 0;
  std::vector<std::vector<RateSlice>> slices;  // for each inner step; later steps use the last
  // The same with all of the optimizer; none where every update is phi -= rate g, which `slices` serve.
  std::vector<std::vector<UpdateSlice>> update_slices;
  int factors = 0;  // of the transform of the gradient: the most of a parameter
  bool learns_factors = false;
  int64_t work = 0;  // approximate multiply-adds of one task
  // The number of inner steps that have step regions: all that are differentiated through; 1 where the
  // gradient pass is run again; 0 without a support pass. And how many tiles of the support set have regions
  // of their own: all of them, or one.
  int saved_steps = 1;
  int64_t kept_tiles = 1;
  int segment = 1;  // inner steps of a segment; 1: every phi is stored

  /// Throws Unsupported where the fused passes do not compute the operation.
  Problem(Graph graph, Operation operation, std::vector<Update> updates, std::vector<RateTensor> rate_tensors,
          const std::vector<int64_t>& sample, int64_t n_support, int64_t n_query, int steps, bool first_order,
          const std::vector<int>& query_steps, bool weighted, int64_t element_bytes,
          const LayerTraits& traits);
  /// Makes the stages again for other LayerTraits::tile.
  void lay_out(const LayerTraits& traits);

  bool second_order() const {
    return !first_order && steps > 0 && unrolls() &&
           (operation == Operation::meta_gradient || operation == Operation::adapt_backward ||
            is_fisher(operation));
  }
  bool unrolls() const { return graph.meta_gradient.kind == Outer::unrolled; }
  bool is_reptile() const { return graph.meta_gradient.kind == Outer::reptile; }
  /// Whether a linear system with the Hessian at phi_steps is solved.
  bool is_implicit() const {
    return graph.meta_gradient.kind == Outer::implicit && operation == Operation::meta_gradient;
  }
  /// Of a task's support losses: one for each inner step and, behind them, the relative residual of an
  /// implicit gradient's linear system.
  int64_t loss_columns() const { return steps + (is_implicit() ? 1 : 0); }
  bool is_proximal() const { return graph.meta_gradient.proximal > 0 && !at_own_parameters(operation); }
  /// The first inner step that is differentiated through; what the steps before it add to theta is constant.
  int first_differentiated() const {
    const int truncate = graph.meta_gradient.truncate;
    return truncate ? std::max(steps - truncate, 0) : 0;
  }
  /// The number of support sets of a task: one for each inner step, or the same for all.
  int64_t support_sets() const {
    return graph.per_step_support && !at_own_parameters(operation) ? std::max(steps, 1) : 1;
  }
  bool weighs_queries() const { return !query_steps.empty(); }
  /// The number of query losses that count before that at phi_k.
  int64_t query_place(int k) const {
    return std::lower_bound(query_steps.begin(), query_steps.end(), k) - query_steps.begin();
  }
  /// Whether the query loss at phi_k counts.
  bool queries(int k) const {
    return weighs_queries() ? std::binary_search(query_steps.begin(), query_steps.end(), k) : k == steps;
  }
  /// The last k for which phi_k receives a gradient.
  int last_query() const { return weighs_queries() ? query_steps.back() : steps; }
  const std::vector<RateSlice>& rates_of(int step) const {
    return slices[std::min<size_t>(step, slices.size() - 1)];
  }
  /// Whether there is more to an update than phi -= rate g.
  bool has_optimizer() const { return !update_slices.empty(); }
  const std::vector<UpdateSlice>& updates_of(int step) const {
    return update_slices[std::min<size_t>(step, update_slices.size() - 1)];
  }
  bool clips_by_norm() const { return has_optimizer() && graph.clip.by_norm(); }
  /// Whether a gradient goes back through the updates of an optimizer.
  bool has_update_adjoint() const {
    return has_optimizer() && steps > 0 && unrolls() &&
           (operation == Operation::meta_gradient || operation == Operation::adapt_backward);
  }
  /// Elements of the optimizer's states in one inner step.
  int64_t state_size() const;
  /// Whether the executors of small networks take it: the CPU's tasks in lanes, the CUDA megakernel.
  bool runs_in_lanes() const;
  bool runs_in_megakernel() const;
  bool is_tiled() const { return support.tiles > 1 || query.tiles > 1; }
  bool learns_rates() const { return result_size > packing.trainable; }
  /// The numbers of stored states phi_1 .. phi_steps and of stored gradients g_0 .. g_steps-1, and their
  /// places. What is before step `first_kept` is stored in one place, one after the other. Of the steps from
  /// there on, in segments, each segment's first phi has a place of its own; what else is stored of one has
  /// the same places for all segments. No gradients are stored where each can overwrite its phi.
  bool keeps_parameters() const {
    return second_order() || weighs_queries() || has_update_adjoint() || (graph.segments && learns_rates());
  }
  int first_kept() const { return weighs_queries() ? 0 : first_differentiated(); }
  int kept_parameters() const { return std::max(kept_starts() + segment - 1, 1); }
  int kept_starts() const {  // phi_0 is theta, which is not stored
    return keeps_parameters() ? (steps - first_kept()) / segment + (first_kept() > 0) : 0;
  }
  int parameter_place(int k) const {
    if (!keeps_parameters()) return 0;
    const int step = std::max(k - first_kept(), 0), in_segment = step % segment;
    return in_segment ? kept_starts() + in_segment - 1 : step / segment - (first_kept() == 0);
  }
  int kept_gradients() const {
    if (keeps_gradients()) return segment > 1 ? segment : steps - first_kept();
    return keeps_parameters() && first_kept() == 0 ? 0 : 1;
  }
  bool keeps_gradients() const { return learns_rates() || has_update_adjoint(); }
  int gradient_place(int k) const {
    const int step = keeps_gradients() ? std::max(k - first_kept(), 0) : 0;
    return segment > 1 ? step % segment : step;
  }
  /// The same of the states of an optimizer before each step, and of what clipping by norm hands on.
  int kept_states() const {
    return !has_optimizer() ? 0 : has_update_adjoint() ? segments() + segment - 1 : 1;
  }
  int state_place(int k) const {
    if (!has_update_adjoint()) return 0;
    const int step = std::max(k - first_kept(), 0), in_segment = step % segment;
    return in_segment ? segments() + in_segment - 1 : step / segment;
  }
  int segments() const { return (steps - first_kept() + segment - 1) / segment; }
  int kept_clips() const { return clips_by_norm() ? kept_states() : 0; }
  /// Whether inner step k is the last of a segment, except for the last segment.
  bool ends_segment(int k) const {
    return segment > 1 && k + 1 < steps && k >= first_kept() && (k + 1 - first_kept()) % segment == 0;
  }
  /// The index of the step region of a tile in an inner step, and the number of regions.
  int64_t region(int step, int64_t tile) const {
    const int place = saved_steps > 1 ? std::max(step - first_differentiated(), 0) : 0;
    return place * kept_tiles + (kept_tiles > 1 ? tile : 0);
  }
  int64_t regions() const { return saved_steps * kept_tiles; }
  /// The number of step regions of the query set that are kept after a pass.
  int64_t query_regions() const { return operation == Operation::kept_fisher ? query.tiles : 0; }
  /// Elements of the memory that passes share one after the other: tangents, and the query state that is not
  /// kept.
  int64_t shared_size() const {
    return std::max(support.tangent_size, (query_regions() ? 0 : query.step_size) + query.tangent_size);
  }
  /// Whether the state of the gradient pass of an inner step still exists when its Hessian-vector product is
  /// computed.
  bool keeps_state_of(int step) const {
    return support.tiles == kept_tiles && (saved_steps > 1 || step + 1 == steps);
  }
  /// Elements of the workspace for one task in flight.
  int64_t task_size() const;

 private:
  bool is_small_network(bool Properties::* has_kind) const;
  void slice_rates();
  void slice_updates();
  Source source(const Rate& rate, int64_t size, int64_t step) const;
  void place_data_gradients();
};

}  // namespace maml
