// The host's side of the emulation: launches, memory, streams, capture and graphs, as in the CUDA runtime.
// Work is done when it is asked for, on whatever stream; on a stream that captures it is recorded instead.
#pragma once

#include <cstdlib>
#include <functional>
#include <mutex>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorIllegalState = 401,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
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
    case cudaErrorIllegalState:
      return "the operation cannot be performed in the present state";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing one";
  }
  return "unrecognized error code";
}

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
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
inline constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;

namespace emulation {

inline constexpr size_t kSharedByDefault = 48 * 1024, kSharedAtMost = 227 * 1024;
inline constexpr size_t kParametersAtMost = 4096;  // 32764 from CUDA 12.1 on; the smaller one is always right

using Graph = std::vector<std::function<void()>>;

struct Stream {
  bool blocking;  // towards the legacy stream
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  Graph captured{};
};

// All state of the host's side but the streams' own.
struct Host {
  std::mutex mutex;
  int multiprocessors = 4;
  std::vector<Stream*> capturing;
  std::vector<std::pair<const void*, size_t>> shared_limits;  // of kernels that have asked for more
};
inline Host host;
inline thread_local cudaError_t last_error = cudaSuccess;

inline void set_multiprocessors(int count) { host.multiprocessors = count; }

inline cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

/// Runs kernel(arguments) for all threads of all blocks. Throws what goes wrong in one.
void run(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(const void*), const void* arguments);

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
  size_t limit = kSharedByDefault;
  const std::lock_guard lock(host.mutex);
  for (const auto& [k, bytes] : host.shared_limits)
    if (k == kernel && bytes > limit) limit = bytes;
  return shared_bytes > limit ? cudaErrorInvalidValue : cudaSuccess;
}

/// What would wait for, or change, a capture that goes on: breaks it.
inline cudaError_t refuse_while_capturing(bool relaxed_may) {
  bool refused = false;
  const std::lock_guard lock(host.mutex);
  for (Stream* s : host.capturing) {
    if (relaxed_may && s->mode == cudaStreamCaptureModeRelaxed) continue;
    s->status = cudaStreamCaptureStatusInvalidated;
    refused = true;
  }
  return refused ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

/// Does the work, or records it where the stream captures.
inline cudaError_t submit(Stream* stream, std::function<void()> work) {
  if (stream == nullptr) {
    const std::lock_guard lock(host.mutex);
    for (Stream* s : host.capturing) {
      if (!s->blocking) continue;
      s->status = cudaStreamCaptureStatusInvalidated;
      return cudaErrorStreamCaptureImplicit;
    }
  } else if (stream->status == cudaStreamCaptureStatusInvalidated) {
    return cudaErrorStreamCaptureInvalidated;
  } else if (stream->status == cudaStreamCaptureStatusActive) {
    stream->captured.push_back(std::move(work));
    return cudaSuccess;
  }
  work();
  return cudaSuccess;
}

}  // namespace emulation

using cudaStream_t = emulation::Stream*;
using cudaGraph_t = emulation::Graph*;
using cudaGraphExec_t = emulation::Graph*;

struct cudaLaunchAttribute {};  // none is known
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
  using Call = emulation::Call<std::remove_const_t<Params>...>;
  return emulation::report(
      emulation::submit(config->stream, [=, call = Call{kernel, {std::forward<Args>(args)...}}] {
        emulation::run(grid, block, shared_bytes, Call::make, &call);
      }));
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > emulation::kSharedAtMost)
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

// -------------------------------------------------------------------------------------------- devices
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return emulation::report(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return emulation::report(cudaErrorInvalidDevice);
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
      *value = 9;
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
/// NaN throughout, and exactly as long as asked for.
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

// ----------------------------------------------------------------------------------- streams and graphs
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = new emulation::Stream{.blocking = flags != cudaStreamNonBlocking};
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  {
    const std::lock_guard lock(emulation::host.mutex);
    std::erase(emulation::host.capturing, stream);
  }
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream == nullptr || stream->status == cudaStreamCaptureStatusNone) return cudaSuccess;
  stream->status = cudaStreamCaptureStatusInvalidated;
  return emulation::report(cudaErrorStreamCaptureUnsupported);
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (stream == nullptr) return emulation::report(cudaErrorStreamCaptureUnsupported);
  if (stream->status != cudaStreamCaptureStatusNone) return emulation::report(cudaErrorIllegalState);
  stream->status = cudaStreamCaptureStatusActive;
  stream->mode = mode;
  const std::lock_guard lock(emulation::host.mutex);
  emulation::host.capturing.push_back(stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream == nullptr ? cudaStreamCaptureStatusNone : stream->status;
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  if (stream == nullptr || stream->status == cudaStreamCaptureStatusNone)
    return emulation::report(cudaErrorIllegalState);
  const std::lock_guard lock(emulation::host.mutex);
  std::erase(emulation::host.capturing, stream);
  const cudaStreamCaptureStatus status = std::exchange(stream->status, cudaStreamCaptureStatusNone);
  emulation::Graph captured = std::exchange(stream->captured, {});
  if (status == cudaStreamCaptureStatusInvalidated)
    return emulation::report(cudaErrorStreamCaptureInvalidated);
  *graph = new emulation::Graph(std::move(captured));
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                        unsigned long long = 0) {
  *executable = new emulation::Graph(*graph);
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return emulation::report(emulation::submit(stream, [graph = *executable] {
    for (const auto& work : graph) work();
  }));
}
inline cudaError_t cudaGraphGetNodes(cudaGraph_t graph, void*, size_t* count) {
  return *count = graph->size(), cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return delete executable, cudaSuccess; }
