// The input gradient of a convolution is often the cotangent g of a normalisation's output, and the
// normalisation (normalise.h) needs the sums G1 = sum f' g and G2 = sum f' g xh, or of the tangents R1 =
// sum f' g_dot and R2 = sum (f' g_dot xh + f' g Rxh), before it can do anything else. Where the two passes
// follow each other, the blocks that write g also add up these products over their tiles, which saves the
// normalisation a pass over g with a launch of its own. This is what the passes of the two layers tell each
// other. The functions f for which it is done have f'' = 0: the identity, ReLU and leaky ReLU.
#pragma once

#include "cuda/layers.h"

namespace maml::cuda {

/// What a convolution must know about the normalisation (symbolic addresses).
template <class T>
struct Normalised {
  const T *x, *x_dot, *g;  // its input; in the tangent pass also its tangent and g. Each may be null
  const T *gamma, *beta, *saved;
  T below;  // f'(u) for u <= 0; f'(u) = 1 above
  bool pooled;
  int pixels;  // of one sample of x
};

/// The sums over all tiles: `count` entries [2, c], `step` entries apart. `after`: free memory behind them.
template <class T>
struct CotangentSums {
  T* entries;
  int count, step;
  T* after;
};

/// Whether the convolution that reads a normalisation's output can add up its cotangent, and it pays.
bool sums_cotangent(const Layer& convolution, const Layer& normalisation);

/// Elements of scratch for the sums of an input gradient.
int64_t cotangent_sums_scratch(const Layer& convolution);

/// The backward pass of a convolution, or its tangent, with the sums; grad_x is wanted, and not added to.
template <class T>
CotangentSums<T> gradients_with_sums(const Launcher&, bool tangent, const Layer&, const Tensors<T>&,
                                     const Normalised<T>&);

/// The backward pass of a normalisation, or its tangent, from these sums.
template <class T>
void batch_norm_from_sums(const Launcher&, bool tangent, const Layer&, const Tensors<T>&,
                          const CotangentSums<T>&);
template <class T>
void norm_block_from_sums(const Launcher&, bool tangent, const Layer&, const Tensors<T>&,
                          const CotangentSums<T>&);

}  // namespace maml::cuda
