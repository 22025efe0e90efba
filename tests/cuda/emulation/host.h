// The host side of the emulation: launches, memory, streams, capture and graphs, as in the CUDA runtime. Work
// is done at once, on any stream; on a stream that captures, it is recorded instead (streams.h). All devices
// are equal and share one memory; they differ only in which streams belong to them.
#pragma once

#include <malloc.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalState = 401,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureUnjoined = 904,
  cudaErrorStreamCaptureImplicit = 906
};
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorIllegalState:
      return "the operation cannot be performed in the present state";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined:
      return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing one";
  }
  return "unrecognized error code";
}

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;  // no other attribute is emulated
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

namespace emulation {

inline constexpr size_t kSharedByDefault = 48 * 1024, kSharedAtMost = 227 * 1024;
inline constexpr size_t kParametersAtMost = 4096;  // 32764 from CUDA 12.1 on; the lower limit always holds

inline constexpr int kMostDevices = 4;

struct Stream;

/// The work of one task (a block along z) in a launch, as the caller declares it: csrc/cuda/run/work.h.
struct Work {
  double flop = 0, bytes = 0;
  int instructions = 0, phases = 0;
  double cycles = 0, busy_cycles = 0, part_bytes = 0;
};
inline thread_local Work noted;  // for the next launch

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  const Stream* stream;
  Work work;
  bool early = false;  // launched with programmatic dependent launch
  double seconds = 0;
};

/// Whether the launches of kernels are logged, inside graphs and outside; `only`: and not run.
enum class LogMode { off, on, only };

// All state of the host side except that of streams.
struct Host {
  std::mutex mutex;
  int multiprocessors = 4, devices = 1;
  int major = 9;                             // of the compute capability
  std::atomic<int> launches_to_failure = 0;  // the last of so many launches fails; 0: none
  std::array<std::atomic<int64_t>, kMostDevices> launches{};
  std::vector<Stream*> capturing;
  std::vector<std::pair<const void*, size_t>> shared_limits;  // of kernels with a raised limit
  std::atomic<LogMode> log_mode = LogMode::off;
  std::vector<Launch> log;
};
inline Host host;
inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local int device = 0;

inline void set_multiprocessors(int count) { host.multiprocessors = count; }

inline cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

/// Runs kernel(arguments) for all threads of all blocks of the launch, and logs it. Rethrows the error of a
/// thread.
void run(const Launch& launch, void (*kernel)(const void*), const void* arguments);

/// The mangled name of a function of this program or library; empty if it has none.
std::string name_of(const void* function);

/// Bytes of the __shared__ variables that a kernel declares itself. Those of functions that it calls are not
/// counted: a launch with dynamic shared memory refuses them (run).
size_t static_shared_bytes(const void* kernel);

/// A kernel and its arguments.
template <class... Params>
struct Call {
  void (*kernel)(Params...);
  std::tuple<Params...> params;

  static void make(const void* call) {
    const auto& [kernel, params] = *static_cast<const Call*>(call);
    make(kernel, params, std::index_sequence_for<Params...>());
  }
  template <size_t... i>
  static void make(void (*kernel)(Params...), const std::tuple<Params...>& params,
                   std::index_sequence<i...>) {
    kernel(std::get<i>(params)...);
  }
};

inline cudaError_t check_launch(dim3 grid, dim3 block, size_t shared_bytes, const void* kernel) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.x > 1024 || block.y > 1024 || block.z > 64)
    return cudaErrorInvalidConfiguration;
  if (block.x * block.y * block.z > 1024) return cudaErrorInvalidConfiguration;
  if (shared_bytes == 0) return cudaSuccess;
  size_t limit = kSharedByDefault - static_shared_bytes(kernel);
  const std::lock_guard lock(host.mutex);
  for (const auto& [k, bytes] : host.shared_limits)
    if (k == kernel && bytes > limit) limit = bytes;
  return shared_bytes > limit ? cudaErrorInvalidValue : cudaSuccess;
}

