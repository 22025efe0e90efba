// A layer without parameters that is linear in its inputs: y = A x. Its four passes are A and A^T, on primal
// and tangent.
#pragma once

#include "cpu/layers.h"

namespace maml::MAML_ISA {

/// Map::apply(layer, x, y) and Map::transposed(layer, g, add, grad_x).
template <class Map, class T>
Passes<T> linear_map() {
  return {
      [](const Layer& l, const Tensors<T>& t) { Map::apply(l, t.x[0], t.y); },
      [](const Layer& l, const Tensors<T>& t) {
        if (t.grad_x[0]) Map::transposed(l, t.grad_y, t.add_x[0], t.grad_x[0]);
      },
      [](const Layer& l, const Tensors<T>& t) { Map::apply(l, t.x_dot[0], t.y_dot); },
      [](const Layer& l, const Tensors<T>& t) {
        if (t.grad_x_dot[0]) Map::transposed(l, t.grad_y_dot, t.add_x[0], t.grad_x_dot[0]);
      },
  };
}

}  // namespace maml::MAML_ISA
