// Streams, events, capture and graphs of the emulation. Part of host.h.
//
// A stream that waits for an event of a capturing stream joins its capture as a branch. The work launched on
// a branch is recorded separately, and goes into the graph when the origin waits for it: as late as the
// graph's edges allow. So a missing join, or a branch that reads what the origin overwrites, changes the
// results. Events of streams that do not capture do nothing.
#pragma once

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
inline constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDefault = 0, cudaEventDisableTiming = 2;

namespace emulation {

using Graph = std::vector<std::function<void()>>;

struct Stream {
  bool blocking;  // with respect to the legacy stream
  int device;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  Graph captured{};
  // Of an origin: its branches. Of a branch: its origin, and whether the origin waits for all of its work.
  std::vector<Stream*> branches{};
  Stream* origin = nullptr;
  bool joined = true;
};

struct Event {
  Stream* stream = nullptr;  // the stream, if it was capturing when the event was recorded
  size_t work = 0;           // how many pieces of work it had recorded by then
};

/// Relaxed: calls of this thread do not invalidate a capture.
inline thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

/// Invalidates captures in progress, for a call that would wait for them or change them.
inline cudaError_t refuse_while_capturing(bool relaxed_may) {
  bool refused = false;
  const std::lock_guard lock(host.mutex);
  for (Stream* s : host.capturing) {
    if (relaxed_may &&
        (s->mode == cudaStreamCaptureModeRelaxed || thread_mode == cudaStreamCaptureModeRelaxed))
      continue;
    s->status = cudaStreamCaptureStatusInvalidated;
    refused = true;
  }
  return refused ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

/// Does the work, or records it if the stream captures.
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
    stream->joined = false;
    return cudaSuccess;
  }
  work();
  return cudaSuccess;
}

/// Makes the stream a branch of this capture, if it is none yet; what it records from now on belongs to it.
inline cudaError_t fork(Stream* origin, Stream* branch) {
  if (branch->status == cudaStreamCaptureStatusNone) {
    branch->status = cudaStreamCaptureStatusActive;
    branch->mode = origin->mode;
    branch->origin = origin;
    origin->branches.push_back(branch);
  }
  branch->joined = false;
  return cudaSuccess;
}

/// The origin's next work comes after the first `work` pieces that the branch has recorded.
inline cudaError_t join(Stream* branch, size_t work) {
  work = std::min(work, branch->captured.size());
  const auto end = branch->captured.begin() + static_cast<std::ptrdiff_t>(work);
  Graph& graph = branch->origin->captured;
  graph.insert(graph.end(), branch->captured.begin(), end);
  branch->captured.erase(branch->captured.begin(), end);
  branch->joined = branch->captured.empty();
  return cudaSuccess;
}

}  // namespace emulation

using cudaStream_t = emulation::Stream*;
using cudaEvent_t = emulation::Event*;
using cudaGraph_t = emulation::Graph*;
using cudaGraphExec_t = emulation::Graph*;

// -------------------------------------------------------------------------------------------- streams
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = new emulation::Stream{.blocking = flags != cudaStreamNonBlocking, .device = emulation::device};
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  {
    const std::lock_guard lock(emulation::host.mutex);
    std::erase(emulation::host.capturing, stream);
    if (stream->origin) std::erase(stream->origin->branches, stream);
    for (cudaStream_t branch : stream->branches) branch->origin = nullptr;
  }
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream == nullptr || stream->status == cudaStreamCaptureStatusNone)
    return emulation::report(emulation::refuse_while_capturing(true));
  stream->status = cudaStreamCaptureStatusInvalidated;
  return emulation::report(cudaErrorStreamCaptureUnsupported);
}

// --------------------------------------------------------------------------------------------- events
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new emulation::Event, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  *event = {};
  if (stream == nullptr || stream->status == cudaStreamCaptureStatusNone) return cudaSuccess;
  if (stream->status == cudaStreamCaptureStatusInvalidated)
    return emulation::report(cudaErrorStreamCaptureInvalidated);
  *event = {stream, stream->captured.size()};
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
  emulation::Stream* const recorded = event->stream;
  if (recorded == nullptr || recorded == stream) return cudaSuccess;
  if (recorded->status != cudaStreamCaptureStatusActive || stream == nullptr)
    return emulation::report(cudaErrorStreamCaptureInvalidated);
  if (recorded->origin == stream) return emulation::join(recorded, event->work);
  const bool own = stream->status == cudaStreamCaptureStatusNone || stream->origin == recorded;
  if (recorded->origin != nullptr || !own)  // edges between branches, or between captures: not emulated
    return emulation::report(cudaErrorStreamCaptureUnsupported);
  return emulation::fork(recorded, stream);
}

// --------------------------------------------------------------------------------- capture and graphs
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (stream == nullptr) return emulation::report(cudaErrorStreamCaptureUnsupported);
  if (stream->status != cudaStreamCaptureStatusNone) return emulation::report(cudaErrorIllegalState);
  stream->status = cudaStreamCaptureStatusActive;
  stream->mode = mode;
  const std::lock_guard lock(emulation::host.mutex);
  emulation::host.capturing.push_back(stream);
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, emulation::thread_mode), cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream == nullptr ? cudaStreamCaptureStatusNone : stream->status;
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  if (stream == nullptr || stream->status == cudaStreamCaptureStatusNone || stream->origin != nullptr)
    return emulation::report(cudaErrorIllegalState);
  const std::lock_guard lock(emulation::host.mutex);
  std::erase(emulation::host.capturing, stream);
  const cudaStreamCaptureStatus status = std::exchange(stream->status, cudaStreamCaptureStatusNone);
  emulation::Graph captured = std::exchange(stream->captured, {});
  bool joined = true;
  for (cudaStream_t branch : std::exchange(stream->branches, {})) {
    joined = joined && branch->joined;
    branch->status = cudaStreamCaptureStatusNone;
    branch->origin = nullptr;
    branch->captured.clear();
  }
  if (status == cudaStreamCaptureStatusInvalidated)
    return emulation::report(cudaErrorStreamCaptureInvalidated);
  if (!joined) return emulation::report(cudaErrorStreamCaptureUnjoined);
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
