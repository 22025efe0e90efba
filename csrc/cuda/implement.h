// How a layer's file turns its functions into the four passes. It specialises OnGpu for its kind, with the
// functions that the class of the kind requires (layers/declaration.h), and instantiates Implementation. All
// work is enqueued for all tasks, on symbolic addresses. T is float or double. A cotangent that is not wanted
// is not computed.
#pragma once

#include "cuda/layers.h"

namespace maml::cuda {

/// Whether a product of a bilinear layer belongs to a tangent pass; determines the names of its kernels.
enum class Tangent { no, yes };

/// One term of a sum of products: x w, g w or x g.
template <class T>
struct Factors {
  const T *a, *b;
};

/// The operands of a bilinear layer of two inputs. A product gives one of them from the other two.
enum class Operand { x0, x1, y };

/// What OnGpu<K> must have, by the class of the kind.
///   linear      apply(launch, layer, x, y)
///               adjoint(launch, layer, g, add, grad_x)
///               With several inputs x, add and grad_x are arrays; null means zero, or not wanted.
///   bilinear    apply(launch, tangent, layer, factors, count, tensors): y or y_dot = bias + the sum of x * w
///               over one or two factors {x, w}
///               adjoint(launch, tangent, layer, factors {x, g}, count, factors {g, w}, count, tensors): the
///               gradients of w, of the bias and of x, those that are wanted
///               footprint(layer)
///               Of two inputs in place of an input and parameters, y = B(x0, x1):
///               product(launch, tangent, layer, result, factors, count, add, out, scratch), with one or two
///               factors {x0, x1} of a result y, {y, x1} of x0, {x0, y} of x1, of which y stands for its
///               cotangent
///               footprint(layer)
///   selection   choose(launch, layer, x, y, choice)
///               apply(launch, layer, choice, x, y), with a choice made before
///               adjoint(launch, tangent, layer, choice, g, add, grad_x)
///               choices(layer): how many int32 a choice has
///   others      passes<T>(): all four; footprint(layer)
template <Kind K>
struct OnGpu;

template <Kind K, class T>
LaunchPasses<T> linear_passes() {
  if constexpr (Declaration<K>::most_inputs == 1) {
    return {
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          OnGpu<K>::apply(launch, l, t.x[0], t.y);
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          if (t.grad_x[0]) OnGpu<K>::adjoint(launch, l, t.grad_y, t.add_x[0], t.grad_x[0]);
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          OnGpu<K>::apply(launch, l, t.x_dot[0], t.y_dot);
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          if (t.grad_x_dot[0]) OnGpu<K>::adjoint(launch, l, t.grad_y_dot, t.add_x[0], t.grad_x_dot[0]);
        },
    };
  } else {
    return {
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          OnGpu<K>::apply(launch, l, t.x, t.y);
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          OnGpu<K>::adjoint(launch, l, t.grad_y, t.add_x, t.grad_x);
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          OnGpu<K>::apply(launch, l, t.x_dot, t.y_dot);
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          OnGpu<K>::adjoint(launch, l, t.grad_y_dot, t.add_x, t.grad_x_dot);
        },
    };
  }
}

template <Kind K, class T>
LaunchPasses<T> bilinear_passes() {
  return {
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        const Factors<T> factors{t.x[0], t.w[0]};
        OnGpu<K>::apply(launch, Tangent::no, l, &factors, 1, t);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        const Factors<T> of_w{t.x[0], t.grad_y}, of_x{t.grad_y, t.w[0]};
        OnGpu<K>::adjoint(launch, Tangent::no, l, &of_w, 1, &of_x, 1, t);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        Factors<T> factors[2];
        int count = 0;
        if (t.x_dot[0]) factors[count++] = {t.x_dot[0], t.w[0]};
        if (t.w_dot[0]) factors[count++] = {t.x[0], t.w_dot[0]};
        OnGpu<K>::apply(launch, Tangent::yes, l, factors, count, t);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        const Factors<T> of_w[2] = {{t.x[0], t.grad_y_dot}, {t.x_dot[0], t.grad_y}};
        const Factors<T> of_x[2] = {{t.grad_y_dot, t.w[0]}, {t.grad_y, t.w_dot[0]}};
        OnGpu<K>::adjoint(launch, Tangent::yes, l, of_w, t.x_dot[0] && t.grad_y ? 2 : 1, of_x,
                          t.w_dot[0] && t.grad_y ? 2 : 1, t);
      },
  };
}

