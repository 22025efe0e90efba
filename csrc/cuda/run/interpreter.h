// Interprets a program (program.h) by one block of kReductionThreads threads.
//
// Threads: instructions run one after the other, with one barrier after each; the threads of the block share
// the elements of an instruction. While one instruction runs, each thread has already loaded some words of
// the next one; it resolves their symbolic addresses and stores them in the other of two slots. So no thread
// waits for the program, and each address is resolved once.
//
// Numerics: products and sums of float32 or float64, whatever precision is asked for: the products are too
// small for matrix instructions to pay.
#pragma once

#include <cstddef>
#include <utility>

#include "cuda/loss.h"
#include "cuda/run/in_block.h"
#include "cuda/run/updates.h"

namespace maml::cuda {

/// Whether programs with tensors in H have kind K.
template <Home H, Kind K>
constexpr bool interprets() {
  if constexpr (H == Home::shared_memory) {
    return Declaration<K>::in_megakernel && Declaration<K>::on_cuda;
  } else {
    return HasBlockPasses<K>;
  }
}

/// Runs the layer if it is of kind K.
template <Home H, Kind K, class T>
__device__ bool run_if(Op op, const Layer& l, const Tensors<T>& t) {
  if constexpr (interprets<H, K>()) {
    if (l.kind == K) InBlock<K>::template run<H>(op, block_team(), l, t);
    return l.kind == K;
  } else {
    return false;
  }
}
template <Home H, class T, int... K>
__device__ void run_layer(Op op, const Layer& l, const Tensors<T>& t, std::integer_sequence<int, K...>) {
  static_cast<void>((run_if<H, static_cast<Kind>(K)>(op, l, t) || ...));
}

/// `rates`: the packed rates; `sums`: shared memory, one element for each thread.
template <Home H, class T>
__device__ void run_instruction(const Instruction<T>& i, const DevicePlan& plan, const T* rates,
                                double* sums) {
  const BlockTeam team = block_team();
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
    case Op::pull:
      return pull(team, i.size, static_cast<T>(i.layer.a), t.x[0], t.x[1], t.y);
    case Op::conjugate_step:
      return conjugate_step(conjugate_step_of(i.layer, i.size), t.grad_y, t.y, t.y_dot, t.saved, t.saved_dot,
                            sums);
    case Op::copy:
      return copy(team, i.size, t.x[0], t.y);
    case Op::zero:
      return zero(team, i.size, t.y);
    case Op::join:
      return;
    default:
      return run_layer<H>(i.op, i.layer, t, std::make_integer_sequence<int, kKinds>());
  }
}

/// Two slots for instructions, and this thread's words of the instruction that is being loaded.
template <class T>
class Reader {
 public:
  /// `slots`: shared memory, of two instructions.
  __device__ Reader(const Instruction<T>* program, uint64_t* slots)
      : program_(reinterpret_cast<const uint64_t*>(program)), slots_(slots) {}
  __device__ void fetch(int instruction) {
    const uint64_t* from = program_ + static_cast<int64_t>(instruction) * kWords;
    for (int j = 0; j < kWordsAThread; ++j) {
      const int word = static_cast<int>(threadIdx.x) + j * kReductionThreads;
      if (word < kWords) words_[j] = from[word];
    }
  }
  __device__ void store(int instruction, const Memory& memory, int64_t task) {
    for (int j = 0; j < kWordsAThread; ++j) {
      const int word = static_cast<int>(threadIdx.x) + j * kReductionThreads;
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
  static constexpr int kWordsAThread = (kWords + kReductionThreads - 1) / kReductionThreads;
  const uint64_t* program_;
  uint64_t* slots_;
  uint64_t words_[kWordsAThread];
};

/// Runs the instructions [first, end), with a barrier before each and none after the last. The caller has
/// fetched the first one.
template <Home H, class T>
__device__ void interpret(Reader<T>& program, int first, int end, const DevicePlan& plan,
                          const Memory& memory, int64_t task, const T* rates, double* sums) {
  program.store(first, memory, task);
  for (int i = first; i < end; ++i) {
    __syncthreads();
    if (i + 1 < end) program.fetch(i + 1);
    run_instruction<H>(program[i], plan, rates, sums);
    if (i + 1 < end) program.store(i + 1, memory, task);
  }
}

}  // namespace maml::cuda
