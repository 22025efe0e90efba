// What kernels need of their platform. Under nvcc that is the CUDA runtime. Otherwise it is the emulation of
// the tests (tests/cuda/emulation), in which the same kernels are compiled as C++ and every CUDA thread is a
// fiber. The shipped library never contains the emulation.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulation.h"
#endif

namespace maml::cuda {

#ifdef __CUDACC__
inline constexpr bool kSmallTiles = false;

/// Waits until all kernels before this one in the stream have ended and their writes are visible. Only a
/// kernel launched with programmatic dependent launch starts earlier; for any other it does nothing.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel in the stream start once every block has called this, if it was launched so.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// The same address, of which the compiler now knows that it is in global memory (null counts as such).
/// Without it, every access would first find out whether the address is in shared memory. The move hides
/// where the address comes from: the compiler uses the assumption only where it cannot follow the address
/// itself.
template <class T>
__device__ __forceinline__ T* in_global_memory(T* address) {
  asm("mov.b64 %0, %0;" : "+l"(address));
  __builtin_assume(__isGlobal(address));
  return address;
}

/// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
#else
#ifdef MAML_CUDA_SMALL_TILES
inline constexpr bool kSmallTiles = true;  // for tests: even small shapes then have many tiles and blocks
#else
inline constexpr bool kSmallTiles = false;
#endif
inline void wait_for_previous_kernels() { emulation::wait_for_previous_kernels(); }
inline void let_next_kernel_start() {}
template <class T>
T* in_global_memory(T* address) {
  return address;
}
inline unsigned char* dynamic_shared() { return static_cast<unsigned char*>(emulation::dynamic_shared()); }
#endif

}  // namespace maml::cuda
