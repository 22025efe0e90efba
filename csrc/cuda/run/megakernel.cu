// The megakernel: one block runs the whole program of one task (program.h): K inner steps, the query pass and
// K Hessian-vector products.
//
// Shared memory: all state of a task (Layout, `inside`): packed parameters, every phi_k, gradients, v,
// tangents, and the activations of all steps, or, where those of all samples do not fit, of one tile. Data
// and labels are read from the user's tensors.
//
// Threads: instructions run one after the other, with one barrier after each; the threads of the block share
// the elements of an instruction. While one instruction runs, each thread has already loaded some words of
// the next one; it resolves their symbolic addresses and stores them in the other of two slots. So no thread
// waits for the program, and each address is resolved once.
//
// Numerics: products and sums of float32 or float64 in ascending order, whatever precision is asked for: the
// products are too small for matrix instructions to pay. Limits: kMegakernelSpans tensors, the shared memory
// of one block, and linear layers, pointwise functions, sums and appended parameters only.
#include <cstddef>
#include <utility>

#include "cuda/add.h"
#include "cuda/append.h"
#include "cuda/loss.h"
#include "cuda/pointwise.h"
#include "cuda/product/small_product.h"
#include "cuda/run/megakernel.h"
#include "cuda/run/on_device.h"
#include "cuda/run/pack.h"
#include "cuda/run/updates.h"
#include "layers/kinds.h"

