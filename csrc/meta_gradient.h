// The MAML meta-gradient (Finn, Abbeel, Levine 2017, equation 1), written once for every backend.
//
// Per task, with parameters theta, support loss L_s, query loss L_q, inner learning rates alpha_k, K steps:
//
//   inner loop       phi_0 = theta,   g_k = grad L_s(phi_k),   phi_{k+1} = phi_k - alpha_k g_k
//   query gradient   v_K = grad L_q(phi_K)
//   outer loop       v_k = v_{k+1} - H_k (alpha_k v_{k+1}),    dL_q/dalpha_k = -g_k v_{k+1}
//
// v_0 is the meta-gradient. H_k, the Hessian of L_s at phi_k, maps a direction on the adapted parameters to a
// cotangent on all trainable ones, so parameters that are not adapted get their exact gradient too. First
// order (FOMAML) drops the Hessian terms. A Hessian-vector product is forward-over-reverse (Pearlmutter
// 1994): the tangents of a forward and a backward pass, from stored values and cotangents; no graph is built.
//
// Truncated (Shaban, Cheng, Hatch, Boots 2019): the last steps alone are differentiated through.
// What the others add to theta is a constant, so v_k of the first of the last steps is the meta-gradient.
// Reptile (Nichol, Achiam, Schulman 2018, algorithm 2): theta - phi_K in place of the meta-gradient.
// Implicit (iMAML: Rajeswaran, Finn, Kakade, Levine 2019): the loss of every inner step has the further term
// lambda / 2 |phi - theta|^2. At its minimum phi_K, with H_K the Hessian of L_s there and H'_K its rows of
// the parameters that are not adapted,
//
//   (I + H_K / lambda) x = grad L_q(phi_K)      the meta-gradient of the adapted parameters is x,
//                                               of the others that of L_q less H'_K x / lambda
//
// whatever the path to phi_K. Conjugate gradients solve it (Hestenes, Stiefel 1952): a product with H_K a
// step, whose other rows add up to H'_K x.
//
// Inner optimizers (plan/update.h): (phi_{k+1}, s_{k+1}) = update(phi_k, s_k, g_k), with states s_k, and with
// g_k clipped if so wanted. Let sigma_k be the cotangent of s_k. The adjoint of the update takes v_{k+1} and
// sigma_{k+1} to the cotangent of phi_k itself, to sigma_k, and to gamma_k, the cotangent of g_k. v_k is the
// first of them plus H_k gamma_k. So the direction of the product is -gamma_k, of descent alpha_k v_{k+1}.
//
// Transforms of the gradient (Meta-Curvature: Park, Oliva 2019): the update takes P g_k in place of g_k, with
// P = P_F ... P_1 a product of linear maps of each parameter (FactorForm). So gamma_k goes through the
// transposes, from the last to the first, and the gradient of P_f is the outer product of the cotangent of
// what it gives with what it is given. P g_k is computed again on the way back.
//
// Multi-step loss (Antoniou, Edwards, Storkey 2019, equation 4): the query loss is sum_k w_k L_q(phi_k). Then
// v_K = w_K grad L_q(phi_K), and w_k grad L_q(phi_k) is added to each earlier v_k.
// Per-step parameters: a parameter with slots has one value per inner step. The support pass at phi_k and the
// query pass at phi_{k+1} read slot k. Their gradients and products go to slot k and are zero elsewhere.
// Per-step support: inner step k has a support set of its own, which g_k and H_k are of.
// Gradients of data, of value 0 and of the target:
//
//   query set     dL_q/dx = the cotangent of x in the query pass
//   support set   dL_q/dx_k = -d/dx <g_k, alpha_k v_{k+1}> = -R{cotangent of x} in the Hessian-vector product
//                 of step k; that of a set of all steps is the sum over k
//   its weights   from the cotangent of the prediction and its tangent in that product, of each sample
//
// Without these signs and sums, they are handed out as they are found.
// Random masks: they follow from the seed of the call, the task, the set and k, so that every pass at phi_k
// has the same ones.
// Tiles: the samples of a stage may run in tiles, one after the other. Gradients, products and losses are
// summed in the order of the tiles. If the states of all tiles are too large, only the last one is kept, and
// a Hessian-vector product runs the gradient pass of each tile again.
//
// Memory: the caller's workspace, laid out by `Problem` (plan/problem.h). Nothing is allocated here. Only a
// backend dereferences pointers, so they may be symbolic addresses (cuda/run/address.h).
#pragma once

#include <algorithm>

#include "layers/kinds.h"
#include "plan/problem.h"

