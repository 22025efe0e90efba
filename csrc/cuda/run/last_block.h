// Work of the last block. The blocks of one launch that each write a part of a sum can let the one that
// arrives last add up the parts, instead of a second kernel: it reads them in a fixed order, so that the bits
// of the sum do not depend on which block is last.
//
// Counters: a task has kCounters of them in the workspace (Memory::counters), zero at the start of a call. A
// counter is zero again after its last block, so that the next launch can use it. Launches that run side by
// side, on two branches of a graph, have counters of their own (Launcher::fork).
#pragma once

#include "cuda/run/address.h"

namespace maml::cuda {

/// True in all threads of exactly one of `count` blocks: the last one whose threads have all called this. It
/// sees what the others wrote before. A barrier of the block.
__device__ __forceinline__ bool last_to_arrive(unsigned* counter, unsigned count) {
  __syncthreads();  // all writes of this block come before thread 0's fence
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter, count - 1) == count - 1;  // wraps to zero
    __threadfence();
  }
  return __syncthreads_or(last);
}

}  // namespace maml::cuda
