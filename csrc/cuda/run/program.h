// A program: what one task computes, as a list of instructions. It is recorded by running the algorithm
// (meta_gradient.h) over symbolic addresses. The megakernel interprets all of it; the batched executor
// launches it, with kernels of their own for most instructions (schedule.h).
#pragma once

#include <vector>

#include "cuda/run/address.h"
#include "plan/problem.h"

namespace maml::cuda {

enum class Op : uint8_t {
  forward,
  backward,
  forward_tangent,
  backward_tangent,
  loss,           // x = z, the target (loss_tensors), y = value, grad_x = grad_z, saved
  loss_tangent,   // x = z, the target, x_dot = z_dot, grad_x_dot = grad_z_dot, saved
  metric,         // x = z, the target, x_dot = z_dot, grad_x = grad_z
  descend,        // x = phi, grad_y = g, y = next
  direction,      // x = v, y = out
  retreat,        // grad_y = product, y = v, saved = out; beyond the adapted parameters: x = product,
                  // grad_x = v, of `size` elements
  rate_gradient,  // grad_y = g, x = v, y = result
  // Of an inner optimizer, with the tensors that optimizer_steps.h says; `size` is the step.
  start,
  clip,
  update,
  hyper_gradients,
  update_adjoint,
  clip_dot,
  clip_adjoint,
  start_gradients,
  transform,         // x, y, of factor `size`; layer.pooled: transposed
  factor_gradients,  // x, grad_y = out, y = result, of factor `size`
  add_weighted,      // grad_y = weight, x, y
  pull,              // layer.a = strength, x = phi and theta, y = g, of `size` elements
  conjugate_step,    // layer: a = proximal, b = tolerance, n = adapted elements, pooled: the first step;
                     // grad_y = product, y = p, y_dot = r, saved = x, saved_dot = norm; `size` of the product
  copy,
  zero,
  join  // waits for the instructions that run beside the others
};

/// Whether an instruction is a pass of a layer.
constexpr bool is_pass(Op op) { return op <= Op::backward_tangent; }

template <class T>
struct Instruction {
  Tensors<T> tensors;  // first: the interpreter resolves the addresses at the start of an instruction
  Layer layer;
  LossPart loss;
  Op op;
  bool beside;   // may run concurrently with all others up to `join`
  int slices;    // the first rate slice, or update slice, of the inner step
  int64_t size;  // elements of a vector
};

/// The predictions z and the target of a loss, stored as an instruction's tensors; target_of reads it back.
template <class T>
Tensors<T> loss_tensors(const T* z, const Target<T>& target) {
  Tensors<T> t;
  t.x[0] = z;
  t.x[1] = static_cast<const T*>(target.y);
  t.w[0] = target.scale;
  t.w[1] = target.old_log_probs;
  return t;
}
template <class T>
__host__ __device__ Target<T> target_of(const Tensors<T>& t) {
  return {t.x[1], t.w[0], t.w[1]};
}

/// The step of a conjugate_step.
__host__ __device__ inline ConjugateStep conjugate_step_of(const Layer& l, int64_t size) {
  return {l.n, size, l.a, l.b, l.pooled};
}

/// A backend of TaskRunner that records the operations instead of computing them.
template <class T>
class Recorder {
 public:
  /// `concurrent`: what is to run beside the inner loop is marked; otherwise it is left in its place.
  Recorder(const Problem& problem, bool concurrent) : problem_(problem), concurrent_(concurrent) {}
  const std::vector<Instruction<T>>& program() const { return program_; }

  void forward(const Layer& l, const Tensors<T>& t) const { record(Op::forward, l, t); }
  void backward(const Layer& l, const Tensors<T>& t) const { record(Op::backward, l, t); }
  void forward_tangent(const Layer& l, const Tensors<T>& t) const { record(Op::forward_tangent, l, t); }
  void backward_tangent(const Layer& l, const Tensors<T>& t) const { record(Op::backward_tangent, l, t); }

  void loss(const LossPart& part, const T* z, const Target<T>& target, T* value, T* grad_z, T* saved) const {
    Tensors<T> t = loss_tensors(z, target);
    t.y = value;
    t.grad_x[0] = grad_z;
    t.saved = saved;
    record(Op::loss, {}, t).loss = part;
  }
  void loss_tangent(const LossPart& part, const T* z, const Target<T>& target, const T* z_dot, const T* saved,
                    T* grad_z_dot) const {
    Tensors<T> t = loss_tensors(z, target);
    t.x_dot[0] = z_dot;
    t.grad_x_dot[0] = grad_z_dot;
    t.saved = const_cast<T*>(saved);
    record(Op::loss_tangent, {}, t).loss = part;
  }
  void metric(const LossPart& part, const T* z, const Target<T>& target, const T* z_dot, T* grad_z) const {
    Tensors<T> t = loss_tensors(z, target);
    t.x_dot[0] = z_dot;
    t.grad_x[0] = grad_z;
    record(Op::metric, {}, t).loss = part;
  }