template <Kind K, class T>
LaunchPasses<T> two_input_passes() {
  return {
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        const Factors<T> factors{t.x[0], t.x[1]};
        OnGpu<K>::product(launch, Tangent::no, l, Operand::y, &factors, 1, false, t.y, t.scratch);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        const Factors<T> of_x0{t.grad_y, t.x[1]}, of_x1{t.x[0], t.grad_y};
        auto give = [&](Operand to, const Factors<T>& factors, bool add, T* grad_x) {
          if (grad_x) OnGpu<K>::product(launch, Tangent::no, l, to, &factors, 1, add, grad_x, t.scratch);
        };
        give(Operand::x0, of_x0, t.add_x[0], t.grad_x[0]);
        give(Operand::x1, of_x1, t.add_x[1], t.grad_x[1]);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        Factors<T> factors[2];
        int count = 0;
        if (t.x_dot[0]) factors[count++] = {t.x_dot[0], t.x[1]};
        if (t.x_dot[1]) factors[count++] = {t.x[0], t.x_dot[1]};
        OnGpu<K>::product(launch, Tangent::yes, l, Operand::y, factors, count, false, t.y_dot, t.scratch);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        const Factors<T> of_x0[2] = {{t.grad_y_dot, t.x[1]}, {t.grad_y, t.x_dot[1]}};
        const Factors<T> of_x1[2] = {{t.x[0], t.grad_y_dot}, {t.x_dot[0], t.grad_y}};
        auto give = [&](Operand to, const Factors<T>* factors, bool moves, bool add, T* grad_x_dot) {
          if (!grad_x_dot) return;
          OnGpu<K>::product(launch, Tangent::yes, l, to, factors, moves && t.grad_y ? 2 : 1, add, grad_x_dot,
                            t.scratch);
        };
        give(Operand::x0, of_x0, t.x_dot[1] != nullptr, t.add_x[0], t.grad_x_dot[0]);
        give(Operand::x1, of_x1, t.x_dot[0] != nullptr, t.add_x[1], t.grad_x_dot[1]);
      },
  };
}

template <class T>
int32_t* choice_of(const Tensors<T>& t) {
  return reinterpret_cast<int32_t*>(t.saved);  // an int32 is no larger than a T
}

template <Kind K, class T>
LaunchPasses<T> selection_passes() {
  return {
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        OnGpu<K>::choose(launch, l, t.x[0], t.y, choice_of(t));
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        if (!t.grad_x[0]) return;
        OnGpu<K>::adjoint(launch, Tangent::no, l, choice_of(t), t.grad_y, t.add_x[0], t.grad_x[0]);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        OnGpu<K>::apply(launch, l, choice_of(t), t.x_dot[0], t.y_dot);
      },
      [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
        if (!t.grad_x_dot[0]) return;
        OnGpu<K>::adjoint(launch, Tangent::yes, l, choice_of(t), t.grad_y_dot, t.add_x[0], t.grad_x_dot[0]);
      },
  };
}

template <Kind K, class T>
LaunchPasses<T> passes_by_class() {
  if constexpr (Declaration<K>::layer_class == LayerClass::linear) {
    return linear_passes<K, T>();
  } else if constexpr (Declaration<K>::layer_class == LayerClass::bilinear &&
                       Declaration<K>::most_inputs == 2) {
    return two_input_passes<K, T>();
  } else if constexpr (Declaration<K>::layer_class == LayerClass::bilinear) {
    return bilinear_passes<K, T>();
  } else if constexpr (Declaration<K>::layer_class == LayerClass::selection) {
    return selection_passes<K, T>();
  } else {
    return OnGpu<K>::template passes<T>();
  }
}

template <Kind K>
Footprint Implementation<K>::footprint([[maybe_unused]] const Layer& l) {
  constexpr LayerClass layer_class = Declaration<K>::layer_class;
  if constexpr (layer_class == LayerClass::linear || layer_class == LayerClass::pointwise) {
    return {};
  } else if constexpr (layer_class == LayerClass::selection) {
    return {OnGpu<K>::choices(l)};
  } else {
    return OnGpu<K>::footprint(l);
  }
}
template <Kind K>
LaunchPasses<float> Implementation<K>::passes(float) {
  return passes_by_class<K, float>();
}
template <Kind K>
LaunchPasses<double> Implementation<K>::passes(double) {
  return passes_by_class<K, double>();
}

}  // namespace maml::cuda
