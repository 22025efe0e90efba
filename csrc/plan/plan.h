// What a plan is. Graph: nodes in topological order over numbered values and parameters, as plan.py traced
// them from the user's module, without shapes. Stage: the same graph with the shapes of one call, and the
// place of every value, tangent and cotangent in the workspace of one task.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "layers/layer.h"

namespace maml {

/// The call is right, but the fused layers cannot serve it: the general path can.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// adapted: the inner loop changes it. outer: only the outer loop does. frozen: a constant.
enum class Role { adapted, outer, frozen };

/// slots: of a parameter with a value of its own for each inner step, how many; steps beyond the last slot
/// read it too. The inner loop changes no such parameter.
struct Parameter {
  int64_t size;  // elements, of all slots
  int64_t rows,
      taps;  // a weight [rows, size / rows / taps, taps] in the user's order; others have rows = taps = 1
  Role role;
  int64_t slots = 1;
};

struct Node {
  Layer layer;                                 // n, in and out are filled in by make_stage
  std::string name;                            // the user's module, for error messages
  std::string norm_name, sum_name, pool_name;  // of a chain in one: its BatchNorm, sum and max-pool
  std::array<int, 2> inputs{-1, -1};
  std::array<int, kMostParameters> parameters{-1, -1, -1, -1};
  int64_t in_features = 0;   // what the layer's parameters ask of its input: channels; 0: anything
  int64_t out_features = 0;  // channels of its output; 0: as its input
  std::array<int64_t, 2> pad_end{0, 0};  // padding below and to the right (convolution and pools)
  // Axes of a sample that the layer takes, each a bit 1 << axes: 1 features, 2 a signal, 3 an image; 0: any.
  unsigned ranks = 0;
  int out_rank = 0;             // axes of its output; 0: as its input
  std::vector<int64_t> sample;  // group_norm: the shape that it takes, as if it were features; empty: any
};

/// Value 0 is the input; node i writes value i + 1; the last value is the prediction.
struct Graph {
  std::vector<Node> nodes;
  std::vector<Parameter> parameters;
  Loss loss = Loss::cross_entropy;
  Precision precision = Precision::float32;
  bool recompute = false;  // run the gradient pass again for each Hessian-vector product, whatever the memory
};

constexpr int64_t kNowhere = -1;

/// Rounded up to whole cache lines of float, so that every tensor in a workspace starts on one.
inline int64_t whole_lines(int64_t elements) { return (elements + 15) / 16 * 16; }

/// The graph on n samples of one shape. Where no layer makes a sample depend on another, they may go through
/// it in tiles, one after the other in the same memory, so that this does not grow with n; the tiles' sizes
/// differ by one at most. Offsets count elements of T. A value is
///   active   if it depends on a parameter that is not frozen: it has a cotangent,
///   moving   if it depends on an adapted one: it changes from step to step and has a tangent,
///   stepwise if it depends on one with slots: it changes from step to step, moving or not.
/// What neither moves nor is stepwise is computed once per task and stands in the `fixed` region, one for
/// every tile; the rest stands in a `step` region, of which there may be one for every inner step; tangents
/// stand in a `tangent` region. What is not even active can be computed at any time before the rest: of a
/// query, beside the inner loop, in memory that nothing else uses until then.
struct Stage {
  struct Value {
    int64_t size = 0;  // of one sample
    bool active = false, moving = false, stepwise = false;
    bool fixed = false;  // stands in the fixed region
    int64_t at = kNowhere, grad_at = kNowhere, dot_at = kNowhere, grad_dot_at = kNowhere;
    // Of a convolution's output that one normalisation alone reads: in its own region, and in the tangent
    // region.
    int64_t statistics_at = kNowhere, statistics_dot_at = kNowhere;
    int root = 0;   // the value that this one is (a flatten or channels_last that moves nothing)
    int heir = -1;  // the value that takes its place: a function's of it, which nobody else reads
  };
  struct Step {
    Layer layer;                // on the largest tile
    std::array<int, 2> inputs;  // roots
    int output;
    std::array<int, kMostParameters> parameters;
    std::array<bool, 2> add_x;
    std::array<bool, kMostParameters> add_w;
    int64_t saved_at;                 // in the region of its output
    int64_t saved_dot_at = kNowhere;  // in the tangent region
  };
  int64_t n = 0, tiles = 1;
  std::vector<Value> values;
  std::vector<Step> steps;                  // without those that move nothing
  int output = 0;                           // root of the prediction
  std::vector<int64_t> prediction;          // shape of one sample of it, as the user sees it
  int64_t loss_at = kNowhere;               // what the loss keeps, in the step region
  bool has_constants = false;               // steps whose output is not active
  int64_t constants_scratch_at = kNowhere;  // query: theirs, in the step region
  int64_t fixed_size = 0, step_size = 0, tangent_size = 0, scratch_size = 0;
  int64_t work = 0;  // multiply-adds of one forward pass over all samples, roughly

  /// The first sample of a tile; of tile `tiles`: n.
  int64_t first(int64_t tile) const { return tile * n / tiles; }
};

/// Where a parameter stands in a packed parameter vector. Order: adapted, outer, outer with slots, frozen; so
/// that the first `adapted` elements are what the inner loop changes, the first `trainable` ones what has a
/// gradient, and those from `stepwise` on what a pass has only a part of. Every parameter starts on a cache
/// line; what stands between two is never read for its value. Slots stand one behind the other.
struct Packing {
  std::vector<int64_t> at;
  int64_t adapted = 0, stepwise = 0, trainable = 0, total = 0;
  explicit Packing(const std::vector<Parameter>& parameters);
  /// Where the slot of parameter p for an inner step stands.
  int64_t at_step(int p, int step) const {
    return at[p] + std::min<int64_t>(step, slots_[p] - 1) * slot_size_[p];
  }

 private:
  std::vector<int64_t> slots_, slot_size_;
};

/// What the passes of a stage need decides how long its memory lives.
enum class Keep {
  values,    // forward only: a value is dead after its last reader
  gradient,  // forward and backward: a cotangent is dead once its node has read it
  products   // Hessian-vector products later: values and cotangents stay
};

/// support: the inner loop's data; only what moves needs a cotangent, and what does not move is fixed.
/// query: the outer loop's data; everything active needs one.
enum class Data { support, query };

/// Shapes `graph` for n samples of shape `sample` (c, h, w; fewer dimensions allowed).
/// Throws std::invalid_argument where shapes do not fit a layer, Unsupported where no fused layer fits them.
Stage make_stage(const Graph& graph, const std::vector<int64_t>& sample, int64_t n, Data data, Keep keep,
                 const LayerTraits& traits);

/// The graph with chains in one layer each, where nobody else reads the values between (chains.cpp). `chain`
/// is Kind::block or Kind::conv_block, whichever the backend has.
Graph with_chains(const Graph& graph, Kind chain);

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
  /// Whether all layers are linear layers, functions and sums of features: those of a small network.
  bool is_linear() const;
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
