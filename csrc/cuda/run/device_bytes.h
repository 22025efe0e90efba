// Device memory that a plan owns: written once, read by the kernels of every call.
#pragma once

#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "cuda/run/on_device.h"

namespace maml::cuda {

/// While an object exists, CUDA calls of this thread are neither part of a capture in progress nor end it.
class OutsideCaptures {
 public:
  OutsideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCaptures(const OutsideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

class DeviceBytes {
 public:
  /// Copies `bytes` and waits for the copy, so that the data are there for every stream and for graphs that
  /// are being captured. The copy has a stream of its own, and nothing else is waited for.
  DeviceBytes(int device, const std::vector<unsigned char>& bytes) {
    const OnDevice on(device);
    const OutsideCaptures outside;
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes.size()), "allocating what a plan keeps on the device");
    memory_.reset(memory);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
    cudaError_t status = cudaMemcpyAsync(memory, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
    check(status, "writing what a plan keeps on the device");
  }

  const void* start() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(void* memory) const {
      const OutsideCaptures outside;
      cudaFree(memory);  // waits for the kernels that read it
    }
  };
  std::unique_ptr<void, Free> memory_;
};

/// Keeps the memory until the process ends: a graph that the user has captured reads it, and may be replayed
/// at any time.
inline void keep_forever(const std::shared_ptr<const DeviceBytes>& bytes) {
  static std::mutex mutex;
  static auto& kept =
      *new std::set<std::shared_ptr<const DeviceBytes>>;  // never freed: CUDA may be shut down before it
  const std::lock_guard lock(mutex);
  kept.insert(bytes);
}

}  // namespace maml::cuda
