// GroupNorm or LayerNorm of a sum x = a + b, as of a residual sum before the norm: one launch for both.
#pragma once

#include "cuda/layers.h"

namespace maml::cuda {

/// The sum, or its tangent, which the launch also writes. a and b: symbolic addresses; element i of the sum
/// is of element i % size of each. A tangent may lack one of them.
template <class T>
struct Summands {
  const T *a = nullptr, *b = nullptr;
  unsigned a_size = 0, b_size = 0;
  T* sum = nullptr;  // null: there is none, x has been computed before
};

/// The forward pass of a group_norm of this sum, or its tangent.
template <class T>
void normalise_sum(const Launcher& launch, const Layer& norm, const Tensors<T>& t, bool tangent,
                   const Summands<T>& summands);

}  // namespace maml::cuda