namespace maml {

/// Which values a forward pass computes. moving: those that change from one inner step to the next. constant:
/// those that depend on no trainable parameter. active: those that depend on one.
enum class Part { all, moving, constant, active };

/// The four passes of a stage, over one tile of one task's samples. The first tile overwrites gradients and
/// products, later tiles add to them. `Backend` provides the four passes of each layer.
template <class Backend, class T>
struct Walk {
  const Backend& backend;
  const Packing& packing;
  const Stage& stage;
  int64_t tile;
  int slot;                             // of parameters with slots: the one that is read and written
  const T* x;                           // [n, ...], the task's samples
  const T* y;                           // [n, ...], what a computed loss compares
  const T* theta;                       // all parameters, packed
  const T* phi;                         // the adapted parameters, packed: read in place of those in theta
  T *fixed, *step, *tangent, *scratch;  // memory regions, see Stage
  Stream stream;                        // of random masks
  int64_t n;                            // samples of the task: at most stage.n, which the memory is for
  // Where padding is among them, at their end: what each is of the loss [n], that of padding being zero.
  const T* shares = nullptr;
  // Where cotangents of the task's x and y go, or their tangents; null: not wanted.
  T *grad_of_x = nullptr, *grad_of_y = nullptr, *grad_dot_of_x = nullptr, *grad_dot_of_y = nullptr;

  int64_t first() const { return stage.first(tile); }
  int64_t samples() const { return std::min(stage.first(tile + 1), n) - first(); }
  T* value(int v) const { return (stage.values[v].fixed ? fixed : step) + stage.values[v].at; }
  const T* input(int v) const {
    const Stage::Value& input = stage.values[v];
    if (input.parameter >= 0) return parameter(input.parameter);
    if (input.target) return y + first() * input.size;
    return v == 0 ? x + first() * input.size : value(v);
  }
  T* grad(int v) const {
    return is_data(v) ? of_data(v, grad_of_x, grad_of_y) : at(step, stage.values[v].grad_at);
  }
  T* dot(int v) const { return at(tangent, stage.values[v].dot_at); }
  T* grad_dot(int v) const {
    return is_data(v) ? of_data(v, grad_dot_of_x, grad_dot_of_y) : at(tangent, stage.values[v].grad_dot_at);
  }
  T* prediction() const { return value(stage.output); }
  /// What the loss is taken of: the prediction, or what layers have computed as the loss.
  T* differentiated() const { return value(stage.differentiated); }

  void forward(Part part) const {
    for (const Stage::Step& s : stage.steps) {
      if (computes(part, stage.values[s.output])) backend.forward(layer(s), tensors(s));
    }
  }

  /// From grad(output) to all cotangents and the packed gradient [limit]; null: cotangents only.
  void backward(T* gradient, int64_t limit) const {
    for (auto s = stage.steps.rbegin(); s != stage.steps.rend(); ++s) {
      if (!grad(s->output)) continue;
      backend.backward(layer(*s), tensors(*s, {.gradient = gradient, .limit = gradient ? limit : 0}));
    }
  }

  /// From a direction on the adapted parameters [adapted] to the tangents of all values.
  void forward_tangent(const T* direction) const {
    for (const Stage::Step& s : stage.steps) {
      if (dot(s.output)) backend.forward_tangent(layer(s), tensors(s, {.direction = direction}));
    }
  }

  /// From grad_dot(output) to the packed Hessian-vector product [trainable].
  void backward_tangent(const T* direction, T* product) const {
    for (auto s = stage.steps.rbegin(); s != stage.steps.rend(); ++s) {
      if (!grad_dot(s->output)) continue;
      backend.backward_tangent(layer(*s), tensors(*s, {.direction = direction, .product = product}));
    }
  }

  T* loss_saved() const { return step + stage.loss_at; }

 private:
  static bool computes(Part part, const Stage::Value& y) {
    return part == Part::all        ? true
           : part == Part::moving   ? !y.fixed
           : part == Part::constant ? !y.active
                                    : y.active;
  }
  bool is_data(int v) const { return v == 0 || stage.values[v].target; }
  T* of_data(int v, T* of_x, T* of_y) const {
    T* start = v == 0 ? of_x : of_y;
    return start ? start + first() * stage.values[v].size : nullptr;
  }
  static T* at(T* region, int64_t offset) { return offset == kNowhere ? nullptr : region + offset; }

  /// The packed vectors that belong to the parameters in one pass. The gradient has `limit` elements.
  struct Packed {
    const T* direction = nullptr;
    T* gradient = nullptr;
    int64_t limit = 0;
    T* product = nullptr;
  };
  template <class P>
  P* parameter(int p, P* packed, int64_t limit) const {
    return !packed || p < 0 || packing.at[p] >= limit ? nullptr : packed + packing.at_step(p, slot);
  }
  const T* parameter(int p) const {
    return (packing.at[p] < packing.adapted ? phi : theta) + packing.at_step(p, slot);
  }

  Layer layer(const Stage::Step& s) const {
    Layer l = s.layer;
    l.n = samples() * s.rows;
    l.stream = stream;
    l.stream.samples = n;
    l.stream.first_sample = first();
    return l;
  }

