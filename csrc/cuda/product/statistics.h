// What a convolution and the normalisation behind it agree on: how many rows of [n h w, c] one entry of
// Tensors::statistics and statistics_dot stands for (the last may have fewer). As many as one warp of any
// product tile holds, so that entries are made of shuffles alone and do not depend on the tile.
#pragma once

#include "cuda/run/platform.h"

namespace maml::cuda {

inline constexpr int kStatisticsRows = 32;

}  // namespace maml::cuda