  void descend(const std::vector<RateSlice>& step, const T* phi, const T* g, T* next) const {
    record_vector(Op::descend, phi, g, next).slices = first_slice(step);
  }
  void direction(const std::vector<RateSlice>& step, const T* v, T* out) const {
    record_vector(Op::direction, v, nullptr, out).slices = first_slice(step);
  }
  void rate_gradient(const std::vector<RateSlice>& step, const T* g, const T* v, T* result) const {
    record_vector(Op::rate_gradient, v, g, result).slices = first_slice(step);
  }
  void retreat(int64_t size, const T* product, T* v, const std::vector<RateSlice>& step, T* out) const {
    const int64_t adapted = problem_.packing.adapted;
    Instruction<T>& i = record_vector(Op::retreat, product + adapted, product, v);
    i.tensors.grad_x[0] = v + adapted;
    i.tensors.saved = out;
    i.slices = first_slice(step);
    i.size = size - adapted;
  }
  using Slices = std::vector<UpdateSlice>;
  void start(const Slices& updates, T* state) const { record_step(Op::start, updates, {}, state); }
  void clip(const Slices& updates, const T* g, T* clip) const {
    record_step(Op::clip, updates, {.g = g}, clip);
  }
  void update(const Slices& updates, const BeforeStep<T>& before, T* next, T* next_state) const {
    record_step(Op::update, updates, before, next).grad_w[0] = next_state;
  }
  void hyper_gradients(const Slices& updates, const BeforeStep<T>& before, const T* v, const T* sigma,
                       T* result) const {
    Tensors<T>& t = record_step(Op::hyper_gradients, updates, before, result);
    t.w[2] = v, t.w[3] = sigma;
  }
  void update_adjoint(const Slices& updates, const BeforeStep<T>& before, T* v, const T* sigma, T* next_sigma,
                      T* out) const {
    Tensors<T>& t = record_step(Op::update_adjoint, updates, before, v);
    t.w[3] = sigma, t.grad_w[0] = next_sigma, t.saved = out;
  }
  void clip_adjoint(const Slices& updates, const T* g, T* clip, T* out) const {
    record_step(Op::clip_dot, updates, {.phi = out, .g = g}, clip + 2);
    record_step(Op::clip_adjoint, updates, {.g = g, .clip = clip}, out);
  }
  void start_gradients(const Slices& updates, const T* sigma, T* result) const {
    record_step(Op::start_gradients, updates, {}, result).w[3] = sigma;
  }
  void transform(const Slices& updates, int f, bool transposed, const T* x, T* y) const {
    Instruction<T>& i = record_vector(Op::transform, x, nullptr, y);
    i.layer.pooled = transposed, i.slices = first_slice(updates), i.size = f;
  }
  void factor_gradients(const Slices& updates, int f, const T* x, const T* out, T* result) const {
    Instruction<T>& i = record_vector(Op::factor_gradients, x, out, result);
    i.slices = first_slice(updates), i.size = f;
  }

  void add_weighted(int k, int64_t size, const T* x, T* y) const {
    record_vector(Op::add_weighted, x, place<T>(Region::query_weights, k), y).size = size;
  }
  void pull(int64_t size, double strength, const T* phi, const T* theta, T* g) const {
    Instruction<T>& i = record_vector(Op::pull, phi, nullptr, g);
    i.tensors.x[1] = theta;
    i.layer.a = strength;
    i.size = size;
  }
  /// A program is the same for all data: it has all steps.
  bool conjugate_step(const ConjugateStep& step, const T* product, T* p, T* r, T* x, T* norm) const {
    Instruction<T>& i = record_vector(Op::conjugate_step, nullptr, product, p);
    i.tensors.y_dot = r, i.tensors.saved = x, i.tensors.saved_dot = norm;
    i.layer.a = step.proximal, i.layer.b = step.tolerance, i.layer.n = step.adapted;
    i.layer.pooled = step.first;
    i.size = step.trainable;
    return false;
  }
  void copy(int64_t size, const T* from, T* to) const {
    if (size > 0) record_vector(Op::copy, from, nullptr, to).size = size;
  }
  void zero(int64_t size, T* to) const {
    if (size > 0) record_vector(Op::zero, nullptr, nullptr, to).size = size;
  }

  template <class F>
  bool beside(F f) const {
    if (!concurrent_) return false;
    const size_t first = program_.size();
    f(*this);
    for (size_t i = first; i < program_.size(); ++i) program_[i].beside = true;
    return true;
  }
  void join() const { record(Op::join, {}, {}); }

 private:
  int first_slice(const std::vector<RateSlice>& step) const {
    return static_cast<int>((&step - problem_.slices.data()) * static_cast<int64_t>(step.size()));
  }
  int first_slice(const Slices& step) const {
    return static_cast<int>((&step - problem_.update_slices.data()) * static_cast<int64_t>(step.size()));
  }
  Tensors<T>& record_step(Op op, const Slices& updates, const BeforeStep<T>& before, T* y) const {
    Instruction<T>& i = record_vector(op, before.phi, before.g, y);
    i.tensors.w[0] = before.state, i.tensors.w[1] = before.clip;
    i.slices = first_slice(updates);
    i.size = before.step;
    return i.tensors;
  }
  Instruction<T>& record_vector(Op op, const T* x, const T* g, T* y) const {
    Tensors<T> t;
    t.x[0] = x;
    t.grad_y = g;
    t.y = y;
    return record(op, {}, t);
  }
  Instruction<T>& record(Op op, const Layer& layer, const Tensors<T>& tensors) const {
    Instruction<T> instruction{};
    instruction.tensors = tensors;
    instruction.layer = layer;
    instruction.op = op;
    program_.push_back(instruction);
    return program_.back();
  }

  const Problem& problem_;
  const bool concurrent_;
  mutable std::vector<Instruction<T>> program_;
};

}  // namespace maml::cuda