  Tensors<T> tensors(const Stage::Step& s, const Packed& packed = {}) const {
    Tensors<T> t;
    t.y = value(s.output);
    t.grad_y = grad(s.output);
    t.y_dot = dot(s.output);
    t.grad_y_dot = grad_dot(s.output);
    for (size_t j = 0; j < s.inputs.size(); ++j) {
      t.x[j] = input(s.inputs[j]);
      t.add_x[j] = s.add_x[j];
      if (const int p = stage.values[s.inputs[j]].parameter; p >= 0) {
        t.add_x[j] |= tile > 0;
        t.grad_x[j] = parameter(p, packed.gradient, packed.limit);
        t.x_dot[j] = parameter(p, packed.direction, packing.adapted);
        t.grad_x_dot[j] = parameter(p, packed.product, packing.trainable);
        continue;
      }
      t.grad_x[j] = grad(s.inputs[j]);
      t.x_dot[j] = dot(s.inputs[j]);
      t.grad_x_dot[j] = grad_dot(s.inputs[j]);
    }
    for (size_t j = 0; j < s.parameters.size(); ++j) {
      t.add_w[j] = s.add_w[j] || tile > 0;
      const int p = s.parameters[j];
      if (p >= 0) t.w[j] = parameter(p);
      t.grad_w[j] = parameter(p, packed.gradient, packed.limit);
      t.w_dot[j] = parameter(p, packed.direction, packing.adapted);
      t.grad_w_dot[j] = parameter(p, packed.product, packing.trainable);
    }
    // Statistics belong to the value between a convolution and its normalisation; both layers use them.
    for (int v : {s.output, s.inputs[0]}) {
      const Stage::Value& y = stage.values[v];
      if (y.statistics_at != kNowhere) t.statistics = (y.fixed ? fixed : step) + y.statistics_at;
      if (y.statistics_dot_at != kNowhere) t.statistics_dot = tangent + y.statistics_dot_at;
    }
    t.saved = (stage.values[s.output].fixed ? fixed : step) + s.saved_at;
    t.saved_dot = at(tangent, s.saved_dot_at);
    t.scratch = scratch;
    if (shares && (s.layer.kind == Kind::batch_norm || s.layer.kind == Kind::norm_block)) t.x[1] = shares;
    return t;
  }
};

/// The tensors of one task.
template <class T>
struct Task {
  const T* theta;      // packed; of this task, or shared by all
  const T* x_support;  // in the user's layout, like all data; its sets follow each other
  Target<T> y_support;
  const T* x_query;
  Target<T> y_query;
  T* support_losses;  // [loss_columns()] or null
  T* query_loss;      // [1]
  T* logits;          // [n_query, ...]
  T* data_gradient;   // [Problem::data_size]
  T* result;          // [Problem::result_size]: v_0, then the gradients of the learned rates
  const T* given;     // packed v_K or direction (hvp, fisher), or the prediction's cotangent
  T* adapted;         // adapt: phi_K, packed
  bool prepared;      // kept_fisher: the workspace still holds the state of an earlier product on this data
  Stream stream;      // of random masks; `pass` is that of phi_0
  // How many samples each support set and the query set have, the first ones; padding behind them is not
  // looked at. Null: all of the stage.
  const int64_t *support_counts = nullptr, *query_count = nullptr;
};

/// The outputs of a gradient pass, each null if it is not wanted. `cotangent`: an input, of the prediction,
/// in place of the loss's.
template <class T>
struct PassOutputs {
  T *value = nullptr, *prediction = nullptr, *gradient = nullptr;
  int64_t limit = 0;  // elements of the gradient
  const T* cotangent = nullptr;
};

/// Whether a backend computes a pass of a stage as a whole, and not layer by layer. It then provides, in
/// place of the passes of layers and losses,
///   gradient(walk, part, target, outputs)               a target without y: there is no loss
///   product(walk, part, target, direction, product)     the Hessian-vector product
///   metric_gradient(walk, part, target, direction, out)  out = J^T F J direction, with J of the prediction
///   and F
///                                                        the policy's Fisher matrix
template <class Backend>
concept ComputesPasses = requires { typename Backend::PassWalk; };

/// Runs one operation on one task, in a workspace of Problem::task_size() elements. Besides the passes of the
/// layers, a backend provides (pointers marked * may be null: not wanted)
///   of_set(target, set)      the target of a support set, if sets do not follow each other in memory
///   loss(part, z, target, value*, grad_z*, saved*)           value [1] and its cotangent at the prediction z
///   loss_tangent(part, z, target, z_dot, saved, grad_z_dot)  the tangent of grad_z
///   metric(part, z, target, z_dot, grad_z)                   the policy's Fisher metric at z times z_dot
///   descend(rates, phi, g, next)                             next = phi - rate g
///   direction(rates, v, out)                                 out = rate v
///   retreat(size, product, v, rates, out*)                   v -= product, then out = rate v
///   rate_gradient(rates, g, v, result)                       each rate's gradient -= its sum of g v
/// and in place of these four, where the problem has an optimizer, with `updates` of Problem::updates_of(k):
///   start(updates, state)                                    the states before the first step
///   clip(updates, g, clip)                                   kClipNumbers of the norm of g
///   update(updates, before, next, next_state*)               the step; may be in place
///   hyper_gradients(updates, before, v, sigma*, result)      adds to the gradients of hyperparameters;
///                                                            sigma null: zero
///   update_adjoint(updates, before, v, sigma*, next_sigma*, out*)
///                                                            v: that after the step becomes that before it;
///                                                            so does sigma, in next_sigma, which may be the
///                                                            same; out = -gamma
///   clip_adjoint(updates, g, clip, out)                      out: from that of the clipped g to that of g
///   start_gradients(updates, sigma, result)                  adds to the gradients of initial states
///   transform(updates, f, transposed, x, y)                  y = P_f x, or its transpose
///   factor_gradients(updates, f, x, out, result)             adds to the gradient of P_f, of its input x and
///                                                            of out, -gamma of what it gives
/// and always
///   pull(size, strength, phi, theta, g)                      g += strength (phi - theta)
///   conjugate_step(step, product, p, r, x, norm)             from product = H p; norm [2]: |b|, |r| / |b|;
///                                                            true: all tasks are solved
///   add_weighted(k, size, x, y)                              y += w_k x, the weights of the query losses
///   copy(size, from, to), zero(size, to)
///   beside(f), join()        f(backend) runs concurrently with all calls until join(); false: not supported
template <class Backend, class T>
class TaskRunner {
 public:
  TaskRunner(const Backend& backend, const Problem& problem, const Task<T>& task, T* workspace)
      : backend_(backend), p_(problem), task_(task) {
    auto take = [&](int64_t size) {
      T* start = workspace;
      workspace += size;
      return start;
    };
    fixed_ = take(p_.support.tiles * p_.support.fixed_size);
    steps_ = take(p_.regions() * p_.support.step_size);
    query_ = take(p_.query_regions() * p_.query.step_size);
    shared_ = take(p_.shared_size());
    scratch_ = take(whole_lines(std::max(p_.support.scratch_size, p_.query.scratch_size)));
    phi_ = take(p_.kept_parameters() * p_.packing.adapted);
    g_ = take(p_.kept_gradients() * p_.packing.adapted);
    direction_ = take(p_.packing.adapted);
    product_ = take(p_.packing.trainable);
    loss_ = take(whole_lines(p_.weighs_queries() ? 1 : 0));
    states_ = take(p_.kept_states() * p_.state_size());
    sigma_ = take(p_.has_update_adjoint() ? p_.state_size() : 0);
    clips_ = take(p_.kept_clips() * whole_lines(kClipNumbers));
    transformed_ = take(p_.factors * p_.packing.adapted);
    residual_ = take(p_.is_implicit() ? p_.packing.adapted : 0);
    norm_ = take(p_.is_implicit() ? whole_lines(2) : 0);
  }

