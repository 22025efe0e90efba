// The kernels of the chunked executor: chunk.h for all tasks. Each arithmetic has a file of its own
// (chunk_<arithmetic>.cu), so that they compile side by side.
#pragma once

#include "cuda/run/chunk.h"
#include "cuda/run/chunked.h"

namespace maml::cuda {

/// The three passes in one arithmetic.
template <class Unit>
struct __attribute__((visibility("hidden"))) ChunkKernels {
  using T = typename Unit::T;
  static void launch(const Launcher& launch, Pass pass, const Chain& chain, const LossPart& part,
                     const ChunkTensors<T>& tensors);
  /// The bytes of shared memory that a block takes.
  static size_t shared_bytes(Pass pass, const Chain& chain);
};

/// f.template operator()<Unit>() for the arithmetic of the chain.
template <class T, class F>
auto with_unit(const Chain& chain, F f) {
  if constexpr (sizeof(T) == sizeof(float)) {
    switch (chain.precision) {
      case Precision::bf16x3:
        return f.template operator()<MatrixUnit<Bf16x3Words>>();
      case Precision::tf32:
        return f.template operator()<MatrixUnit<Tf32Words>>();
      case Precision::bfloat16:
        return f.template operator()<MatrixUnit<Bf16Words>>();
      case Precision::float32:
        break;
    }
  }
  return f.template operator()<SimtUnit<T>>();
}

}  // namespace maml::cuda
