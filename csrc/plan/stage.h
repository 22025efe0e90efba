// A plan on the samples of one call: shapes and memory.
#pragma once

#include <array>

#include "plan/graph.h"

namespace maml {

/// A graph with the shapes of one call, on n samples of one task, and the offset of every value, tangent and
/// cotangent in the task's workspace. If no layer mixes samples, the samples are processed in tiles, one
/// after the other in the same memory, so that it does not grow with n. The sizes of tiles differ by at most
/// one. Offsets count elements. A value is
///   active    if it depends on a parameter that is not frozen, or on data that have a gradient: it has a
///   cotangent, if the loss depends on it; moving    if it depends on an adapted parameter: it changes in
///   every inner step and has a tangent; stepwise  if it depends on a parameter with slots, on a random mask,
///   or on data of which each inner step has its own: it changes in every inner step, moving or not.
/// A value that is neither moving nor stepwise is computed once per task and kept in the `fixed` region,
/// which has a part for each tile. The others are in a `step` region; there may be one of them for every
/// inner step. Tangents are in a `tangent` region. Query values that are not active may be computed
/// concurrently with the inner loop, in memory that nothing else uses until then.
struct Stage {
  struct Value {
    int64_t size = 0;     // elements of one sample, or of the task if it has no samples
    bool samples = true;  // whether it has a part for each sample
    int parameter = -1;   // the parameter whose memory it is; -1: it is none
    bool target = false;  // whether it is the memory of the target
    bool active = false, moving = false, stepwise = false;
    bool leads = false;  // whether what is differentiated depends on it; otherwise it has no cotangent
    bool fixed = false;  // in the fixed region
    int64_t at = kNowhere, grad_at = kNowhere, dot_at = kNowhere, grad_dot_at = kNowhere;
    // For the output of a convolution whose only reader is a normalisation: the statistics that the
    // convolution computes, in the value's region, and those of its tangent pass, in the tangent region.
    int64_t statistics_at = kNowhere, statistics_dot_at = kNowhere;
    int root = 0;  // the value that has the same memory: itself, or the input of a layer that is a view
    int overwritten_by = -1;  // the value that is computed in place over this one; -1: none
  };
  struct Step {
    Layer layer;              // with n of the largest tile
    int64_t rows = 1;         // Shape::rows: layer.n is this multiple of the samples
    std::vector<int> inputs;  // roots
    int output = 0;
    std::vector<int> parameters;  // -1: absent
    // Whether a backward pass adds to the cotangent, because another reader of the value has written it
    // before.
    std::array<bool, kMostInputs> add_x{};
    std::array<bool, kMostParameters> add_w{};
    int64_t saved_at = kNowhere;      // in the region of its output
    int64_t saved_dot_at = kNowhere;  // in the tangent region
  };
  int64_t n = 0, tiles = 1;
  std::vector<Value> values;
  std::vector<Step> steps;          // without layers that are views
  int output = 0;                   // root of the prediction
  int differentiated = 0;           // root of what is differentiated: a computed loss, or the prediction
  int64_t target_width = 0;         // numbers that a computed loss compares for one sample
  std::vector<int64_t> prediction;  // the user's shape of one sample of it
  int64_t loss_at = kNowhere;       // what the loss saves, in the step region
  bool has_constants = false;       // there are steps whose output is not active
  int64_t constants_scratch_at = kNowhere;  // query: the scratch of these steps, in the step region
  int64_t fixed_size = 0, step_size = 0, tangent_size = 0, scratch_size = 0;
  int64_t work = 0;  // approximate multiply-adds of one forward pass over all samples

  /// The first sample of a tile; n for tile `tiles`.
  int64_t first(int64_t tile) const { return tile * n / tiles; }
};

/// The c of a loss's target (Target::from).
inline int64_t target_columns(Loss loss, const Stage& stage) {
  return loss == Loss::computed ? stage.target_width : stage.values[stage.output].size;
}

/// The passes that a stage will run, which determine how long its memory is needed.
enum class Keep {
  values,    // forward only: a value is needed until its last reader
  gradient,  // forward and backward: a cotangent is needed until its layer has read it
  products   // Hessian-vector products later: values and cotangents stay
};

/// support: the data of the inner loop; only moving values need a cotangent, and values that do not move are
/// fixed. per_step_support: the same, of which each inner step has its own. query: the data of the outer
/// loop; all active values need a cotangent.
enum class Data { support, per_step_support, query };

/// The stage of `graph` for n samples of the user's shape `sample`: [c], [c, length], [c, height, width] or
/// any other number of axes. Throws std::invalid_argument where shapes do not fit a layer, and Unsupported
/// where no fused layer takes them.
/// `has_target`: the call has targets, so that a computed loss is computed. `x_active`, `y_active`: its
/// input, and the target of a computed loss, have a gradient; their cotangents are the caller's memory.
Stage make_stage(const Graph& graph, const std::vector<int64_t>& sample, int64_t n, Data data, Keep keep,
                 bool has_target, const LayerTraits& traits, bool x_active = false, bool y_active = false);

/// Lets linear layers read images as they are, channels last, where their input is a flattened image: the
/// flatten becomes a view, and the weight, [rows, c, h w] in the user's order, has the h w pixels as taps. A
/// flatten stays where it has other readers, and in a graph that the megakernel would serve without it.
void read_images_unflattened(Graph& graph, const std::vector<int64_t>& sample, int64_t n);

/// Whether a sample of a value depends on other samples otherwise than through a normalisation. The stage has
/// as many values as its graph has nodes, and one; or none, without samples.
bool combines_samples(const Graph& graph, const Stage& stage);

/// The second part of make_stage: memory (memory.cpp), after shapes and dependencies (stage.cpp).
void place_values(Stage& stage, Data data, Keep keep, const LayerTraits& traits);

}  // namespace maml