  void run() {
    switch (p_.operation) {
      case Operation::meta_gradient:
        return meta_gradient();
      case Operation::meta_loss:
        return meta_loss();
      case Operation::adapt:
        return adapt();
      case Operation::adapt_backward:
        return adapt_backward();
      case Operation::predict:
        return predict();
      case Operation::predict_backward:
        return predict_backward();
      case Operation::loss_and_grad:
        return loss_and_grad();
      case Operation::hvp:
        return hvp();
      case Operation::fisher:
      case Operation::kept_fisher:
        return fisher_vector_product();
    }
  }

 private:
  void meta_gradient() {
    const Part part = beside_the_inner_loop();
    if (p_.is_reptile()) return reptile(part);
    if (p_.weighs_queries()) {
      backend_.zero(1, task_.query_loss);
      backend_.zero(p_.packing.trainable, task_.result);
    }
    if (p_.is_implicit()) {  // its sums are over whole vectors, with what is between the parameters
      backend_.zero(p_.packing.trainable, task_.result);
      backend_.zero(p_.packing.trainable, product_);
    }
    query(p_.steps, part, true);
    if (p_.is_implicit()) return solve();
    outer_loop();
  }

  /// From grad L_q(phi_K) in `result` to the implicit gradient.
  void solve() {
    const MetaGradient& how = p_.graph.meta_gradient;
    const int64_t adapted = p_.packing.adapted, trainable = p_.packing.trainable;
    T* x = task_.result;
    backend_.copy(adapted, x, residual_);
    backend_.copy(adapted, x, direction_);
    backend_.zero(adapted, x);
    backend_.zero(p_.result_size - trainable, x + trainable);
    for (int i = 0; i < how.cg_steps; ++i) {
      product_at_the_end(i == 0);
      const ConjugateStep step{adapted, trainable, how.proximal, how.cg_tolerance, i == 0};
      if (backend_.conjugate_step(step, product_, direction_, residual_, x, norm_)) break;
    }
    if (task_.support_losses) backend_.copy(1, norm_ + 1, task_.support_losses + p_.steps);
  }
  /// product = H_K direction; `first`: there is no state of a gradient pass at phi_K yet.
  void product_at_the_end(bool first) {
    const int k = p_.steps;
    clear_slots(product_);
    for (int64_t tile = 0; tile < p_.support.tiles; ++tile) {
      const auto support = at_support(k, tile);
      if (!ComputesPasses<Backend> && (first || p_.support.tiles != p_.kept_tiles))
        tile_gradient(support, k, k == 0 && first, nullptr, nullptr);
      tile_product(support, k, direction_, product_);
    }
  }

  void reptile(Part part) {
    const int64_t adapted = p_.packing.adapted;
    query(p_.steps, part, false);
    backend_.copy(adapted, task_.theta, task_.result);
    backend_.retreat(adapted, phi(p_.steps), task_.result, p_.rates_of(0), nullptr);
    backend_.zero(p_.result_size - adapted, task_.result + adapted);
  }

  void meta_loss() {
    const Part part = beside_the_inner_loop();
    if (p_.weighs_queries()) backend_.zero(1, task_.query_loss);
    query(p_.steps, part, false);
    for (int k = p_.steps - 1; k >= 0; --k) {
      run_segment_again(k);
      if (p_.queries(k)) query(k, Part::all, false);
    }
  }

