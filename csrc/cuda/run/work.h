// The work of one task of a launch, whichever kernel does it: the FLOP of its products, and the bytes of its
// operands in device memory, each read or written once. Only the emulation records it, with each launch, for
// the performance model of this backend (benchmarks/gpu/model.py); on a GPU it is not computed.
#pragma once

#include "cuda/run/program.h"
#include "layers/kinds.h"
#include "layers/registry.h"

namespace maml::cuda {

struct Work {
  double flop = 0, bytes = 0;
  int instructions = 0;  // of the megakernel's program
  // Of the kernel of small perceptrons (small_mlp_work.h): its phases; the cycles of a block that is alone on
  // a multiprocessor, and those for which it occupies shared memory or the schedulers.
  int phases = 0;
  double cycles = 0, busy_cycles = 0;
  // Of a launch whose parts other blocks compute: in a run of small layers the bytes of its first
  // instruction, which several blocks of a task share; in a product those of the normalisation by its last
  // blocks.
  double part_bytes = 0;

  Work& operator+=(const Work& other) {
    flop += other.flop, bytes += other.bytes, instructions += other.instructions, phases += other.phases;
    cycles += other.cycles, busy_cycles += other.busy_cycles, part_bytes += other.part_bytes;
    return *this;
  }
  friend Work operator+(Work a, const Work& b) { return a += b; }
};

/// The work of reading or writing so many bytes.
inline Work bytes(int64_t count) { return {.bytes = static_cast<double>(count)}; }

/// The work of reading or writing `tensors` tensors of `size` elements of T each.
template <class T>
Work traffic(int64_t size, int tensors) {
  return {.bytes = static_cast<double>(size) * tensors * sizeof(T)};
}

/// The elements of an input, and of the output, of all samples.
inline int64_t input_size(const Layer& l, int j) {
  if (!l.loops) return l.n * size(l.in);
  const bool apart = l.kind == Kind::move || l.kind == Kind::recurrence;  // loops for each input
  return elements(apart ? l.loops[j].x[0] : l.loops->x[j], l.n);
}
inline int64_t output_size(const Layer& l) { return l.loops ? elements(l.loops->y, l.n) : l.n * size(l.out); }

/// The FLOP (two for each multiply-add) of a layer's product over all samples.
inline double product_flop(const Layer& l) {
  if (l.kind == Kind::recurrence || l.kind == Kind::attention) {
    return 2 * static_cast<double>(properties(l.kind).work(l));
  }
  if (l.kind == Kind::contract || l.kind == Kind::depthwise)
    return 2 * static_cast<double>(iterations(*l.loops, l.n));
  const maml::Image& pixels = l.kind == Kind::conv2d ? l.out : l.between;
  const double patches = static_cast<double>(l.n * pixels.h * pixels.w);
  const double patch = static_cast<double>(l.window.kernel_h * l.window.kernel_w * l.in.c);
  switch (l.kind) {
    case Kind::conv2d:
    case Kind::stem:
      return 2 * patches * patch * static_cast<double>(l.out.c);
    case Kind::patch_gram:  // half of a symmetric matrix, a row of ones included
      return patches * (patch + 1) * (patch + 2);
    default:
      return 0;
  }
}

inline int64_t parameter_size(const Layer& l, int p) {
  if (l.kind == Kind::recurrence) {
    const RecurrenceSizes r(*l.loops, l.n);
    return (p == 0 ? r.in : p == 1 ? r.hidden : 1) * r.hidden * gates_of(l.cell);
  }
  const bool product = l.kind == Kind::conv2d || l.kind == Kind::stem;
  if (p == 0 && product) return l.window.kernel_h * l.window.kernel_w * l.in.c * l.out.c;
  return l.kind == Kind::append ? l.out.c - l.in.c : l.out.c;
}

/// One launch of a convolution's product C [m, n] = A [m, k] B [k, n] with `terms` terms, where A is gathered
/// from `image` elements and `stored` elements are written.
template <class T>
Work product_work(double m, double n, double k, int terms, int64_t image, double stored) {
  const double moved = terms * (static_cast<double>(image) + k * n) + stored;
  return {.flop = 2 * m * n * k * terms, .bytes = moved * sizeof(T)};
}

template <class T>
Work work_of(Op op, const Layer& l, const Tensors<T>& t) {
  int64_t count = 0;
  auto inputs = [&](auto* const(&x)[kMostInputs]) {
    for (int j = 0; j < kMostInputs; ++j) {
      const bool shares = j == 1 && (l.kind == Kind::batch_norm || l.kind == Kind::norm_block);
      count += x[j] ? shares ? l.n : input_size(l, j) : 0;
    }
  };
  auto output = [&](const T* y) { count += y ? output_size(l) : 0; };
  auto weights = [&](auto* const(&w)[kMostParameters]) {
    for (int p = 0; p < kMostParameters; ++p) count += w[p] ? parameter_size(l, p) : 0;
  };
  // The second factor of a product: an input, or the weight.
  const bool contracts = l.kind == Kind::contract || l.kind == Kind::depthwise || l.kind == Kind::attention;
  const T* second_dot = contracts ? t.x_dot[1] : t.w_dot[0];
  const T* grad_second = contracts ? t.grad_x[1] : t.grad_w[0];
  const T* grad_second_dot = contracts ? t.grad_x_dot[1] : t.grad_w_dot[0];
  int products = 0;
  if (op == Op::forward || properties(l.kind).layer_class != LayerClass::linear) inputs(t.x);
  switch (op) {
    case Op::forward:
      output(t.y), weights(t.w);
      products = 1;
      break;
    case Op::backward:
      inputs(t.grad_x), output(t.grad_y), weights(t.w), weights(t.grad_w);
      products = (t.grad_x[0] != nullptr) + (grad_second != nullptr);
      break;
    case Op::forward_tangent:
      inputs(t.x_dot), output(t.y_dot), weights(t.w), weights(t.w_dot);
      products = (t.x_dot[0] != nullptr) + (second_dot != nullptr);
      break;
    case Op::backward_tangent:
      inputs(t.x_dot), inputs(t.grad_x_dot), output(t.grad_y), output(t.grad_y_dot);
      weights(t.w), weights(t.w_dot), weights(t.grad_w_dot);
      if (t.grad_x_dot[0]) products += (t.grad_y_dot != nullptr) + (second_dot != nullptr);
      if (grad_second_dot) products += (t.grad_y_dot != nullptr) + (t.x_dot[0] != nullptr);
      break;
    default:
      break;
  }
  Work work = traffic<T>(count, 1);
  work.flop = products * product_flop(l);
  return work;
}

/// An instruction, where the parameters have `adapted` adapted elements.
template <class T>
Work work_of(const Instruction<T>& i, int64_t adapted) {
  const int64_t outputs = i.loss.n * i.loss.c;
  switch (i.op) {
    case Op::loss:
      return traffic<T>(outputs, i.tensors.grad_x[0] ? 4 : 2);
    case Op::loss_tangent:
    case Op::metric:
      return traffic<T>(outputs, 3);
    case Op::descend:
      return traffic<T>(adapted, 3);
    case Op::direction:
      return traffic<T>(adapted, 2);
    case Op::retreat:
      return traffic<T>(adapted + i.size, i.tensors.saved ? 4 : 3);
    case Op::add_weighted:
      return traffic<T>(i.size, 3);
    case Op::pull:
      return traffic<T>(i.size, 4);
    case Op::conjugate_step:
      return traffic<T>(i.size, 2) + traffic<T>(i.layer.n, 8);
    case Op::copy:
      return traffic<T>(i.size, 2);
    case Op::zero:
      return traffic<T>(i.size, 1);
    case Op::update:
      return traffic<T>(adapted, 7);  // with two states
    case Op::update_adjoint:
      return traffic<T>(adapted, 11);
    case Op::clip_adjoint:
    case Op::transform:
    case Op::factor_gradients:
      return traffic<T>(adapted, 3);
    case Op::rate_gradient:
    case Op::start:
    case Op::clip:
    case Op::hyper_gradients:
    case Op::clip_dot:
    case Op::start_gradients:
    case Op::join:
      return {};
    default:
      return work_of(i.op, i.layer, i.tensors);
  }
}

/// The elements that a block reads and writes in device memory where it computes a whole task.
template <class T>
Work traffic_of_task(const Problem& p) {
  auto samples = [](const Stage& s) { return s.n ? s.n * (s.values[0].size + s.values[s.output].size) : 0; };
  return traffic<T>(samples(p.support) + samples(p.query) + p.packing.total + p.result_size, 1);
}

/// The megakernel: the products of its program.
template <class T>
Work work_of(const Problem& p, const std::vector<Instruction<T>>& program) {
  Work work = traffic_of_task<T>(p);
  work.instructions = static_cast<int>(program.size());
  for (const Instruction<T>& i : program) work.flop += work_of(i.op, i.layer, i.tensors).flop;
  return work;
}

/// Declares work() as that of each task of the next launch. On a GPU work() is not called.
template <class F>
void note([[maybe_unused]] F work) {
#ifndef __CUDACC__
  if (emulation::host.log_mode == emulation::LogMode::off) return;
  const Work w = work();
  emulation::noted = {w.flop, w.bytes, w.instructions, w.phases, w.cycles, w.busy_cycles, w.part_bytes};
#endif
}

}  // namespace maml::cuda
