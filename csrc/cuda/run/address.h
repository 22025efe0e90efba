// Symbolic addresses. The algorithm (meta_gradient.h) passes pointers of one task around but never
// dereferences them. On this backend such a pointer is no address: it holds a region and a byte offset within
// it. A kernel computes the address for its own task. The workspace, where nearly all operands are, has its
// addresses among the kernel's arguments (Memory); a CUDA graph has a workspace of its own. The user's
// tensors are looked up in the call's table. One list of launches, or one CUDA graph, therefore serves every
// call with the same shapes, wherever that call's tensors are.
#pragma once

#include "cuda/run/platform.h"
#include "layers/layer.h"

namespace maml::cuda {

enum class Region : int {
  none,
  shared,  // read by all tasks: packed parameters and rates
  task,    // one task's part of the workspace
  x_support,
  y_support,
  scale_support,
  old_log_probs_support,
  x_query,
  y_query,
  scale_query,
  old_log_probs_query,
  logits,
  support_losses,
  task_losses,
  cotangent,  // the cotangent of the prediction; of a meta-gradient, those of the data
  task_weights,
  query_weights,  // [steps + 1]
  loss,
  gradient,  // the flat gradient, in the user's order of elements
  random,    // no tensor: `start` is the seed of random masks, `stride` the number of the chunk's first task
  count
};

/// Where a tensor starts, and how many bytes lie between the parts of two consecutive tasks (0: all tasks
/// share one part).
struct Span {
  unsigned char* start;
  int64_t stride;
};

/// One call as kernels see it: the spans of its regions, followed by those of the user's parameters, rates
/// and so on (SpanOrder in description.h).
struct Table {
  Span regions[static_cast<int>(Region::count)];
};

/// The counters that a launch has for each task (last_block.h). Each of the two streams of a call, its own
/// and the branch, has so many.
inline constexpr int kCounters = 1024;
inline constexpr int kStreams = 2;

/// A call as a kernel sees it: the addresses of the workspace, and the table of everything else.
struct Memory {
  const Table* table;
  unsigned char* shared;  // Region::shared
  Span task;              // Region::task
  unsigned* counters;     // [tasks, kStreams, kCounters], all zero between launches (last_block.h)

  __host__ __device__ unsigned* counters_of(int64_t task) const {
    return counters + task * kStreams * kCounters;
  }
  __host__ __device__ Span operator[](Region region) const {
    return region == Region::task     ? task
           : region == Region::shared ? Span{shared, 0}
                                      : table->regions[static_cast<int>(region)];
  }
};

/// The memory of a launch, as a kernel's last argument. Programmatic dependent launch (compute
/// capability 9.0) starts a kernel while the one before it in the stream still runs, so that its blocks are
/// already there when their operands are. A kernel may touch memory only after ready(), which waits until all
/// kernels before it have ended, and lets the next one start. Every thread must call it, at its beginning.
class Deferred {
 public:
  Deferred() = default;
  explicit Deferred(const Memory& memory) : memory_(memory) {}
  __device__ __forceinline__ const Memory& ready() const {
    wait_for_previous_kernels();
    let_next_kernel_start();
    return memory_;
  }
  /// For the host: nothing is read through it.
  const Memory& memory() const { return memory_; }

 private:
  Memory memory_{};
};

/// The random numbers of a task, where `stream` tells the pass.
__device__ __forceinline__ Stream of_task(Stream stream, const Memory& memory, int64_t task) {
  const Span random = memory[Region::random];
  stream.seed = reinterpret_cast<uint64_t>(random.start);
  stream.task = static_cast<uint32_t>(random.stride + task);
  return stream;
}

inline constexpr int kRegionShift = 56;

/// The symbolic address of an element. Adding elements to it stays in the region; Region::none gives null.
template <class T>
__host__ __device__ inline T* place(Region region, int64_t element = 0) {
  if (region == Region::none) return nullptr;
  return reinterpret_cast<T*>((static_cast<uint64_t>(region) << kRegionShift) + element * sizeof(T));
}

/// The address of a symbolic address for one task; zero for zero, and where the call lacks the region.
__device__ __forceinline__ uint64_t address_of(uint64_t symbolic, const Memory& memory, int64_t task) {
  if (symbolic == 0) return 0;
  const Span span = memory[static_cast<Region>(symbolic >> kRegionShift)];
  if (!span.start) return 0;
  return reinterpret_cast<uint64_t>(span.start) + static_cast<uint64_t>(task * span.stride) +
         (symbolic & ((uint64_t{1} << kRegionShift) - 1));
}

/// The same of a tensor in global memory, which all are for kernels that work on all tasks.
template <class T>
__device__ __forceinline__ T* resolve(T* symbolic, const Memory& memory, int64_t task) {
  return in_global_memory(
      reinterpret_cast<T*>(address_of(reinterpret_cast<uint64_t>(symbolic), memory, task)));
}

template <class T>
__device__ __forceinline__ Tensors<T> resolve(const Tensors<T>& s, const Memory& memory, int64_t task) {
  Tensors<T> t = s;
  for (int j = 0; j < 2; ++j) {
    t.x[j] = resolve(s.x[j], memory, task);
    t.grad_x[j] = resolve(s.grad_x[j], memory, task);
    t.x_dot[j] = resolve(s.x_dot[j], memory, task);
    t.grad_x_dot[j] = resolve(s.grad_x_dot[j], memory, task);
  }
  for (int j = 0; j < kMostParameters; ++j) {
    t.w[j] = resolve(s.w[j], memory, task);
    t.grad_w[j] = resolve(s.grad_w[j], memory, task);
    t.w_dot[j] = resolve(s.w_dot[j], memory, task);
    t.grad_w_dot[j] = resolve(s.grad_w_dot[j], memory, task);
  }
  t.y = resolve(s.y, memory, task);
  t.grad_y = resolve(s.grad_y, memory, task);
  t.y_dot = resolve(s.y_dot, memory, task);
  t.grad_y_dot = resolve(s.grad_y_dot, memory, task);
  t.saved = resolve(s.saved, memory, task);
  t.saved_dot = resolve(s.saved_dot, memory, task);
  t.scratch = resolve(s.scratch, memory, task);
  return t;
}

template <class T>
__device__ __forceinline__ Target<T> resolve(const Target<T>& s, const Memory& memory, int64_t task) {
  return {resolve(static_cast<const unsigned char*>(s.y), memory, task), resolve(s.scale, memory, task),
          resolve(s.old_log_probs, memory, task)};
}

}  // namespace maml::cuda