  void adapt() {
    inner_loop();
    backend_.copy(p_.packing.adapted, phi(p_.steps), task_.adapted);
  }

  void adapt_backward() {
    inner_loop();
    backend_.copy(p_.packing.adapted, task_.given, task_.result);
    backend_.zero(p_.packing.trainable - p_.packing.adapted, task_.result + p_.packing.adapted);
    outer_loop();
  }

  void predict() {
    if constexpr (ComputesPasses<Backend>) {
      const auto query = at_query(p_.steps, 0, backend_);
      backend_.gradient(query, part(query), {}, {.prediction = task_.logits});
    } else {
      for (int64_t tile = 0; tile < query_tiles(); ++tile) {
        const auto query = at_query(p_.steps, tile, backend_);
        query.forward(Part::all);
        give_logits(query);
      }
    }
  }

  void predict_backward() {
    const int64_t all = p_.packing.trainable;
    if constexpr (ComputesPasses<Backend>) {
      const auto query = at_query(p_.steps, 0, backend_);
      backend_.gradient(query, part(query), {},
                        {.gradient = task_.result, .limit = all, .cotangent = task_.given});
    } else {
      for (int64_t tile = 0; tile < query_tiles(); ++tile) {
        const auto query = at_query(p_.steps, tile, backend_);
        query.forward(Part::all);
        backend_.copy(query.samples() * classes(p_.query), task_.given + query.first() * classes(p_.query),
                      query.grad(p_.query.differentiated));
        query.backward(task_.result, all);
      }
    }
  }
  void loss_and_grad() { support_gradient(0, true, task_.query_loss, task_.result); }
  void hvp() { hessian_vector_product(0, task_.given, task_.result); }

  /// J^T F J v, with J = dphi_K/dtheta and F the policy's Fisher matrix on the query set. J v is the tangent
  /// of the inner loop: p_0 = v, p_{k+1} = p_k - alpha_k H_k p_k. The query pass gives F p_K; the outer loop
  /// applies J^T. All trainable parameters count as adapted, some at rate zero. Only tangents depend on v.
  void fisher_vector_product() {
    T* p = direction_;
    backend_.copy(p_.packing.adapted, task_.given, p);
    for (int k = 0; k < p_.steps; ++k) {
      for (int64_t tile = 0; tile < support_tiles(k); ++tile) {
        const auto support = at_support(k, tile);
        if (!task_.prepared) tile_gradient(support, k, k == 0, nullptr, g(k));
        if (p_.second_order()) tile_product(support, k, p, product_);
      }
      if (!task_.prepared) backend_.descend(p_.rates_of(k), phi(k), g(k), phi(k + 1));
      if (p_.second_order()) backend_.descend(p_.rates_of(k), p, product_, p);
    }
    for (int64_t tile = 0; tile < query_tiles(); ++tile) {
      const auto query = at_query(p_.steps, tile, backend_);
      if constexpr (ComputesPasses<Backend>) {
        backend_.metric_gradient(query, part(query), targets(query, task_.y_query), p, task_.result);
        continue;
      }
      const int output = p_.query.output;
      if (!task_.prepared) query.forward(Part::all);
      query.forward_tangent(p);
      backend_.metric(part(query), query.prediction(), targets(query, task_.y_query), query.dot(output),
                      query.grad(output));
      query.backward(task_.result, p_.packing.trainable);
    }
    outer_loop();
  }

  /// Runs the inner loop. Query values that depend on no trainable parameter (moments of the images) are
  /// computed concurrently, if the backend can. Returns the part of the query's forward pass that is left.
  Part beside_the_inner_loop() {
    const bool beside =
        p_.query.tiles == 1 && p_.query.has_constants && backend_.beside([&](const Backend& backend) {
          auto query = at_query(p_.steps, 0, backend);
          query.scratch = query.step + std::max<int64_t>(p_.query.constants_scratch_at, 0);
          query.forward(Part::constant);
        });
    inner_loop();
    if (beside) backend_.join();
    return beside ? Part::active : Part::all;
  }

  /// Computes phi_1 .. phi_K and the support losses, and stores the state that the products need.
  void inner_loop() {
    for (int k = 0; k < p_.steps; ++k) {
      support_gradient(k, k == 0, task_.support_losses ? task_.support_losses + k : nullptr, g(k));
      if (p_.is_proximal() && k > 0) {
        backend_.pull(p_.packing.adapted, p_.graph.meta_gradient.proximal, phi(k), task_.theta, g(k));
      }
      step(k);
    }
  }

  /// phi_{k+1} from phi_k and g_k; of an optimizer also s_{k+1}.
  void step(int k) {
    if (!p_.has_optimizer()) return backend_.descend(p_.rates_of(k), phi(k), g(k), phi(k + 1));
    const std::vector<UpdateSlice>& updates = p_.updates_of(k);
    if (k == 0) backend_.start(updates, state(0));
    const T* g = transformed(k);
    if (p_.clips_by_norm()) backend_.clip(updates, g, clip(k));
    backend_.update(updates, before(k, g), phi(k + 1), k + 1 < p_.steps ? state(k + 1) : nullptr);
  }

