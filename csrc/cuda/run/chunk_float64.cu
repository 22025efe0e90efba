// The kernels of the chunked executor in float64.
#include "cuda/run/chunk_passes.h"

namespace maml::cuda {

template struct ChunkKernels<SimtUnit<double>>;

}  // namespace maml::cuda
