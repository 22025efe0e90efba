// The shapes of a convolution followed by BatchNorm, fused in one layer: conv_block and stem.
#pragma once

#include "layers/infer.h"

namespace maml {

/// The output before a max-pool; Shape::between is the convolution's.
inline Shape normalised_convolution(const Node& node, const Shape& x, int64_t n) {
  Shape y = output_like_input(node, x);
  const int64_t channels = y.image.c;
  y.image = slide(node.name, node.layer.window, node.pad_end, x);
  y.image.c = channels;
  y.between = y.image;
  check_batch_statistics(node.norm_name, {x.layout, y.between}, n);
  return y;
}

/// Applies the max-pool to the shape if the layer ends in one: disjoint windows of 2 x 2 pixels.
inline void pool_pairs_of(const Node& node, Shape& y) {
  if (!node.layer.pooled) return;
  const Image pooled = slide(node.pool_name, {2, 2, 2, 2, 0, 0}, {}, {y.layout, y.between});
  y.image.h = pooled.h, y.image.w = pooled.w;
}

}  // namespace maml