  /// P g_k.
  const T* transformed(int k) {
    const T* x = g(k);
    for (int f = 0; f < p_.factors; ++f) {
      backend_.transform(p_.updates_of(k), f, false, x, transformed_by(f));
      x = transformed_by(f);
    }
    return x;
  }
  T* transformed_by(int f) const { return transformed_ + f * p_.packing.adapted; }

  /// From -gamma of P g_k, in `direction_`, to that of g_k; adds to the gradients of P. What P_f has given is
  /// not needed any more when its transpose takes the place.
  const T* transform_adjoint(int k, T* v) {
    const T* out = direction_;
    for (int f = p_.factors - 1; f >= 0; --f) {
      const T* x = f > 0 ? transformed_by(f - 1) : g(k);
      if (p_.learns_factors) backend_.factor_gradients(p_.updates_of(k), f, x, out, v);
      backend_.transform(p_.updates_of(k), f, true, out, transformed_by(f));
      out = transformed_by(f);
    }
    return out;
  }

  /// Before the way back comes to inner step k, the last of a segment: computes what was kept of the
  /// segment's steps again, from what is kept of its start. That of the last segment is there.
  void run_segment_again(int k) {
    if (!p_.ends_segment(k)) return;
    for (int j = k + 1 - p_.segment; j < k; ++j) {
      support_gradient(j, false, nullptr, g(j));
      step(j);
    }
    if (!p_.keeps_gradients()) return;
    support_gradient(k, false, nullptr, g(k));
    if (p_.clips_by_norm()) backend_.clip(p_.updates_of(k), transformed(k), clip(k));
  }

  /// From v_{k+1} and sigma_{k+1} to v_k and sigma_k; adds to the gradients of hyperparameters.
  void update_adjoint(int k, T* v) {
    const std::vector<UpdateSlice>& updates = p_.updates_of(k);
    const bool has_direction = p_.second_order() || p_.learns_factors;
    const T* g = transformed(k);
    // Nothing reads the states after the last step; and those before the first are constants, or learned.
    const T* sigma = k + 1 < p_.last_query() ? sigma_ : nullptr;
    T* next_sigma = k > p_.first_differentiated() || p_.learns_rates() ? sigma_ : nullptr;
    if (p_.learns_rates()) backend_.hyper_gradients(updates, before(k, g), v, sigma, v);
    backend_.update_adjoint(updates, before(k, g), v, sigma, next_sigma,
                            has_direction ? direction_ : nullptr);
    if (k == 0 && p_.learns_rates()) backend_.start_gradients(updates, sigma_, v);
    if (!has_direction) return;
    if (p_.clips_by_norm()) backend_.clip_adjoint(updates, g, clip(k), direction_);
    const T* direction = transform_adjoint(k, v);
    if (!p_.second_order()) return;
    hessian_vector_product(k, direction, product_);
    backend_.retreat(p_.packing.trainable, product_, v, p_.rates_of(k), nullptr);
  }

  /// The query loss at phi_k and, if wanted, its gradient: written, or for a multi-step loss added with
  /// weight w_k. `part`: what the forward pass has yet to compute. phi_K gives the logits, with or without a
  /// weight.
  void query(int k, Part part, bool gradient) {
    const bool weighs = p_.weighs_queries(), counts = p_.queries(k);
    T *value = weighs ? loss_ : task_.query_loss, *v = weighs ? product_ : task_.result;
    gradient = gradient && counts;
    if (gradient) clear_slots(v);
    for (int64_t tile = 0; tile < query_tiles(); ++tile) {
      const auto query = at_query(k, tile, backend_);
      if constexpr (ComputesPasses<Backend>) {
        const Target<T> target = counts ? targets(query, task_.y_query) : Target<T>{};
        backend_.gradient(query, this->part(query), target,
                          {.value = counts ? value : nullptr,
                           .prediction = k == p_.steps ? task_.logits : nullptr,
                           .gradient = gradient ? v : nullptr,
                           .limit = p_.packing.trainable});
        continue;
      }
      query.forward(part);
      if (counts) loss(query, task_.y_query, value);
      if (k == p_.steps) give_logits(query);
      if (!gradient) continue;
      give_grad_y(query, query.grad(p_.query.differentiated), query.grad_of_y);
      query.backward(v, p_.packing.trainable);
    }
    if (!weighs || !counts) return;
    backend_.add_weighted(k, 1, loss_, task_.query_loss);
    if (gradient) backend_.add_weighted(k, p_.packing.trainable, product_, task_.result);
  }

