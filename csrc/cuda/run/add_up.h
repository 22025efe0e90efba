// The sums over tasks, in double and in order of tasks. Their bits depend neither on how tasks are divided
// into chunks nor on the grid:
//
//   gradient[i] = sum_t weight_t result_t[i],      loss = sum_t weight_t task_loss_t
//
// One thread owns one element of the result and reads it from one task after the other; consecutive threads
// read consecutive elements. Each parameter and each rate tensor has a row of blocks along y, and one more
// row sums the loss. Between chunks of tasks, the partial sums are kept in `totals`.
#pragma once

#include "cuda/run/layout.h"
#include "cuda/run/pack.h"
#include "cuda/run/updates.h"

namespace maml::cuda {

struct AddUp {
  int64_t tasks, all_tasks;  // of this chunk; of the call
  int64_t totals, result;    // offsets (Layout)
  double equal_weight;       // used where the call gives no weights
  bool first, last;          // whether this is the first chunk, and the last
};

/// Element i of the result: its total so far plus the tasks of this chunk.
template <class T>
__device__ double sum_of_tasks(const AddUp& a, const Memory& chunk, int64_t i) {
  const T* weights = resolve(place<const T>(Region::task_weights), chunk, 0);
  double* total = reinterpret_cast<double*>(resolve(place<T>(Region::shared, a.totals), chunk, 0)) + i;
  const Span tasks = chunk.task;
  double sum = a.first ? 0 : *total;
  for (int64_t t = 0; t < a.tasks; ++t) {
    const T* result = reinterpret_cast<const T*>(tasks.start + t * tasks.stride) + a.result;
    sum += (weights ? static_cast<double>(weights[t]) : a.equal_weight) * static_cast<double>(result[i]);
  }
  if (!a.last) *total = sum;
  return sum;
}

/// The loss, summed over all tasks: each thread sums its tasks in order, then a tree sums over the block.
template <class T>
__device__ void sum_losses(const AddUp& a, const Memory& call) {
  __shared__ double sums[kReductionThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const T* weights = resolve(place<const T>(Region::task_weights), call, 0);
  const T* losses = resolve(place<const T>(Region::task_losses), call, 0);
  double sum = 0;
  for (int64_t t = thread; t < a.all_tasks; t += kReductionThreads) {
    sum += (weights ? static_cast<double>(weights[t]) : a.equal_weight) * static_cast<double>(losses[t]);
  }
  sums[thread] = sum;
  for (int half = kReductionThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  if (thread == 0) *resolve(place<T>(Region::loss), call, 0) = static_cast<T>(sums[0]);
}

/// `first`: the table of the first chunk, where the call's outputs start.
template <class T>
__global__ void __launch_bounds__(kReductionThreads)
    add_up_kernel(AddUp a, DevicePlan plan, const Table* first, Deferred deferred) {
  const Memory chunk = deferred.ready();
  Memory call = chunk;
  call.table = first;
  const int row = static_cast<int>(blockIdx.y);
  const Team team = grid_team();
  if (row == plan.parameter_count + plan.rate_count) {
    const bool wanted = call[Region::loss].start != nullptr;
    if (a.last && wanted && blockIdx.x == 0) sum_losses<T>(a, call);
    return;
  }
  T* gradient = resolve(place<T>(Region::gradient), call, 0);
  if (!gradient) return;
  if (row < plan.parameter_count) {
    const ParameterInfo& p = plan.parameters[row];
    if (p.gradient_at < 0) return;
    for (int64_t i = team.first(); i < p.size; i += team.step()) {
      const double sum = sum_of_tasks<T>(a, chunk, p.at + i);
      if (a.last) gradient[p.gradient_at + user_index(p, i)] = static_cast<T>(sum);
    }
    return;
  }
  const RateInfo& rate = plan.rates[row - plan.parameter_count];
  if (rate.gradient_at < 0) return;
  for (int64_t i = team.first(); i < rate.size; i += team.step()) {
    const double sum = sum_of_tasks<T>(a, chunk, rate.result_at + i);
    if (!a.last) continue;
    int64_t at = i;
    if (rate.parameter >= 0) {
      const ParameterInfo& p = plan.parameters[rate.parameter];
      at = i / p.size * p.size + user_index(p, i % p.size);
    }
    gradient[rate.gradient_at + at] = static_cast<T>(sum);
  }
}

}  // namespace maml::cuda
