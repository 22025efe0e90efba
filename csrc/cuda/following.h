// A convolution whose last blocks also compute the normalisation of its output (normalise_columns.h), in the
// forward pass or its tangent.
#pragma once

#include "cuda/layers.h"

namespace maml::cuda {

template <class T>
struct Following {
  Layer layer;
  Tensors<T> tensors;
  bool tangent;
};

/// Whether a convolution can compute the normalisation of its output too, and it pays.
bool normalises_at_once(const Layer& convolution);

/// The pass of a convolution and of the normalisation.
template <class T>
void convolve_and_normalise(const Launcher&, const Layer& convolution, const Tensors<T>&,
                            const Following<T>&);

}  // namespace maml::cuda
