// The executor that serves every plan: it launches a program (program.h), instruction after instruction. Each
// pass of a layer is one or a few kernels over all tasks of a chunk (blockIdx.z is the task); a run of small
// instructions is one kernel together (small_run.h).
//
// In a captured graph, the part of the query pass that depends on no parameter is a branch parallel to the
// inner loop. With 75 images of mini-ImageNet and 4 tasks, that part is 2.1 M patches of 27 elements, some
// 0.9 G multiply-adds in double, or at least 50 us at an H100's rate, while the inner steps on 5 images each
// leave most of the GPU idle. Weight gradients could be branches too, because the chain of cotangents does
// not wait for them. But that would cost a fork and a join for each layer and pass, separate scratch, and
// cotangents that are kept for one layer longer. Without a graph, everything runs on the caller's stream.
#pragma once

#include <optional>

#include "cuda/layers.h"
#include "cuda/loss.h"
#include "cuda/run/normalised_pair.h"
#include "cuda/run/normalised_sum.h"
#include "cuda/run/optimizer_steps.h"
#include "cuda/run/small_run.h"
#include "cuda/run/stem_step.h"
#include "cuda/run/summed_pair.h"
#include "cuda/run/transforms.h"
#include "cuda/run/updates.h"
#include "cuda/run/work.h"

namespace maml::cuda {

template <class T>
__global__ void __launch_bounds__(kVectorThreads)
    descend_kernel(const RateSlice* slices, const T* rates, const T* phi, const T* g, T* next,
                   Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  descend(grid_team(), slices[blockIdx.y], resolve(rates, memory, task), resolve(phi, memory, task),
          resolve(g, memory, task), resolve(next, memory, task));
}

template <class T>
__global__ void __launch_bounds__(kVectorThreads)
    direction_kernel(const RateSlice* slices, const T* rates, const T* v, T* out, Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  direction(grid_team(), slices[blockIdx.y], resolve(rates, memory, task), resolve(v, memory, task),
            resolve(out, memory, task));
}

/// Row y of blocks takes slice y; the last row takes the parameters that are not adapted.
template <class T>
__global__ void __launch_bounds__(kVectorThreads)
    retreat_kernel(const RateSlice* slices, int count, int64_t adapted, int64_t size, const T* rates,
                   const T* product, T* v, T* out, Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  product = resolve(product, memory, task), v = resolve(v, memory, task);
  if (static_cast<int>(blockIdx.y) == count) {
    return subtract(grid_team(), size - adapted, product + adapted, v + adapted);
  }
  retreat(grid_team(), slices[blockIdx.y], resolve(rates, memory, task), product, v,
          resolve(out, memory, task));
}

template <class T>
__global__ void __launch_bounds__(kVectorThreads)
    elementwise_rate_gradient_kernel(const RateSlice* slices, const T* g, const T* v, T* result,
                                     Deferred deferred) {
  const Memory memory = deferred.ready();
  const RateSlice& slice = slices[blockIdx.y];
  if (slice.grad_at == kNowhere || !slice.elementwise) return;
  const int64_t task = blockIdx.z;
  elementwise_rate_gradient(grid_team(), slice, resolve(g, memory, task), resolve(v, memory, task),
                            resolve(result, memory, task));
}

template <class T>
__global__ void __launch_bounds__(kReductionThreads)
    shared_rate_gradients_kernel(const RateSlice* slices, int count, const T* g, const T* v, T* result,
                                 Deferred deferred) {
  const Memory memory = deferred.ready();
  __shared__ double sums[kReductionThreads];
  const int64_t task = blockIdx.z;
  shared_rate_gradients(slices, count, resolve(g, memory, task), resolve(v, memory, task),
                        resolve(result, memory, task), sums);
}

template <class T>
__global__ void __launch_bounds__(kVectorThreads)
    add_weighted_kernel(int64_t size, const T* w, const T* x, T* y, Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  add_weighted(grid_team(), size, resolve(w, memory, task), resolve(x, memory, task),
               resolve(y, memory, task));
}
template <class T>
__global__ void __launch_bounds__(kVectorThreads)
    copy_kernel(int64_t size, const T* from, T* to, Deferred deferred) {
  const Memory memory = deferred.ready();
  copy(grid_team(), size, resolve(from, memory, blockIdx.z), resolve(to, memory, blockIdx.z));
}
template <class T>
__global__ void __launch_bounds__(kVectorThreads) zero_kernel(int64_t size, T* to, Deferred deferred) {
  const Memory memory = deferred.ready();
  zero(grid_team(), size, resolve(to, memory, blockIdx.z));
}

template <class T>
__global__ void __launch_bounds__(kVectorThreads)
    pull_kernel(int64_t size, T strength, const T* phi, const T* theta, T* g, Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  pull(grid_team(), size, strength, resolve(phi, memory, task), resolve(theta, memory, task),
       resolve(g, memory, task));
}
template <class T>
__global__ void __launch_bounds__(kReductionThreads)
    conjugate_step_kernel(ConjugateStep step, const T* product, T* p, T* r, T* x, T* norm,
                          Deferred deferred) {
  const Memory memory = deferred.ready();
  __shared__ double sums[kReductionThreads];
  const int64_t task = blockIdx.z;
  conjugate_step(step, resolve(product, memory, task), resolve(p, memory, task), resolve(r, memory, task),
                 resolve(x, memory, task), resolve(norm, memory, task), sums);
}

/// Launches single instructions.
template <class T>
class Batched {
 public:
  /// `rates`: the symbolic address of the packed rates.
  Batched(const Problem& problem, const DevicePlan& plan, const T* rates)
      : plan_(plan), rates_(rates), adapted_(problem.packing.adapted) {
    for (const std::vector<RateSlice>& step : problem.slices) {
      for (const RateSlice& s : step) {
        largest_ = std::max(largest_, s.size);
        if (s.grad_at != kNowhere) (s.elementwise ? learns_elementwise_ : learns_shared_) = true;
      }
    }
  }