/// Whether this launch is the one that shall fail.
inline bool fails_now() {
  int left = host.launches_to_failure;
  while (left > 0 && !host.launches_to_failure.compare_exchange_weak(left, left - 1)) {
  }
  return left == 1;
}

}  // namespace emulation

#include "streams.h"

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };  // none other is emulated
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return emulation::last_error; }

// ------------------------------------------------------------------------------------------- launches
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  static_assert((std::is_trivially_copyable_v<Params> && ...), "CUDA copies parameters byte by byte");
  static_assert((0 + ... + sizeof(Params)) <= emulation::kParametersAtMost, "too many bytes of parameters");
  const dim3 grid = config->gridDim, block = config->blockDim;
  const size_t shared_bytes = config->dynamicSmemBytes;
  const cudaError_t error =
      emulation::check_launch(grid, block, shared_bytes, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return emulation::report(error);
  if (emulation::fails_now()) return emulation::report(cudaErrorLaunchOutOfResources);
  if (config->stream != nullptr && config->stream->device != emulation::device)
    return emulation::report(cudaErrorInvalidResourceHandle);
  ++emulation::host.launches[static_cast<size_t>(emulation::device)];
  const bool early = config->numAttrs > 0 && config->attrs->val.programmaticStreamSerializationAllowed;
  using Call = emulation::Call<std::remove_const_t<Params>...>;
  const emulation::Launch launch{
      reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, config->stream,
      std::exchange(emulation::noted, {}),   early};
  return emulation::report(
      emulation::submit(config->stream, [launch, call = Call{kernel, {std::forward<Args>(args)...}}] {
        emulation::run(launch, Call::make, &call);
      }));
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) + emulation::static_shared_bytes(kernel) > emulation::kSharedAtMost)
    return emulation::report(cudaErrorInvalidValue);
  const std::lock_guard lock(emulation::host.mutex);
  for (auto& [k, bytes] : emulation::host.shared_limits)
    if (k == kernel) return bytes = static_cast<size_t>(value), cudaSuccess;
  emulation::host.shared_limits.emplace_back(kernel, static_cast<size_t>(value));
  return cudaSuccess;
}
template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  return attributes->sharedSizeBytes = emulation::static_shared_bytes(kernel), cudaSuccess;
}

// -------------------------------------------------------------------------------------------- devices
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = emulation::host.devices, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = emulation::device, cudaSuccess; }
inline bool is_device(int device) { return device >= 0 && device < emulation::host.devices; }
inline cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) return emulation::report(cudaErrorInvalidDevice);
  emulation::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!is_device(device)) return emulation::report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = emulation::kSharedByDefault;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::host.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulation::host.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 * 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulation::kSharedAtMost;
      return cudaSuccess;
  }
  return emulation::report(cudaErrorInvalidValue);
}
inline cudaError_t cudaDeviceSynchronize() {
  return emulation::report(emulation::refuse_while_capturing(false));
}

// --------------------------------------------------------------------------------------------- memory
/// Filled with NaN, and exactly as long as asked for.
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (const cudaError_t e = emulation::refuse_while_capturing(true)) return emulation::report(e);
  if (posix_memalign(p, 256, bytes) != 0) return emulation::report(cudaErrorMemoryAllocation);
  std::memset(*p, 0xFF, bytes);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(p), bytes);
}
inline cudaError_t cudaFree(void* p) {
  if (const cudaError_t e = emulation::refuse_while_capturing(true)) return emulation::report(e);
  if (p) std::memset(p, 0xFF, malloc_usable_size(p));  // later reads see NaN
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream = nullptr) {
  return emulation::report(emulation::submit(stream, [=] { std::memcpy(to, from, bytes); }));
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr) {
  return emulation::report(emulation::submit(stream, [=] { std::memset(to, value, bytes); }));
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind);
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes); }