namespace maml::cuda {
namespace {

constexpr int kThreads = kReductionThreads;

struct Spans {
  Span spans[kMegakernelSpans];
};

/// The four passes of each kind that the megakernel has (Declaration::in_megakernel), by one block; a kind
/// that computes nothing has none.
template <Kind K>
struct InBlock;

template <>
struct InBlock<Kind::conv2d> {
  template <class T>
  static __device__ void run(Op op, Team team, const Layer& l, const Tensors<T>& t) {
    return op == Op::forward           ? linear_forward(team, l, t)
           : op == Op::backward        ? linear_backward(team, l, t)
           : op == Op::forward_tangent ? linear_forward_tangent(team, l, t)
                                       : linear_backward_tangent(team, l, t);
  }
};
template <>
struct InBlock<Kind::pointwise> {
  template <class T>
  static __device__ void run(Op op, Team team, const Layer& l, const Tensors<T>& t) {
    return op == Op::forward           ? pointwise_forward(team, l, t)
           : op == Op::backward        ? pointwise_backward(team, l, t)
           : op == Op::forward_tangent ? pointwise_forward_tangent(team, l, t)
                                       : pointwise_backward_tangent(team, l, t);
  }
};
template <>
struct InBlock<Kind::append> {
  template <class T>
  static __device__ void run(Op op, Team team, const Layer& l, const Tensors<T>& t) {
    return op == Op::forward           ? append_forward(team, l, t)
           : op == Op::backward        ? append_backward(team, l, t)
           : op == Op::forward_tangent ? append_forward_tangent(team, l, t)
                                       : append_backward_tangent(team, l, t);
  }
};
template <>
struct InBlock<Kind::add> {
  template <class T>
  static __device__ void run(Op op, Team team, const Layer& l, const Tensors<T>& t) {
    return op == Op::forward           ? add_forward(team, l, t)
           : op == Op::backward        ? add_backward(team, l, t)
           : op == Op::forward_tangent ? add_forward_tangent(team, l, t)
                                       : add_backward_tangent(team, l, t);
  }
};

/// Runs the layer if it is of kind K.
template <Kind K, class T>
__device__ bool run_if(Op op, const Layer& l, const Tensors<T>& t) {
  if constexpr (Declaration<K>::in_megakernel && Declaration<K>::on_cuda) {
    if (l.kind == K) InBlock<K>::run(op, block_team(), l, t);
    return l.kind == K;
  } else {
    return false;
  }
}
template <class T, int... K>
__device__ void run_layer(Op op, const Layer& l, const Tensors<T>& t, std::integer_sequence<int, K...>) {
  static_cast<void>((run_if<static_cast<Kind>(K)>(op, l, t) || ...));
}

template <class T>
__device__ void run_instruction(const Instruction<T>& i, const DevicePlan& plan, const T* rates,
                                double* sums) {
  const Team team = block_team();
  const Tensors<T>& t = i.tensors;
  const RateSlice* slices = plan.slices + i.slices;
  const int count = plan.slices_a_step;
  switch (i.op) {
    case Op::loss:
      return loss_value(team, i.loss, t.x[0], target_of(t), t.y, t.grad_x[0], t.saved, sums);
    case Op::loss_tangent:
      return loss_tangent(team, i.loss, t.x[0], target_of(t), t.x_dot[0], static_cast<const T*>(t.saved),
                          t.grad_x_dot[0]);
    case Op::metric:
      return loss_metric(team, i.loss, t.x[0], target_of(t), t.x_dot[0], t.grad_x[0]);
    case Op::descend:
      for (int s = 0; s < count; ++s) descend(team, slices[s], rates, t.x[0], t.grad_y, t.y);
      return;
    case Op::direction:
      for (int s = 0; s < count; ++s) direction(team, slices[s], rates, t.x[0], t.y);
      return;
    case Op::rate_gradient:
      for (int s = 0; s < count; ++s) {
        if (slices[s].grad_at != kNowhere && slices[s].elementwise) {
          elementwise_rate_gradient(team, slices[s], t.grad_y, t.x[0], t.y);
        }
      }
      return shared_rate_gradients(slices, count, t.grad_y, t.x[0], t.y, sums);
    case Op::retreat:
      for (int s = 0; s < count; ++s) retreat(team, slices[s], rates, t.grad_y, t.y, t.saved);
      return subtract(team, i.size, t.x[0], t.grad_x[0]);
    case Op::add_weighted:
      return add_weighted(team, i.size, t.grad_y, t.x[0], t.y);
    case Op::copy:
      return copy(team, i.size, t.x[0], t.y);
    case Op::zero:
      return zero(team, i.size, t.y);
    default:
      return run_layer(i.op, i.layer, t, std::make_integer_sequence<int, kKinds>());
  }
}

/// Two slots for instructions, and this thread's words of the instruction that is being loaded.
template <class T>
class Reader {
 public:
  __device__ Reader(const DevicePlan& plan, uint64_t* slots) : program_(plan.program), slots_(slots) {}
  __device__ void fetch(int instruction) {
    const uint64_t* from =
        static_cast<const uint64_t*>(program_) + static_cast<int64_t>(instruction) * kWords;
    for (int j = 0; j < kWordsAThread; ++j) {
      const int word = static_cast<int>(threadIdx.x) + j * kThreads;
      if (word < kWords) words_[j] = from[word];
    }
  }
  __device__ void store(int instruction, const Memory& memory, int64_t task) {
    for (int j = 0; j < kWordsAThread; ++j) {
      const int word = static_cast<int>(threadIdx.x) + j * kThreads;
      if (word >= kWords) continue;
      uint64_t value = words_[j];
      const bool symbolic = word < kSymbolicWords && (value >> kRegionShift) != 0;
      if (symbolic) value = address_of(value, memory, task);
      slots_[instruction % 2 * kWords + word] = value;
    }
  }
  __device__ const Instruction<T>& operator[](int instruction) const {
    return *reinterpret_cast<const Instruction<T>*>(slots_ + instruction % 2 * kWords);
  }

  static constexpr int kWords = sizeof(Instruction<T>) / sizeof(uint64_t);

