// Helpers of the layers that work element by element.
#pragma once

#include "cuda/run/launch.h"

namespace maml::cuda {

/// The number of elements of the layer's input, for one task.
__device__ __forceinline__ int64_t input_elements(const Layer& l) { return l.n * l.in.c * l.in.h * l.in.w; }

template <class T>
__device__ __forceinline__ void put(T* to, int64_t i, T value, bool add) {
  to[i] = add ? to[i] + value : value;
}

inline constexpr int kElementThreads = kSmallTiles ? 32 : 256;

/// Blocks of kElementThreads threads, with four elements a thread: enough loads in flight to hide their
/// latency.
inline Grid element_grid(int64_t elements) { return {blocks_for(elements, 4 * kElementThreads)}; }

}  // namespace maml::cuda
