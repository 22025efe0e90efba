// What a call computes, with all that follows from its signature.
#pragma once

#include <algorithm>
#include <vector>

#include "plan/packing.h"
#include "plan/stage.h"

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

/// No inner loop: each task comes with parameters of its own.
inline bool at_own_parameters(Operation o) {
  return o == Operation::predict || o == Operation::predict_backward || o == Operation::loss_and_grad ||
         o == Operation::hvp;
}
/// A gradient summed over tasks.
inline bool gives_gradient(Operation o) {
  return o == Operation::meta_gradient || o == Operation::adapt_backward || is_fisher(o);
}
/// Something of the parameters' shapes for each task.
inline bool gives_per_task(Operation o) {
  return o == Operation::adapt || o == Operation::predict_backward || o == Operation::loss_and_grad ||
         o == Operation::hvp;
}
/// Cotangents or directions of the parameters' shapes for each task.
inline bool takes_given(Operation o) {
  return o == Operation::adapt_backward || o == Operation::hvp || is_fisher(o);
}

/// The inner learning rate of one parameter: a constant, or a tensor of the caller's.
struct Rate {
  double constant = 0;
  int slot = -1;             // the tensor, or -1 for the constant
  bool per_step = false;     // its first axis counts inner steps; steps beyond it repeat the last
  bool elementwise = false;  // it has the parameter's shape behind that
};
struct RateTensor {
  int64_t size;        // elements
  int64_t steps = 1;   // of which so many steps
  int parameter = -1;  // elementwise: whose order of elements it has
  bool learned = false;
};

/// The rate of one adapted parameter in one inner step, where all of them are packed.
struct RateSlice {
  int64_t at, size;            // of the parameter's elements
  double constant;             // the rate, unless
  int64_t rate_at = kNowhere;  // it stands there among the packed rates
  int64_t grad_at = kNowhere;  // of its gradient, in the result
  bool elementwise = false;    // one rate an element
};

/// The signature of a call with everything that follows from it: computed once, used by every call alike.
struct Problem {
  Graph graph;
  Operation operation;
  std::vector<Rate> rates;  // one a parameter
  std::vector<RateTensor> rate_tensors;
  int steps = 0;
  bool first_order = false;
  // Ascending: the k at whose phi_k the query loss counts, with weights of the call's; none: phi_steps alone.
  std::vector<int> query_steps;
  std::vector<int64_t> sample;  // shape of one sample
  int64_t element_bytes = 0;

  Packing packing;
  Stage support, query;
  std::vector<int64_t> rate_at;  // where each rate tensor stands, packed
  std::vector<int64_t>
      rate_grad_at;  // where its gradient stands behind the trainable parameters; or kNowhere
  int64_t rates_size = 0, result_size = 0;
  std::vector<std::vector<RateSlice>> slices;  // of the inner steps; those beyond the last repeat it
  int64_t work = 0;                            // multiply-adds of one task, roughly
  // Step regions: `steps`, or 1, where the gradient pass is run again, or 0 without a support pass; of each,
  // one for every tile of the support set, or one for all.
  int saved_steps = 1;
  int64_t kept_tiles = 1;

  Problem(Graph graph, Operation operation, std::vector<Rate> rates, std::vector<RateTensor> rate_tensors,
          const std::vector<int64_t>& sample, int64_t n_support, int64_t n_query, int steps, bool first_order,
          const std::vector<int>& query_steps, int64_t element_bytes, const LayerTraits& traits);
  /// Makes the stages anew, as the constructor has done, for layers that differ in LayerTraits::tile.
  void lay_out(const LayerTraits& traits);

  bool second_order() const {
    return !first_order && steps > 0 &&
           (operation == Operation::meta_gradient || operation == Operation::adapt_backward ||
            is_fisher(operation));
  }
  bool weighs_queries() const { return !query_steps.empty(); }
  /// Whether the query loss at phi_k counts.
  bool queries(int k) const {
    return weighs_queries() ? std::binary_search(query_steps.begin(), query_steps.end(), k) : k == steps;
  }
  /// The last k at which anything flows back into phi_k.
  int last_query() const { return weighs_queries() ? query_steps.back() : steps; }
  const std::vector<RateSlice>& rates_of(int step) const {
    return slices[std::min<size_t>(step, slices.size() - 1)];
  }
  /// Whether all layers are those that the executors of small networks have (Declaration::in_small_networks).
  bool is_small_network() const;
  bool is_tiled() const { return support.tiles > 1 || query.tiles > 1; }
  bool learns_rates() const { return result_size > packing.trainable; }
  /// Kept states phi_1 .. phi_steps, and gradients g_0 .. g_steps-1; none where each can stand in its phi's
  /// place.
  bool keeps_parameters() const { return second_order() || weighs_queries(); }
  int kept_parameters() const { return keeps_parameters() ? std::max(steps, 1) : 1; }
  int kept_gradients() const { return learns_rates() ? steps : keeps_parameters() ? 0 : 1; }
  /// The step region of a tile in an inner step, and how many regions there are.
  int64_t region(int step, int64_t tile) const {
    return (saved_steps > 1 ? step * kept_tiles : 0) + (kept_tiles > 1 ? tile : 0);
  }
  int64_t regions() const { return saved_steps * kept_tiles; }
  /// Step regions of the query set that outlive a pass.
  int64_t query_regions() const { return operation == Operation::kept_fisher ? query.tiles : 0; }
  /// Elements of what passes share one after the other: tangents, and a query's state that is not kept.
  int64_t shared_size() const {
    return std::max(support.tangent_size, (query_regions() ? 0 : query.step_size) + query.tangent_size);
  }
  /// Whether what the gradient pass of an inner step has left is still there for its product.
  bool keeps_state_of(int step) const {
    return support.tiles == kept_tiles && (saved_steps > 1 || step + 1 == steps);
  }
  /// Elements of the workspace of one task at work.
  int64_t task_size() const;

 private:
  void slice_rates();
};

}  // namespace maml
