// A layer without parameters that is linear in its input: y = A x. Its four passes are A and A^T, on primal
// and tangent.
#pragma once

#include "cuda/layers.h"

namespace maml::cuda {

/// Map::apply(launch, layer, x, y) and Map::transposed(launch, layer, g, add, grad_x).
template <class Map, class T>
LaunchPasses<T> linear_map() {
  return {
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) { Map::apply(launch, l, t.x[0], t.y); },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        if (t.grad_x[0]) Map::transposed(launch, l, t.grad_y, t.add_x[0], t.grad_x[0]);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        Map::apply(launch, l, t.x_dot[0], t.y_dot);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        if (t.grad_x_dot[0]) Map::transposed(launch, l, t.grad_y_dot, t.add_x[0], t.grad_x_dot[0]);
      },
  };
}

}  // namespace maml::cuda
