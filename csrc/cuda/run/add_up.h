// The sums over tasks, in double and in order of tasks. Their bits depend neither on how tasks are divided
// into chunks nor on the grid:
//
//   gradient[i] = sum_t weight_t result_t[i],      loss = sum_t weight_t task_loss_t
//
// A block owns kSummed consecutive elements of a tensor. All its threads copy the values of kTasksAtOnce
// tasks to shared memory, with 16-byte loads that are all in flight together; then each thread adds up its
// element in order. So the latency of memory is paid once for 64 tasks, and no tree over tasks has to be cut
// where a chunk ends. Each parameter and each rate tensor has a row of blocks along y, and one more row sums
// the loss. Between chunks of tasks, the partial sums are kept in `totals`.
#pragma once

#include "cuda/run/layout.h"
#include "cuda/run/pack.h"
#include "cuda/run/updates.h"
#include "cuda/vectors.h"

namespace maml::cuda {

struct AddUp {
  int64_t tasks, all_tasks;  // of this chunk; of the call
  int64_t totals, result;    // offsets (Layout)
  double equal_weight;       // used where the call gives no weights
  bool first, last;          // whether this is the first chunk, and the last
};

inline constexpr int kTasksAtOnce = kSmallTiles ? 8 : 64;
inline constexpr int kSumLanes = kSmallTiles ? 8 : 32;  // threads that read one task's vectors
template <class T>
inline constexpr int kSummed = kSumLanes * kVector<T>;
static_assert(kSummed<float> <= kReductionThreads);
inline constexpr int64_t kMostSumBlocks =
    kSmallTiles ? 3 : 512;  // of a tensor; several for each multiprocessor

/// The values of tasks in shared memory.
template <class T>
using TaskValues = Numbers<T, kVector<T>>[kTasksAtOnce][kSumLanes];

/// Calls store(i, sum) for the elements i of a tensor of `size` elements, at `at` in a task's result, that
/// this block owns; only in the last chunk. All threads must call.
template <class T, class Store>
__device__ __forceinline__ void each_sum(Team team, const AddUp& a, const Memory& chunk, int64_t at,
                                         int64_t size, TaskValues<T>& values, Store store) {
  constexpr int N = kVector<T>, rows = kReductionThreads / kSumLanes;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kSumLanes, row = thread / kSumLanes;
  const T* weights = resolve(place<const T>(Region::task_weights), chunk, 0);
  double* totals = reinterpret_cast<double*>(resolve(place<T>(Region::shared, a.totals), chunk, 0)) + at;
  auto results = [&](int64_t task) { return resolve(place<T>(Region::task, a.result + at), chunk, task); };
  const bool whole_rows = aligned(results(0)) && chunk.task.stride % 16 == 0;
  for (int64_t first = int64_t{team.block} * kSummed<T>; first < size;
       first += int64_t{team.blocks} * kSummed<T>) {
    const int64_t own = first + thread, read = first + lane * N;
    const bool owns = thread < kSummed<T> && own < size;
    const Lanes lanes{static_cast<int>(std::min<int64_t>(N, size - read)), whole_rows && size - read >= N};
    double sum = owns && !a.first ? totals[own] : 0;
    for (int64_t task = 0; task < a.tasks; task += kTasksAtOnce) {
      const int count = static_cast<int>(std::min<int64_t>(kTasksAtOnce, a.tasks - task));
#pragma unroll
      for (int k = 0; k < kTasksAtOnce / rows; ++k) {
        const int t = row + k * rows;
        if (t < count && read < size) values[t][lane] = load<N>(results(task + t) + read, lanes);
      }
      __syncthreads();
      for (int t = 0; owns && t < count; ++t) {
        const double weight = weights ? static_cast<double>(weights[task + t]) : a.equal_weight;
        sum += weight * static_cast<double>(values[t][thread / N].at[thread % N]);
      }
      __syncthreads();
    }
    if (owns && !a.last) totals[own] = sum;
    if (owns && a.last) store(own, static_cast<T>(sum));
  }
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
  __shared__ TaskValues<T> values;
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
    each_sum<T>(team, a, chunk, p.at, p.size, values,
                [&](int64_t i, T sum) { gradient[p.gradient_at + user_index(p, i)] = sum; });
    return;
  }
  const RateInfo& rate = plan.rates[row - plan.parameter_count];
  if (rate.gradient_at < 0) return;
  each_sum<T>(team, a, chunk, rate.result_at, rate.size, values, [&](int64_t i, T sum) {
    int64_t to = i;
    if (rate.parameter >= 0) {
      const ParameterInfo& p = plan.parameters[rate.parameter];
      to = i / p.size * p.size + user_index(p, i % p.size);
    }
    gradient[rate.gradient_at + to] = sum;
  });
}

}  // namespace maml::cuda
