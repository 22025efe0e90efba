// What the capture of a call as a CUDA graph needs.
#pragma once

#include "cuda/run/launch.h"

namespace maml::cuda {

/// Two streams and two events for a capture.
class Capture {
 public:
  Capture() {
    try {
      for (cudaStream_t* s : {&stream, &branch.stream})
        check(cudaStreamCreateWithFlags(s, cudaStreamNonBlocking), "creating a stream");
      for (cudaEvent_t* e : {&branch.forked, &branch.done})
        check(cudaEventCreateWithFlags(e, cudaEventDisableTiming), "creating an event");
    } catch (...) {
      release();
      throw;
    }
  }
  ~Capture() { release(); }
  Capture(const Capture&) = delete;

  cudaStream_t stream = nullptr;
  Branch branch;

 private:
  void release() {
    for (cudaEvent_t e : {branch.forked, branch.done}) {
      if (e) cudaEventDestroy(e);
    }
    for (cudaStream_t s : {branch.stream, stream}) {
      if (s) cudaStreamDestroy(s);
    }
  }
};

}  // namespace maml::cuda
