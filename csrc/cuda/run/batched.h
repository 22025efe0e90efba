// The executor that serves every plan: each pass of a layer is one or a few kernels over all tasks of a chunk
// (blockIdx.z is the task). It is a backend of TaskRunner whose functions launch kernels.
//
// In a captured graph, the part of the query pass that depends on no parameter is a branch parallel to the
// inner loop. With 75 images of mini-ImageNet and 4 tasks, that part is 2.1 M patches of 27 elements, some
// 0.9 G multiply-adds in double, or at least 50 us at an H100's rate, while the inner steps on 5 images each
// leave most of the GPU idle. Weight gradients could be branches too, because the chain of cotangents does
// not wait for them. But that would cost a fork and a join for each layer and pass, separate scratch, and
// cotangents that are kept for one layer longer. Without a graph, everything runs on the caller's stream.
#pragma once

#include "cuda/layers.h"
#include "cuda/loss.h"
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
class Batched {
 public:
  /// `rates`: the symbolic address of the packed rates.
  Batched(const Launcher& launch, const Problem& problem, const DevicePlan& plan, const T* rates)
      : launch_(launch), problem_(problem), plan_(plan), rates_(rates) {
    for (const std::vector<RateSlice>& step : problem.slices) {
      for (const RateSlice& s : step) {
        largest_ = std::max(largest_, s.size);
        if (s.grad_at != kNowhere) (s.elementwise ? learns_elementwise_ : learns_shared_) = true;
      }
    }
  }

  void forward(const Layer& l, const Tensors<T>& t) const {
    note_pass(Op::forward, l, t);
    passes_of<T>(l.kind).forward(launch_, l, t);
  }
  void backward(const Layer& l, const Tensors<T>& t) const {
    note_pass(Op::backward, l, t);
    passes_of<T>(l.kind).backward(launch_, l, t);
  }
  void forward_tangent(const Layer& l, const Tensors<T>& t) const {
    note_pass(Op::forward_tangent, l, t);
    passes_of<T>(l.kind).forward_tangent(launch_, l, t);
  }
  void backward_tangent(const Layer& l, const Tensors<T>& t) const {
    note_pass(Op::backward_tangent, l, t);
    passes_of<T>(l.kind).backward_tangent(launch_, l, t);
  }

  /// Runs f(backend) as a branch of the graph; without a graph does nothing and returns false.
  template <class F>
  bool beside(F f) const {
    if (!launch_.branch) return false;
    const Launcher launch = launch_.fork();
    f(Batched(launch, problem_, plan_, rates_));
    return true;
  }
  void join() const { launch_.join(); }

  void loss(const LossPart& part, const T* z, const Target<T>& target, T* value, T* grad_z, T* saved) const {
    note([&] { return traffic<T>(part.n * part.c, grad_z ? 4 : 2); });
    launch_loss(launch_, part, z, target, value, grad_z, saved);
  }
  void loss_tangent(const LossPart& part, const T* z, const Target<T>& target, const T* z_dot, const T* saved,
                    T* grad_z_dot) const {
    note([&] { return traffic<T>(part.n * part.c, 3); });
    launch_loss_tangent(launch_, part, z, target, z_dot, saved, grad_z_dot);
  }
  void metric(const LossPart& part, const T* z, const Target<T>& target, const T* z_dot, T* grad_z) const {
    note([&] { return traffic<T>(part.n * part.c, 3); });
    launch_metric(launch_, part, z, target, z_dot, grad_z);
  }

  void descend(const std::vector<RateSlice>& step, const T* phi, const T* g, T* next) const {
    note([&] { return traffic<T>(problem_.packing.adapted, 3); });
    launch_("descend", descend_kernel<T>, slice_grid(), kVectorThreads, 0, slices(step), rates_, phi, g, next,
            launch_.memory);
  }
  void direction(const std::vector<RateSlice>& step, const T* v, T* out) const {
    note([&] { return traffic<T>(problem_.packing.adapted, 2); });
    launch_("direction", direction_kernel<T>, slice_grid(), kVectorThreads, 0, slices(step), rates_, v, out,
            launch_.memory);
  }
  void rate_gradient(const std::vector<RateSlice>& step, const T* g, const T* v, T* result) const {
    if (learns_elementwise_) {
      launch_("elementwise rate gradient", elementwise_rate_gradient_kernel<T>, slice_grid(), kVectorThreads,
              0, slices(step), g, v, result, launch_.memory);
    }
    if (learns_shared_) {
      launch_("rate gradient", shared_rate_gradients_kernel<T>, {}, kReductionThreads, 0, slices(step),
              plan_.slices_a_step, g, v, result, launch_.memory);
    }
  }
  void retreat(int64_t size, const T* product, T* v, const std::vector<RateSlice>& step, T* out) const {
    const int64_t adapted = problem_.packing.adapted, rest = size - adapted;
    const int count = plan_.slices_a_step;
    note([&] { return traffic<T>(size, out ? 4 : 3); });
    launch_("retreat", retreat_kernel<T>, {vector_blocks(std::max(largest_, rest)), count + (rest > 0)},
            kVectorThreads, 0, slices(step), count, adapted, size, rates_, product, v, out, launch_.memory);
  }
  void add_weighted(int k, int64_t size, const T* x, T* y) const {
    note([&] { return traffic<T>(size, 3); });
    launch_("add weighted", add_weighted_kernel<T>, {vector_blocks(size)}, kVectorThreads, 0, size,
            static_cast<const T*>(place<T>(Region::query_weights, k)), x, y, launch_.memory);
  }
  void copy(int64_t size, const T* from, T* to) const {
    if (size == 0) return;
    note([&] { return traffic<T>(size, 2); });
    launch_("copy", copy_kernel<T>, {vector_blocks(size)}, kVectorThreads, 0, size, from, to, launch_.memory);
  }
  void zero(int64_t size, T* to) const {
    if (size == 0) return;
    note([&] { return traffic<T>(size, 1); });
    launch_("zero", zero_kernel<T>, {vector_blocks(size)}, kVectorThreads, 0, size, to, launch_.memory);
  }

 private:
  /// Declares the work of a pass, except where the launches of its products do so themselves.
  static void note_pass(Op op, const Layer& l, const Tensors<T>& t) {
    for (const Kind kind : {Kind::conv2d, Kind::stem, Kind::contract, Kind::attention, Kind::recurrence}) {
      if (l.kind == kind) return;
    }
    note([&] { return work_of(op, l, t); });
  }

  /// The step's slices in device memory.
  const RateSlice* slices(const std::vector<RateSlice>& step) const {
    return plan_.slices + (&step - problem_.slices.data()) * plan_.slices_a_step;
  }
  Grid slice_grid() const { return {vector_blocks(largest_), plan_.slices_a_step}; }

  const Launcher& launch_;
  const Problem& problem_;
  const DevicePlan& plan_;
  const T* rates_;
  int64_t largest_ = 0;
  bool learns_elementwise_ = false, learns_shared_ = false;
};

}  // namespace maml::cuda