  /// From v_K in `result` to v_0 and the gradients of the learned rates. `retreat` writes v_k and, at the
  /// same time, the next direction alpha_{k-1} v_k, unless a query gradient has yet to be added to v_k.
  void outer_loop() {
    T* v = task_.result;
    backend_.zero(p_.result_size - p_.packing.trainable, v + p_.packing.trainable);
    bool directed = false;  // direction_ holds alpha_k v_{k+1}
    for (int k = p_.steps - 1; k >= 0; --k) {
      run_segment_again(k);
      const bool counts = k < p_.last_query() && k >= p_.first_differentiated();
      if (counts && p_.has_optimizer()) {
        update_adjoint(k, v);
      } else if (counts) {
        if (p_.learns_rates()) backend_.rate_gradient(p_.rates_of(k), g(k), v, v);
        if (p_.second_order()) {
          if (!directed) backend_.direction(p_.rates_of(k), v, direction_);
          hessian_vector_product(k, direction_, product_);
          directed = k > p_.first_differentiated() && !p_.queries(k);
          backend_.retreat(p_.packing.trainable, product_, v, p_.rates_of(std::max(k - 1, 0)),
                           directed ? direction_ : nullptr);
        }
      }
      if (p_.queries(k)) query(k, Part::all, true);
    }
  }

  /// The gradient pass at phi_k; loss and gradient [adapted] may be null. `fixed_too`: the task's first pass.
  void support_gradient(int k, bool fixed_too, T* value, T* gradient) {
    for (int64_t tile = 0; tile < support_tiles(k); ++tile) {
      tile_gradient(at_support(k, tile), k, fixed_too, value, gradient);
    }
  }
  void tile_gradient(const Walk<Backend, T>& support, int k, bool fixed_too, T* value, T* gradient) {
    if constexpr (ComputesPasses<Backend>) {
      return backend_.gradient(support, part(support), targets(support, y_support(k)),
                               {.value = value, .gradient = gradient, .limit = p_.packing.adapted});
    }
    support.forward(fixed_too ? Part::all : Part::moving);
    loss(support, y_support(k), value);
    support.backward(gradient, p_.packing.adapted);
  }

  /// product [trainable] = H_k direction [adapted]; runs the gradient pass again if its state was not kept.
  void hessian_vector_product(int k, const T* direction, T* product) {
    clear_slots(product);
    for (int64_t tile = 0; tile < support_tiles(k); ++tile) {
      const auto support = at_support(k, tile);
      if (!ComputesPasses<Backend> && !p_.keeps_state_of(k))
        tile_gradient(support, k, p_.operation == Operation::hvp, nullptr, nullptr);
      tile_product(support, k, direction, product);
    }
  }
  /// One tile of a Hessian-vector product, from the state of its gradient pass.
  void tile_product(const Walk<Backend, T>& support, int k, const T* direction, T* product) {
    if constexpr (ComputesPasses<Backend>) {
      return backend_.product(support, part(support), targets(support, y_support(k)), direction, product);
    }
    const int output = p_.support.differentiated;
    support.forward_tangent(direction);
    backend_.loss_tangent(part(support), support.differentiated(), targets(support, y_support(k)),
                          support.dot(output), support.loss_saved(), support.grad_dot(output));
    if (p_.graph.data_gradient.weights_support) give_slopes(support, k);
    give_grad_y(support, support.grad_dot(output), support.grad_dot_of_y);
    support.backward_tangent(direction, product);
  }

  /// A pass writes one slot of a parameter; the others must be zero.
  void clear_slots(T* trainable) const {
    backend_.zero(p_.packing.trainable - p_.packing.stepwise, trainable + p_.packing.stepwise);
  }

  /// The tile's part of the loss (`value` may be null), and the cotangent of the prediction if it has one.
  void loss(const Walk<Backend, T>& walk, const Target<T>& target, T* value) {
    T* grad = walk.grad(walk.stage.differentiated);
    backend_.loss(part(walk), walk.differentiated(), targets(walk, target), value, grad,
                  grad ? walk.loss_saved() : nullptr);
  }
  Target<T> targets(const Walk<Backend, T>& walk, const Target<T>& of_task) const {
    if (p_.graph.loss == Loss::computed) return of_task;
    return of_task.from(p_.graph.loss, classes(walk.stage), walk.first());
  }
  LossPart part(const Walk<Backend, T>& walk) const {
    if (p_.graph.loss == Loss::computed) return {Loss::computed, 1, 1, 1, false};
    return {p_.graph.loss, walk.samples(), classes(walk.stage), walk.n, walk.tile > 0, walk.first()};
  }

