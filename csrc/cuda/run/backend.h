// The CUDA backend as the bindings see it. Streams and device memory are plain addresses here, so that nobody
// else needs the CUDA headers.
#pragma once

#include <memory>
#include <utility>

#include "call.h"
#include "plan/plan.h"

namespace maml::cuda {

/// What the planner must know of this backend's layers.
LayerTraits traits();

/// Which of the two executors serves a problem: one block a task with everything in shared memory
/// (megakernel.h), or kernels over all tasks (batched.h).
enum class Executor { megakernel, batched };

/// The kernels of a call as a CUDA graph, which reads the spans of each run at one address.
class Graph {
 public:
  Graph(void* executable, void* table) : executable_(executable), table_(table) {}
  Graph(Graph&& other) noexcept
      : executable_(std::exchange(other.executable_, nullptr)), table_(other.table_) {}
  ~Graph();
  void* executable() const { return executable_; }
  void* table() const { return table_; }

 private:
  void *executable_, *table_;
};

/// A problem made ready for one device, with what its calls share. Errors of CUDA are std::runtime_errors
/// that name the kernel.
template <class T>
class Runner {
 public:
  Runner(const Problem& problem, int device);
  Runner(Runner&&) noexcept;
  ~Runner();

  Executor executor() const;

  /// Elements of workspace that a call needs.
  int64_t workspace(int64_t tasks, int64_t at_once) const;

  /// Enqueues a call, in a capture of the user's too. The first one also writes to the device what kernels
  /// must know of the plan, and waits for that alone.
  void run(const Call<T>& call, void* stream) const;

  /// A call like this one as a graph over `table`, device memory of table_bytes that stands as long as the
  /// graph does. Only for Executor::batched: the other one is a single launch already. Nothing is computed.
  int64_t table_bytes(const Call<T>& call) const;
  Graph capture(const Call<T>& call, void* table) const;
  /// Enqueues a call like the captured one: the same tasks, the same tensors present, other addresses.
  void run(const Call<T>& call, const Graph& graph, void* stream) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace maml::cuda
