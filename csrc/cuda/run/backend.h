// The interface of the CUDA backend to the bindings. Streams and device memory are void pointers here, so
// that the bindings compile without the CUDA headers.
#pragma once

#include <memory>
#include <utility>

#include "call.h"
#include "plan/problem.h"

namespace maml::cuda {

/// What the planner must know about this backend's layers.
LayerTraits traits();

/// The executor that serves a problem: the megakernel, one block a task with all its state in shared memory
/// (megakernel.h); chunked, a kernel for each pass of an MLP, one block a chunk of samples (chunked.h); or
/// batched, kernels for each pass of a layer over all tasks (batched.h).
enum class Executor { megakernel, chunked, batched };

/// The kernels of a call as a CUDA graph. Each replay reads its spans from the same table in device memory.
class CudaGraph {
 public:
  CudaGraph(void* executable, void* table) : executable_(executable), table_(table) {}
  CudaGraph(CudaGraph&& other) noexcept
      : executable_(std::exchange(other.executable_, nullptr)), table_(other.table_) {}
  ~CudaGraph();
  void* executable() const { return executable_; }
  void* table() const { return table_; }

 private:
  void *executable_, *table_;
};

/// A problem prepared for one device, with the state that its calls share. CUDA errors are thrown as
/// std::runtime_error with the kernel's name.
template <class T>
class Runner {
 public:
  Runner(const Problem& problem, int device);
  Runner(Runner&&) noexcept;
  ~Runner();

  Executor executor() const;

  /// The number of elements of workspace that a call needs.
  int64_t workspace(int64_t tasks, int64_t at_once) const;

  /// Enqueues a call; the stream may be in a capture of the user's. The first call also writes the
  /// description of the plan to the device and waits for that copy; nothing else waits.
  void run(const Call<T>& call, void* stream) const;

  /// Captures a call as a graph that reads its spans from `table`: device memory of table_bytes() bytes that
  /// must outlive the graph. Not for the megakernel, which is a single launch already.
  /// Captures without computing anything.
  int64_t table_bytes(const Call<T>& call) const;
  CudaGraph capture(const Call<T>& call, void* table) const;
  /// Enqueues a call through a captured graph: it has the same tasks and the same tensors, at any addresses.
  void run(const Call<T>& call, const CudaGraph& graph, void* stream) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace maml::cuda
