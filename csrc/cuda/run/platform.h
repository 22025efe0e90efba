// What a kernel needs from its platform. Under nvcc that is the CUDA runtime. Elsewhere it is the emulation
// that the tests bring (tests/cuda/emulation): the same kernels compiled as C++, one fiber for each CUDA
// thread. The shipped library never contains it.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda/emulation.h"
#endif

namespace maml::cuda {

#ifdef __CUDACC__
inline constexpr bool kSmallTiles = false;

/// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
#else
#ifdef MAML_CUDA_SMALL_TILES
inline constexpr bool kSmallTiles = true;  // for tests: small shapes have many tiles and blocks then
#else
inline constexpr bool kSmallTiles = false;
#endif
inline unsigned char* dynamic_shared() { return static_cast<unsigned char*>(emulation::dynamic_shared()); }
#endif

}  // namespace maml::cuda