 private:
  static constexpr int kSymbolicWords = offsetof(Tensors<T>, add_x) / sizeof(uint64_t);
  static constexpr int kWordsAThread = (kWords + kThreads - 1) / kThreads;
  const void* program_;
  uint64_t* slots_;
  uint64_t words_[kWordsAThread];
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    megakernel(const __grid_constant__ Spans call, SpanOrder order, DevicePlan plan, Layout layout,
               int64_t result_size, int rate_count, Span* table_out) {
  __shared__ uint64_t slots[2 * Reader<T>::kWords];
  __shared__ Table table;
  __shared__ double sums[kThreads];  // of reductions
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t task = blockIdx.z;
  const Team team = block_team();
  T* memory = reinterpret_cast<T*>(dynamic_shared());
  constexpr int kRegions = static_cast<int>(Region::count);
  for (int r = thread; r < kRegions; r += kThreads) table.regions[r] = call.spans[r];
  // The task's part of the workspace is the block's shared memory.
  const Memory addresses{&table, nullptr, {reinterpret_cast<unsigned char*>(memory), 0}, nullptr};
  if (task == 0) {
    for (int s = thread; s < order.count; s += kThreads) table_out[s] = call.spans[s];
  }
  auto user = [&](int span) {
    const Span& s = call.spans[span];
    return s.start ? reinterpret_cast<T*>(s.start + task * s.stride) : nullptr;
  };
  for (int p = 0; p < plan.parameter_count; ++p) {
    const ParameterInfo& parameter = plan.parameters[p];
    pack(team, parameter, user(order.parameters + p), memory + layout.own + parameter.at);
    if (order.given < order.per_task) {
      pack(team, parameter, user(order.given + p), memory + layout.given + parameter.at);
    }
  }
  for (int r = 0; r < rate_count; ++r) {
    pack_rate(team, plan, plan.rates[r], user(order.rates + r), memory + layout.rates + plan.rates[r].at);
  }
  Reader<T> program(plan, slots);
  program.fetch(0);
  __syncthreads();  // the table
  program.store(0, addresses, task);
  for (int i = 0; i < plan.program_length; ++i) {
    __syncthreads();
    if (i + 1 < plan.program_length) program.fetch(i + 1);
    run_instruction(program[i], plan, memory + layout.rates, sums);
    if (i + 1 < plan.program_length) program.store(i + 1, addresses, task);
  }
  __syncthreads();
  const Span& results = call.spans[static_cast<int>(Region::task)];
  if (results.stride) {
    copy(team, result_size, memory + layout.result,
         reinterpret_cast<T*>(results.start + task * results.stride));
  }
  for (int p = 0; order.per_task < order.count && p < plan.parameter_count; ++p) {
    T* to = user(order.per_task + p);
    if (to) unpack(team, plan.parameters[p], memory + layout.out + plan.parameters[p].at, to);
  }
}

}  // namespace

template <class T>
void launch_megakernel(const Launcher& launch, const Problem& problem, const Layout& layout,
                       const DevicePlan& plan, const Span* spans, const SpanOrder& order, Span* table) {
  Spans call{};
  std::copy_n(spans, order.count, call.spans);
  launch("megakernel", megakernel<T>, {}, kThreads, static_cast<size_t>(layout.task_size) * sizeof(T), call,
         order, plan, layout, problem.result_size, static_cast<int>(problem.rate_tensors.size()), table);
}
template void launch_megakernel<float>(const Launcher&, const Problem&, const Layout&, const DevicePlan&,
                                       const Span*, const SpanOrder&, Span*);
template void launch_megakernel<double>(const Launcher&, const Problem&, const Layout&, const DevicePlan&,
                                        const Span*, const SpanOrder&, Span*);

template <class T>
bool fits_one_block(const Layout& layout, int device) {
  const OnDevice on(device);
  const size_t bytes = static_cast<size_t>(layout.task_size) * sizeof(T) + static_shared_bytes(megakernel<T>);
  return bytes <= most_shared_bytes(device);
}
template bool fits_one_block<float>(const Layout&, int);
template bool fits_one_block<double>(const Layout&, int);

}  // namespace maml::cuda
