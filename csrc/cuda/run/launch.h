// Launching kernels: the one place for the stream, the number of tasks, and errors that name the kernel.
#pragma once

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/run/address.h"

namespace maml::cuda {

/// A CUDA call failed; the message says what was being done.
struct Failed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Failed(std::string(what) + ": " + cudaGetErrorString(status));
}

/// The bytes of static shared memory of a kernel.
template <class... Params>
size_t static_shared_bytes(void (*kernel)(Params...)) {
  cudaFuncAttributes own{};
  check(cudaFuncGetAttributes(&own, reinterpret_cast<const void*>(kernel)),
        "asking for a kernel's shared memory");
  return own.sharedSizeBytes;
}

/// The most shared memory that a block can use on a device.
inline size_t most_shared_bytes(int device) {
  int most = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for shared memory");
  return static_cast<size_t>(most);
}

/// Lets launches give a kernel all the shared memory that a block can use; CUDA's default limit is 48 KB.
/// Done once for each kernel and device. The value is always the same, so that no thread lowers the limit
/// that another one is about to use.
template <class... Params>
void allow_shared_memory(void (*kernel)(Params...)) {
  static std::mutex mutex;
  static std::set<std::pair<void (*)(Params...), int>> allowed;
  int device = 0;
  check(cudaGetDevice(&device), "asking for the device");
  const std::lock_guard lock(mutex);
  if (allowed.contains({kernel, device})) return;
  const size_t most = most_shared_bytes(device) - static_shared_bytes(kernel);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)),
        "allowing shared memory");
  allowed.emplace(kernel, device);
}

/// Whether a kernel waits by itself for the kernels before it: it takes a Deferred.
template <class... Params>
inline constexpr bool kWaits = (std::is_same_v<Params, Deferred> || ...);

/// The blocks (x, y) of one task; blockIdx.z is the task.
struct Grid {
  int64_t x = 1, y = 1;
};

/// A second stream within a graph capture, with the events that order it with the first: kernels launched on
/// it become a parallel branch of the graph.
struct Branch {
  cudaStream_t stream = nullptr;
  cudaEvent_t forked = nullptr, done = nullptr;
};

/// Whether a launch of this device may start before the kernel ahead of it has ended: programmatic dependent
/// launch, from compute capability 9.0 on.
inline bool starts_early() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "asking for the compute capability");
  return major >= 9;
}

/// Launches kernels for all tasks of a call, in the order of the calls. A kernel takes symbolic addresses
/// and, last, the memory that resolves them; or real addresses only.
struct Launcher {
  cudaStream_t stream;
  int64_t tasks;
  Deferred memory;
  const Branch* branch = nullptr;    // null: there is one stream only
  mutable bool after_event = false;  // the next kernel waits for an event, so it does not start early

  /// A launcher on the branch; its kernels start after those launched here so far.
  Launcher fork() const {
    check(cudaEventRecord(branch->forked, stream), "forking the graph");
    check(cudaStreamWaitEvent(branch->stream, branch->forked, 0), "forking the graph");
    Memory beside = memory.memory();
    beside.counters += kCounters;
    return {branch->stream, tasks, Deferred(beside), nullptr, true};
  }
  /// Makes the following kernels wait for the branch.
  void join() const {
    check(cudaEventRecord(branch->done, branch->stream), "joining the graph's branches");
    check(cudaStreamWaitEvent(stream, branch->done, 0), "joining the graph's branches");
    after_event = true;
  }

  template <class... Params>
  void operator()(const char* name, void (*kernel)(Params...), Grid grid, int threads, size_t shared_bytes,
                  std::type_identity_t<Params>... params) const {
    if (shared_bytes > 0) allow_shared_memory(kernel);
    cudaLaunchConfig_t config{};
    config.gridDim =
        dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(tasks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    if constexpr (kWaits<Params...>) {
      config.attrs = &early;
      config.numAttrs = !after_event && starts_early() ? 1 : 0;
    }
    after_event = false;
    check(cudaLaunchKernelEx(&config, kernel, params...), name);
  }
};

constexpr int64_t blocks_for(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

/// The threads that work together on one instruction of one task: some blocks of a grid, or a single block.
struct Team {
  int block, blocks;
  __device__ __forceinline__ int64_t first() const {
    return static_cast<int64_t>(block) * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  }
  __device__ __forceinline__ int64_t step() const {
    return static_cast<int64_t>(blocks) * static_cast<int64_t>(blockDim.x);
  }
};

/// All blocks along x, in a kernel launched for one task's blocks.
__device__ __forceinline__ Team grid_team() {
  return {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};
}

/// A single block. Functions that are templates of the team make less of their loops for it: an interpreter
/// has many of them in one kernel.
struct BlockTeam : Team {};
__device__ __forceinline__ BlockTeam block_team() { return {{0, 1}}; }

template <class T>
concept AnyTeam = std::is_base_of_v<Team, T>;

}  // namespace maml::cuda
