// Copies from global to shared memory that run beside the arithmetic (cp.async), with their plain twins.
//
// A thread issues copies, closes them into a group, and later waits until at most so many of its latest
// groups are under way; a barrier then makes the data of all threads visible. They go through the first-level
// cache: a convolution reads most elements once for each tap.
#pragma once

#include "cuda/run/platform.h"

namespace maml::cuda {

/// Copies `Bytes` (4, 8 or 16, both sides aligned to them), or fills with zeros where not `inside`: then
/// nothing is read, but `from` must be aligned all the same.
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

/// Closes the group of the copies issued since the last one.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  emulation::commit_copies();
#endif
}

/// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#else
  emulation::wait_copies(Pending);
#endif
}

}  // namespace maml::cuda
