// The moments of the patches that a convolution reads of a constant image. Its output is z = w p, with p the
// patch under a window, so the statistics of z that BatchNorm needs follow from those of p: with pbar = mean
// p and G = mean (p - pbar)(p - pbar)^T over all patches of a task,
//
//   mean z = w pbar,    var z = w G w^T,    cov(z, z_dot) = w G w_dot^T.
//
// If the input is constant, so are pbar and G: they are computed once a task, and no pass sums over z or its
// cotangent. Sums are in double, because a filter of mean zero on a flat image subtracts nearly equal terms.
#pragma once

#include "layers/functions.h"
#include "layers/layer.h"

namespace maml {

/// The most elements of a patch for which computing G pays: 5 x 5 x 1, 3 x 3 x 3.
constexpr int64_t kMostPatch = 27;

/// The most filters of a stem on CUDA: it has a counter for every 32 of them (cuda/run/last_block.h).
constexpr int64_t kMostStemFilters = 1 << 14;

MAML_HOST_DEVICE inline int64_t patch_size(const Window& window, const Image& image) {
  return window.kernel_h * window.kernel_w * image.c;
}

/// The number of elements of T (either T) of the moments: pbar [patch] and G [patch, patch], in double.
inline int64_t patch_gram_size(int64_t patch) { return 2 * (patch + patch * patch); }

}  // namespace maml
