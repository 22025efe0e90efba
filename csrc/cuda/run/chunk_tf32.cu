// The kernels of the chunked executor in tf32.
#include "cuda/run/chunk_passes.h"

namespace maml::cuda {

template struct ChunkKernels<MatrixUnit<Tf32Words>>;

}  // namespace maml::cuda
