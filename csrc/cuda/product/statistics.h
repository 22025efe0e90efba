// How many rows of [n h w, c] one entry of Tensors::statistics and statistics_dot stands for (the last entry
// may have fewer). A convolution and the normalisation after it share this number. It is the number of rows
// that one warp of any product tile holds: an entry then needs only warp shuffles and does not depend on the
// tile.
#pragma once

#include "cuda/run/platform.h"

namespace maml::cuda {

inline constexpr int kStatisticsRows = 32;

}  // namespace maml::cuda
