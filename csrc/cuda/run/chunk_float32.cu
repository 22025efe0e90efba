// The kernels of the chunked executor in float32.
#include "cuda/run/chunk_passes.h"

namespace maml::cuda {

template struct ChunkKernels<SimtUnit<float>>;

}  // namespace maml::cuda
