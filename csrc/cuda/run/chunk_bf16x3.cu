// The kernels of the chunked executor in bf16x3.
#include "cuda/run/chunk_passes.h"

namespace maml::cuda {

template struct ChunkKernels<MatrixUnit<Bf16x3Words>>;

}  // namespace maml::cuda