  void operator()(const Launcher& launch, const Instruction<T>& i) const {
    const Tensors<T>& t = i.tensors;
    const RateSlice* slices = plan_.slices + i.slices;
    const int count = plan_.slices_a_step;
    if (!declares_its_work(i)) note([&] { return work_of(i, adapted_); });
    if (is_of_transform(i.op)) return launch_transform(launch, i, plan_, rates_, largest_);
    if (is_of_optimizer(i.op)) return launch_optimizer(launch, i, plan_, rates_, largest_);
    switch (i.op) {
      case Op::forward:
        return passes_of<T>(i.layer.kind).forward(launch, i.layer, t);
      case Op::backward:
        return passes_of<T>(i.layer.kind).backward(launch, i.layer, t);
      case Op::forward_tangent:
        return passes_of<T>(i.layer.kind).forward_tangent(launch, i.layer, t);
      case Op::backward_tangent:
        return passes_of<T>(i.layer.kind).backward_tangent(launch, i.layer, t);
      case Op::loss:
        return launch_loss(launch, i.loss, t.x[0], target_of(t), t.y, t.grad_x[0], t.saved);
      case Op::loss_tangent:
        return launch_loss_tangent(launch, i.loss, t.x[0], target_of(t), t.x_dot[0],
                                   static_cast<const T*>(t.saved), t.grad_x_dot[0]);
      case Op::metric:
        return launch_metric(launch, i.loss, t.x[0], target_of(t), t.x_dot[0], t.grad_x[0]);
      case Op::descend:
        return launch("descend", descend_kernel<T>, slice_grid(), kVectorThreads, 0, slices, rates_, t.x[0],
                      t.grad_y, t.y, launch.memory);
      case Op::direction:
        return launch("direction", direction_kernel<T>, slice_grid(), kVectorThreads, 0, slices, rates_,
                      t.x[0], t.y, launch.memory);
      case Op::rate_gradient:
        if (learns_elementwise_) {
          launch("elementwise rate gradient", elementwise_rate_gradient_kernel<T>, slice_grid(),
                 kVectorThreads, 0, slices, t.grad_y, t.x[0], t.y, launch.memory);
        }
        if (learns_shared_) {
          launch("rate gradient", shared_rate_gradients_kernel<T>, {}, kReductionThreads, 0, slices, count,
                 t.grad_y, t.x[0], t.y, launch.memory);
        }
        return;
      case Op::retreat:
        return launch("retreat", retreat_kernel<T>,
                      {vector_blocks(std::max(largest_, i.size)), count + (i.size > 0)}, kVectorThreads, 0,
                      slices, count, adapted_, adapted_ + i.size, rates_, t.grad_y, t.y, t.saved,
                      launch.memory);
      case Op::add_weighted:
        return launch("add weighted", add_weighted_kernel<T>, {vector_blocks(i.size)}, kVectorThreads, 0,
                      i.size, t.grad_y, t.x[0], t.y, launch.memory);
      case Op::pull:
        return launch("pull", pull_kernel<T>, {vector_blocks(i.size)}, kVectorThreads, 0, i.size,
                      static_cast<T>(i.layer.a), t.x[0], t.x[1], t.y, launch.memory);
      case Op::conjugate_step:
        return launch("conjugate step", conjugate_step_kernel<T>, {}, kReductionThreads, 0,
                      conjugate_step_of(i.layer, i.size), t.grad_y, t.y, t.y_dot, t.saved, t.saved_dot,
                      launch.memory);
      case Op::copy:
        return launch("copy", copy_kernel<T>, {vector_blocks(i.size)}, kVectorThreads, 0, i.size, t.x[0], t.y,
                      launch.memory);
      case Op::zero:
        return launch("zero", zero_kernel<T>, {vector_blocks(i.size)}, kVectorThreads, 0, i.size, t.y,
                      launch.memory);
      default:  // Op::join
        return;
    }
  }