  /// g_k; where the descent is its last use, it shares the memory of phi_{k+1}, which replaces it.
  T* g(int k) const {
    return p_.kept_gradients() == 0 ? phi(k + 1) : g_ + p_.gradient_place(k) * p_.packing.adapted;
  }
  T* state(int k) const { return states_ + p_.state_place(k) * p_.state_size(); }
  T* clip(int k) const { return clips_ + p_.state_place(k) * whole_lines(kClipNumbers); }
  BeforeStep<T> before(int k, const T* g) const {
    return {k, phi(k), g, state(k), p_.clips_by_norm() ? clip(k) : nullptr};
  }
  T* phi(int k) const {  // phi_0 is theta, which is never written
    if (k == 0) return const_cast<T*>(task_.theta);
    return phi_ + p_.parameter_place(k) * p_.packing.adapted;
  }
  Walk<Backend, T> at_support(int k, int64_t tile) const {
    T* fixed = fixed_ + tile * p_.support.fixed_size;
    T* step = steps_ + p_.region(k, tile) * p_.support.step_size;
    const T* x = task_.x_support + set(k) * p_.support.n * p_.support.values[0].size;
    const T* y = static_cast<const T*>(y_support(k).y);
    Walk<Backend, T> walk{backend_, p_.packing, p_.support,  tile,          k,
                          x,        y,          task_.theta, phi(k),        fixed,
                          step,     shared_,    scratch_,    stream(2 * k), support_samples(k)};
    if (p_.weighted && !task_.support_counts) walk.shares = y_support(k).scale;
    const DataGradient& data = p_.graph.data_gradient;
    if (data.x_support)
      walk.grad_dot_of_x = data_gradient(p_.x_support_at, k, p_.support, x_width(p_.support));
    if (data.y_support)
      walk.grad_dot_of_y = data_gradient(p_.y_support_at, k, p_.support, y_width(p_.support));
    return walk;
  }
  int64_t x_width(const Stage& stage) const { return stage.values[0].size; }
  int64_t y_width(const Stage& stage) const { return target_columns(p_.graph.loss, stage); }
  T* data_gradient(int64_t at, int64_t copy, const Stage& stage, int64_t width) const {
    return task_.data_gradient + at + copy * stage.n * width;
  }
  /// What the squared error gives its target is minus what it gives the prediction; a computed loss gives the
  /// target its own. `grad_y` of all samples; null: not wanted.
  void give_grad_y(const Walk<Backend, T>& walk, const T* grad_of_prediction, T* grad_y) const {
    if (!grad_y || p_.graph.loss == Loss::computed) return;
    const int64_t c = classes(walk.stage);
    backend_.copy(walk.samples() * c, grad_of_prediction, grad_y + walk.first() * c);
  }
  /// What the slope of each sample's part of the support loss along rate times v is the inner product of.
  void give_slopes(const Walk<Backend, T>& walk, int k) const {
    const int64_t c = classes(walk.stage), size = walk.samples() * c;
    T* of_step = data_gradient(p_.weights_support_at, 2 * k, walk.stage, c) + walk.first() * c;
    backend_.copy(size, walk.grad(walk.stage.differentiated), of_step);
    backend_.copy(size, walk.dot(walk.stage.differentiated), of_step + walk.stage.n * c);
  }
  /// The number of the support set of an inner step, and what its loss compares.
  int64_t set(int k) const { return p_.support_sets() > 1 ? k : 0; }
  Target<T> y_support(int k) const {
    if constexpr (requires { Backend::of_set(task_.y_support, set(k)); }) {
      return Backend::of_set(task_.y_support, set(k));
    } else {
      const Loss loss = p_.graph.loss;
      return task_.y_support.from(loss, target_columns(loss, p_.support), set(k) * p_.support.n);
    }
  }
  Walk<Backend, T> at_query(int k, int64_t tile, const Backend& backend) const {
    const bool kept = p_.query_regions() > 0;
    T* step = kept ? query_ + tile * p_.query.step_size : shared_;
    T* tangent = kept ? shared_ : shared_ + p_.query.step_size;
    const T* y = static_cast<const T*>(task_.y_query.y);
    const int slot = std::max(k - 1, 0);
    // At parameters that are the task's own, a prediction has the masks of the loss there.
    const Stream masks = stream(at_own_parameters(p_.operation) ? 0 : 2 * k + 1);
    Walk<Backend, T> walk{backend,       p_.packing, p_.query,    tile,   slot,
                          task_.x_query, y,          task_.theta, phi(k), nullptr,
                          step,          tangent,    scratch_,    masks,  query_samples()};
    if (p_.weighted && !task_.query_count) walk.shares = task_.y_query.scale;
    const DataGradient& data = p_.graph.data_gradient;
    const int64_t place = p_.query_place(k);
    if (data.x_query) walk.grad_of_x = data_gradient(p_.x_query_at, place, p_.query, x_width(p_.query));
    if (data.y_query) walk.grad_of_y = data_gradient(p_.y_query_at, place, p_.query, y_width(p_.query));
    return walk;
  }
  int64_t support_samples(int k) const {
    return task_.support_counts ? task_.support_counts[set(k)] : p_.support.n;
  }
  int64_t query_samples() const { return task_.query_count ? *task_.query_count : p_.query.n; }
  int64_t support_tiles(int k) const { return tiles(p_.support, support_samples(k)); }
  int64_t query_tiles() const { return tiles(p_.query, query_samples()); }
  /// The number of a stage's tiles that have any of the first n samples.
  static int64_t tiles(const Stage& stage, int64_t n) {
    int64_t count = stage.tiles;
    while (count > 1 && stage.first(count - 1) >= n) --count;
    return count;
  }
  Stream stream(int pass) const {
    Stream s = task_.stream;
    s.pass += static_cast<uint32_t>(pass);
    return s;
  }
  static int64_t classes(const Stage& stage) { return stage.values[stage.output].size; }
  void give_logits(const Walk<Backend, T>& query) {
    const int64_t c = classes(p_.query);
    backend_.copy(query.samples() * c, query.prediction(), task_.logits + query.first() * c);
  }

  const Backend& backend_;
  const Problem& p_;
  Task<T> task_;
  T *fixed_, *steps_, *query_, *shared_, *scratch_, *phi_, *g_, *direction_, *product_, *loss_;
  T *states_, *sigma_, *clips_, *transformed_;
  T *residual_, *norm_;
};

}  // namespace maml
