// Asynchronous copies from global to shared memory (cp.async), and plain functions in their place for the
// emulation.
//
// A thread issues copies and closes them into a group. Later it waits until at most a given number of its
// latest groups is still in flight; a barrier then makes the data of all threads visible to all. The copies
// go through the L1 cache (.ca), because a convolution reads most elements once for each tap.
#pragma once

#include "cuda/run/platform.h"

namespace maml::cuda {

/// Copies `Bytes` (4, 8 or 16; both addresses are aligned to them). Where not `inside`, writes zeros and
/// reads nothing; `from` must be aligned even then.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
#ifdef __CUDACC__
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared), "l"(from), "n"(Bytes),
               "r"(inside ? Bytes : 0)
               : "memory");
#else
  emulation::defer_copy(to, from, Bytes, inside);
#endif
}

/// Closes the copies issued since the last call into a group.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  emulation::commit_copies();
#endif
}

/// Waits until at most `Pending` groups of this thread are in flight.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#else
  emulation::wait_copies(Pending);
#endif
}

}  // namespace maml::cuda
