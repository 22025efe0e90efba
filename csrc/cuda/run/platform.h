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
inline unsigned char* dynamic_shared() { return static_cast<unsigned char*>(emulation::dynamic_shared()); }
#endif

}  // namespace maml::cuda
