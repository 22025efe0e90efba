// How a layer's file turns its functions into the four passes. It specialises OnCpu for its kind, with the
// functions that the class of the kind requires (layers/declaration.h), and instantiates Implementation. T is
// float or double; the samples are those of `layer.n`. A cotangent that is not wanted is not computed.
#pragma once

#include "cpu/layers.h"
#include "cpu/product/product.h"

namespace maml::MAML_ISA {

/// What OnCpu<K> must have, by the class of the kind.
///   linear      apply(layer, x, y)
///               adjoint(layer, g, add, grad_x)
///               With several inputs x, add and grad_x are arrays; null means zero, or not wanted.
///   bilinear    apply(layer, terms, count, bias, y, scratch): y = bias + the sum of x * w over one or two
///               terms {x, w}
///               adjoint_x of terms {g, w}, adjoint_w of terms {x, g}, adjoint_bias
///               footprint(layer)
///               With two inputs and no weight: product(layer, of, terms, count, add, out, scratch), one of
///               the three products of Product, in one function
///   selection   choose(layer, x, y, choice)
///               apply(layer, choice, x, y), with a choice made before
///               adjoint(layer, choice, g, add, grad_x)
///               choices(layer): how many int32 a choice has
///   others      passes<T>(): all four; footprint(layer)
template <Kind K>
struct OnCpu;

/// The products of a bilinear layer of two inputs, by their results: y from terms {x_0, x_1}, the cotangent
/// of x_0 from terms {g, x_1}, and the cotangent of x_1 from terms {x_0, g}.
enum class Product { cotangent_0, cotangent_1, y };

template <Kind K, class T>
Passes<T> linear_passes() {
  if constexpr (Declaration<K>::most_inputs == 1) {
    return {
        [](const Layer& l, const Tensors<T>& t) { OnCpu<K>::apply(l, t.x[0], t.y); },
        [](const Layer& l, const Tensors<T>& t) {
          if (t.grad_x[0]) OnCpu<K>::adjoint(l, t.grad_y, t.add_x[0], t.grad_x[0]);
        },
        [](const Layer& l, const Tensors<T>& t) { OnCpu<K>::apply(l, t.x_dot[0], t.y_dot); },
        [](const Layer& l, const Tensors<T>& t) {
          if (t.grad_x_dot[0]) OnCpu<K>::adjoint(l, t.grad_y_dot, t.add_x[0], t.grad_x_dot[0]);
        },
    };
  } else {
    return {
        [](const Layer& l, const Tensors<T>& t) { OnCpu<K>::apply(l, t.x, t.y); },
        [](const Layer& l, const Tensors<T>& t) { OnCpu<K>::adjoint(l, t.grad_y, t.add_x, t.grad_x); },
        [](const Layer& l, const Tensors<T>& t) { OnCpu<K>::apply(l, t.x_dot, t.y_dot); },
        [](const Layer& l, const Tensors<T>& t) {
          OnCpu<K>::adjoint(l, t.grad_y_dot, t.add_x, t.grad_x_dot);
        },
    };
  }
}

template <Kind K, class T>
Passes<T> bilinear_passes() {
  return {
      [](const Layer& l, const Tensors<T>& t) {
        const Term<T> term{t.x[0], t.w[0]};
        OnCpu<K>::apply(l, &term, 1, t.w[1], t.y, t.scratch);
      },
      [](const Layer& l, const Tensors<T>& t) {
        if (t.grad_w[0]) {
          const Term<T> term{t.x[0], t.grad_y};
          OnCpu<K>::adjoint_w(l, &term, 1, t.add_w[0], t.grad_w[0], t.scratch);
        }
        if (t.grad_w[1]) OnCpu<K>::adjoint_bias(l, t.grad_y, t.add_w[1], t.grad_w[1]);
        if (t.grad_x[0]) {
          const Term<T> term{t.grad_y, t.w[0]};
          OnCpu<K>::adjoint_x(l, &term, 1, t.add_x[0], t.grad_x[0], t.scratch);
        }
      },
      [](const Layer& l, const Tensors<T>& t) {
        Term<T> terms[2];
        int count = 0;
        if (t.x_dot[0]) terms[count++] = {t.x_dot[0], t.w[0]};
        if (t.w_dot[0]) terms[count++] = {t.x[0], t.w_dot[0]};
        OnCpu<K>::apply(l, terms, count, t.w_dot[1], t.y_dot, t.scratch);
      },
      [](const Layer& l, const Tensors<T>& t) {
        if (t.grad_w_dot[0]) {
          const Term<T> terms[2] = {{t.x[0], t.grad_y_dot}, {t.x_dot[0], t.grad_y}};
          OnCpu<K>::adjoint_w(l, terms, t.x_dot[0] && t.grad_y ? 2 : 1, t.add_w[0], t.grad_w_dot[0],
                              t.scratch);
        }
        if (t.grad_w_dot[1]) OnCpu<K>::adjoint_bias(l, t.grad_y_dot, t.add_w[1], t.grad_w_dot[1]);
        if (t.grad_x_dot[0]) {
          const Term<T> terms[2] = {{t.grad_y_dot, t.w[0]}, {t.grad_y, t.w_dot[0]}};
          OnCpu<K>::adjoint_x(l, terms, t.w_dot[0] && t.grad_y ? 2 : 1, t.add_x[0], t.grad_x_dot[0],
                              t.scratch);
        }
      },
  };
}

template <Kind K, class T>
Passes<T> bilinear_passes_of_inputs() {
  return {
      [](const Layer& l, const Tensors<T>& t) {
        const Term<T> term{t.x[0], t.x[1]};
        OnCpu<K>::product(l, Product::y, &term, 1, false, t.y, t.scratch);
      },
      [](const Layer& l, const Tensors<T>& t) {
        const Term<T> terms[2] = {{t.grad_y, t.x[1]}, {t.x[0], t.grad_y}};
        for (int j = 0; j < 2; ++j) {
          if (!t.grad_x[j]) continue;
          OnCpu<K>::product(l, Product{j}, &terms[j], 1, t.add_x[j], t.grad_x[j], t.scratch);
        }
      },
      [](const Layer& l, const Tensors<T>& t) {
        Term<T> terms[2];
        int count = 0;
        if (t.x_dot[0]) terms[count++] = {t.x_dot[0], t.x[1]};
        if (t.x_dot[1]) terms[count++] = {t.x[0], t.x_dot[1]};
        OnCpu<K>::product(l, Product::y, terms, count, false, t.y_dot, t.scratch);
      },
      [](const Layer& l, const Tensors<T>& t) {
        const Term<T> terms[2][2] = {{{t.grad_y_dot, t.x[1]}, {t.grad_y, t.x_dot[1]}},
                                     {{t.x[0], t.grad_y_dot}, {t.x_dot[0], t.grad_y}}};
        for (int j = 0; j < 2; ++j) {
          if (!t.grad_x_dot[j]) continue;
          const int count = t.grad_y && t.x_dot[1 - j] ? 2 : 1;
          OnCpu<K>::product(l, Product{j}, terms[j], count, t.add_x[j], t.grad_x_dot[j], t.scratch);
        }
      },
  };
}

template <class T>
int32_t* choice_of(const Tensors<T>& t) {
  return reinterpret_cast<int32_t*>(t.saved);  // an int32 is no larger than a T
}

template <Kind K, class T>
Passes<T> selection_passes() {
  return {
      [](const Layer& l, const Tensors<T>& t) { OnCpu<K>::choose(l, t.x[0], t.y, choice_of(t)); },
      [](const Layer& l, const Tensors<T>& t) {
        if (t.grad_x[0]) OnCpu<K>::adjoint(l, choice_of(t), t.grad_y, t.add_x[0], t.grad_x[0]);
      },
      [](const Layer& l, const Tensors<T>& t) { OnCpu<K>::apply(l, choice_of(t), t.x_dot[0], t.y_dot); },
      [](const Layer& l, const Tensors<T>& t) {
        if (t.grad_x_dot[0]) {
          OnCpu<K>::adjoint(l, choice_of(t), t.grad_y_dot, t.add_x[0], t.grad_x_dot[0]);
        }
      },
  };
}

template <Kind K, class T>
Passes<T> passes_by_class() {
  if constexpr (Declaration<K>::layer_class == LayerClass::linear) {
    return linear_passes<K, T>();
  } else if constexpr (Declaration<K>::layer_class == LayerClass::bilinear) {
    if constexpr (Declaration<K>::most_inputs == 1) {
      return bilinear_passes<K, T>();
    } else {
      return bilinear_passes_of_inputs<K, T>();
    }
  } else if constexpr (Declaration<K>::layer_class == LayerClass::selection) {
    return selection_passes<K, T>();
  } else {
    return OnCpu<K>::template passes<T>();
  }
}

template <Kind K>
Footprint Implementation<K>::footprint([[maybe_unused]] const Layer& l) {
  constexpr LayerClass layer_class = Declaration<K>::layer_class;
  if constexpr (layer_class == LayerClass::linear || layer_class == LayerClass::pointwise) {
    return {};
  } else if constexpr (layer_class == LayerClass::selection) {
    return {OnCpu<K>::choices(l)};
  } else {
    return OnCpu<K>::footprint(l);
  }
}
template <Kind K>
Passes<float> Implementation<K>::passes(float) {
  return passes_by_class<K, float>();
}
template <Kind K>
Passes<double> Implementation<K>::passes(double) {
  return passes_by_class<K, double>();
}

}  // namespace maml::MAML_ISA
