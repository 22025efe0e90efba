// The kernels of the chunked executor in bfloat16.
#include "cuda/run/chunk_passes.h"

namespace maml::cuda {

template struct ChunkKernels<MatrixUnit<Bf16Words>>;

}  // namespace maml::cuda
