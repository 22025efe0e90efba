// The moments of a constant image under the windows of the first convolution. The output of a convolution is
// z = w p, with p the patch under its window, and BatchNorm's statistics of z are those of p seen through w:
// with pbar = mean p and G = mean (p - pbar)(p - pbar)^T over all patches of a task,
//
//   mean z = w pbar,    var z = w G w^T,    cov(z, z_dot) = w G w_dot^T.
//
// Where the input is constant so are pbar and G: they are computed once a task, and neither z nor its
// cotangent is ever stored or summed over. Sums are of doubles: a filter of mean zero on a flat image takes
// the difference of all but equal terms.
#pragma once

#include "layers/functions.h"
#include "layers/layer.h"

namespace maml {

/// Elements of a patch up to which G is smaller than what it saves: 5 x 5 x 1, 3 x 3 x 3.
constexpr int64_t kMostPatch = 27;

MAML_HOST_DEVICE inline int64_t patch_size(const Window& window, const Image& image) {
  return window.kernel_h * window.kernel_w * image.c;
}

/// Elements of T (whatever T) that the moments take: pbar [patch] and G [patch, patch], in double.
inline int64_t patch_gram_size(int64_t patch) { return 2 * (patch + patch * patch); }

}  // namespace maml
