// The executor for MLPs with more samples than the megakernel takes: one kernel computes a whole pass of a
// set (all layers, the loss, the gradient) in one block for each task and chunk of samples (chunk.h).
// Values between layers never leave a multiprocessor.
//
// It serves chains of linear layers, each with at most one pointwise function after it, the last one without,
// and the parameter that a policy appends to its output. Everything else stays with the batched executor.
#pragma once

#include <optional>

#include "cuda/run/batched.h"
#include "cuda/run/chain.h"
#include "meta_gradient.h"

namespace maml::cuda {

/// The chain of a problem that this executor serves on the device.
template <class T>
std::optional<Chain> chain_of(const Problem& problem, int device);

/// The problem without the memory that other executors keep values in, and with that for partial sums.
Problem without_values(Problem problem);

template <class T>
void launch_chunks(const Launcher& launch, Pass pass, const Chain& chain, const LossPart& part,
                   const ChunkTensors<T>& tensors);

/// A backend of TaskRunner that computes whole passes; the vector operations between them are recorded and
/// launched as those of the batched executor. After the last pass, finish() launches what is left.
template <class T>
class Chunked : public Recorder<T> {
 public:
  Chunked(const Launcher& launch, const Problem& problem, const DevicePlan& plan, const T* rates,
          const Chain& chain)
      : Recorder<T>(problem, false), launch_(launch), vectors_(problem, plan, rates), chain_(chain) {}

  using PassWalk = Walk<Chunked, T>;

  template <class F>
  bool beside(F) const {
    return false;
  }

  void finish() const {
    for (; launched_ < this->program().size(); ++launched_) vectors_(launch_, this->program()[launched_]);
  }

  void gradient(const PassWalk& walk, const LossPart& part, const Target<T>& target,
                const PassOutputs<T>& out) const {
    ChunkTensors<T> t = tensors(walk, target);
    t.cotangent = out.cotangent, t.value = out.value, t.logits = out.prediction;
    t.gradient = out.gradient, t.limit = out.limit;
    finish();
    launch_chunks(launch_, Pass::gradient, chain_, part, t);
  }
  void product(const PassWalk& walk, const LossPart& part, const Target<T>& target, const T* direction,
               T* product) const {
    along(Pass::product, walk, part, target, direction, product);
  }
  void metric_gradient(const PassWalk& walk, const LossPart& part, const Target<T>& target,
                       const T* direction, T* result) const {
    along(Pass::metric, walk, part, target, direction, result);
  }

 private:
  void along(Pass pass, const PassWalk& walk, const LossPart& part, const Target<T>& target,
             const T* direction, T* result) const {
    ChunkTensors<T> t = tensors(walk, target);
    t.direction = direction, t.gradient = result, t.limit = walk.packing.trainable;
    finish();
    launch_chunks(launch_, pass, chain_, part, t);
  }
  ChunkTensors<T> tensors(const PassWalk& walk, const Target<T>& target) const {
    ChunkTensors<T> t{};
    t.x = walk.x, t.theta = walk.theta, t.phi = walk.phi, t.target = target, t.parts = walk.scratch;
    return t;
  }

  const Launcher& launch_;
  const Batched<T> vectors_;
  const Chain& chain_;
  mutable size_t launched_ = 0;
};

}  // namespace maml::cuda