 private:
  /// Whether the launches of an instruction do so themselves.
  static bool declares_its_work(const Instruction<T>& i) {
    if (!is_pass(i.op)) return false;
    constexpr Kind kinds[] = {Kind::conv2d, Kind::stem, Kind::contract, Kind::attention, Kind::recurrence};
    return std::find(std::begin(kinds), std::end(kinds), i.layer.kind) != std::end(kinds);
  }
  Grid slice_grid() const { return {vector_blocks(largest_), plan_.slices_a_step}; }

  const DevicePlan& plan_;
  const T* rates_;
  const int64_t adapted_;
  int64_t largest_ = 0;
  bool learns_elementwise_ = false, learns_shared_ = false;
};

/// Launches a program that consists of these runs.
template <class T>
void launch_program(const Launcher& launch, const std::vector<Instruction<T>>& program,
                    const std::vector<Run>& runs, const Problem& problem, const DevicePlan& plan,
                    const T* rates) {
  const Batched<T> alone(problem, plan, rates);
  std::optional<Launcher> branch;
  for (size_t r = 0; r < runs.size(); ++r) {
    const Run& run = runs[r];
    const Instruction<T>& first = program[run.first];
    const bool has_next = run.interpreted < 0 && r + 1 < runs.size() && runs[r + 1].interpreted < 0;
    if (first.beside && launch.branch && !branch) branch = launch.fork();
    const Launcher& on = first.beside && branch ? *branch : launch;
    if (run.interpreted >= 0) {
      note([&] {
        Work work;
        for (int i = 0; i < run.length; ++i) work += work_of(program[run.first + i], problem.packing.adapted);
        work.instructions = run.length;
        if (run.blocks > 1) work.part_bytes = work_of(first, problem.packing.adapted).bytes;
        return work;
      });
      launch_small_run(on, plan, run, rates);
    } else if (first.op == Op::join) {
      if (branch) launch.join();
    } else if (has_next && is_normalised_pair(first, program[run.first + 1])) {
      launch_normalised_pair(on, first, program[run.first + 1]);
      ++r;
    } else if (has_next && is_summed_pair(first, program[run.first + 1])) {
      launch_summed_pair(on, first, program[run.first + 1], problem.packing.adapted);
      ++r;
    } else if (const auto sum = has_next ? normalised_sum(first, program[run.first + 1]) : std::nullopt) {
      launch_normalised_sum(on, first, program[run.first + 1], *sum, problem.packing.adapted);
      ++r;
    } else if (const auto step = has_next ? step_after(first, program[run.first + 1], problem, plan, rates)
                                          : std::nullopt) {
      stem_backward_and_step(on, first.layer, first.tensors, first.op == Op::backward_tangent, *step,
                             work_of(program[run.first + 1], problem.packing.adapted));
      ++r;
    } else {
      alone(on, first);
    }
  }
}

}  // namespace maml::cuda
