// Conversion between the user's order of elements and the layers'. The user's weights are [rows, columns,
// taps], packed ones [taps, columns, rows]; everything else has the same order in both. Consecutive threads
// take consecutive packed elements.
#pragma once

#include "cuda/run/updates.h"

namespace maml::cuda {

/// The user's index of packed element i of a parameter. Parameters have less than 2^31 elements.
__device__ __forceinline__ int64_t user_index(const ParameterInfo& p, int64_t i) {
  if (p.rows == 1 && p.taps == 1) return i;
  const uint32_t rows = static_cast<uint32_t>(p.rows), taps = static_cast<uint32_t>(p.taps);
  const uint32_t columns = static_cast<uint32_t>(p.size) / (rows * taps);
  const uint32_t rest = static_cast<uint32_t>(i) / rows, row = static_cast<uint32_t>(i) - rest * rows;
  const uint32_t tap = rest / columns, column = rest - tap * columns;
  return (static_cast<int64_t>(row) * columns + column) * taps + tap;
}

/// packed [size] from the user's tensor; zeros where the user gave none.
template <class T>
__device__ void pack(Team team, const ParameterInfo& p, const T* user, T* packed) {
  for (int64_t i = team.first(); i < p.size; i += team.step())
    packed[i] = user ? user[user_index(p, i)] : T(0);
}

template <class T>
__device__ void unpack(Team team, const ParameterInfo& p, const T* packed, T* user) {
  for (int64_t i = team.first(); i < p.size; i += team.step()) user[user_index(p, i)] = packed[i];
}

/// A rate tensor. An elementwise one is a sequence of tensors of the parameter's shape, packed one by one.
template <class T>
__device__ void pack_rate(Team team, const DevicePlan& plan, const RateInfo& rate, const T* user, T* packed) {
  if (rate.parameter < 0) {
    for (int64_t i = team.first(); i < rate.size; i += team.step()) packed[i] = user[i];
    return;
  }
  const ParameterInfo& p = plan.parameters[rate.parameter];
  for (int64_t at = 0; at < rate.size; at += p.size) pack(team, p, user + at, packed + at);
}

// Kernels of the batched executor: each tensor has a row of blocks along y, and span first_span + blockIdx.y
// is the user's copy of it.

/// One more row zeroes the first `counters` counters: the kernel that starts a call has them.
template <class T>
__global__ void __launch_bounds__(kVectorThreads)
    pack_kernel(DevicePlan plan, int first_span, T* packed, int64_t counters, Deferred deferred) {
  const Memory memory = deferred.ready();
  if (static_cast<int>(blockIdx.y) == plan.parameter_count) {
    if (blockIdx.z == 0) zero(grid_team(), counters, memory.counters);
    return;
  }
  const ParameterInfo& p = plan.parameters[blockIdx.y];
  const Span& user = memory.table->regions[first_span + static_cast<int>(blockIdx.y)];
  const int64_t task = blockIdx.z;
  const T* from = user.start ? reinterpret_cast<const T*>(user.start + task * user.stride) : nullptr;
  pack(grid_team(), p, from, resolve(packed, memory, task) + p.at);
}

template <class T>
__global__ void __launch_bounds__(kVectorThreads)
    pack_rates_kernel(DevicePlan plan, int first_span, T* packed, Deferred deferred) {
  const Memory memory = deferred.ready();
  const RateInfo& rate = plan.rates[blockIdx.y];
  const Span& user = memory.table->regions[first_span + static_cast<int>(blockIdx.y)];
  pack_rate(grid_team(), plan, rate, reinterpret_cast<const T*>(user.start),
            resolve(packed, memory, 0) + rate.at);
}

template <class T>
__global__ void __launch_bounds__(kVectorThreads)
    unpack_kernel(DevicePlan plan, int first_span, const T* packed, Deferred deferred) {
  const Memory memory = deferred.ready();
  const ParameterInfo& p = plan.parameters[blockIdx.y];
  const Span& user = memory.table->regions[first_span + static_cast<int>(blockIdx.y)];
  const int64_t task = blockIdx.z;
  if (!user.start) return;
  unpack(grid_team(), p, resolve(packed, memory, task) + p.at,
         reinterpret_cast<T*>(user.start + task * user.stride));
}

}  // namespace maml::cuda
