// The arithmetic of the inner optimizers (plan/update.h): for one element of a parameter, a step of each
// rule and its adjoint. The rules are those of torch.optim. With G = g + weight_decay phi and t = 1, 2, ...
//
//
//   sgd      b = momentum b + (1 - dampening) G, in the first step b = G if no initial b is given
//            phi -= rate b, or with Nesterov rate (G + momentum b)
//   adam     m = beta1 m + (1 - beta1) G,  v = beta2 v + (1 - beta2) G^2
//            phi -= rate / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)       (Kingma, Ba 2015)
//   adamw    the same with G = g, after phi *= 1 - rate weight_decay             (Loshchilov, Hutter 2019)
//   adamax   m as above,  u = max(beta2 u, |G| + eps),  phi -= rate / (1 - beta1^t)  m / u
//   rmsprop  v = alpha v + (1 - alpha) G^2, centered also a = alpha a + (1 - alpha) G
//            b = momentum b + G / (sqrt(v - a^2) + eps),  phi -= rate b
//   adagrad  s = s + G^2,  phi -= rate / (1 + (t - 1) lr_decay)  G / (sqrt(s) + eps)
//                                                                         (Duchi, Hazan, Singer 2011)
//
// The derivative of sqrt at 0 is taken as 0. A second moment is 0 where all gradients so far are 0; as a
// function of G, the step then has the derivative that this gives. |G| has the derivative 0 at 0, and max
// half of each argument's at a tie, as in torch.
#pragma once

#include <type_traits>

#include "layers/functions.h"
#include "plan/update.h"

namespace maml {

// Internal linkage: each instruction set of the CPU backend compiles its own copy.
namespace {

/// x^n.
MAML_HOST_DEVICE inline double to_the(double x, int64_t n) {
  double y = 1;
  for (; n > 0; n /= 2, x *= x) {
    if (n % 2) y *= x;
  }
  return y;
}

/// By what a transform of the gradient multiplies an element whose number is x.
template <class T>
MAML_HOST_DEVICE constexpr T through(Through how, T x) {
  if (how == Through::identity) return x;
  if (how == Through::mask) return x >= T(0) ? T(1) : T(0);
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : x;  // x: zero, or NaN
}

/// The factor of clipping by norm, and of its derivative: of f(g) = c(|g|) g, the adjoint at g takes gamma to
/// factor gamma - slope (g gamma) g. A norm of NaN gives a factor of NaN.
struct ClipFactor {
  double factor, slope;
};
MAML_HOST_DEVICE inline ClipFactor clip_factor(double largest, double norm) {
  const double bound = largest / (norm + 1e-6);
  if (bound >= 1) return {1, 0};
  return {bound, norm > 0 ? bound / (norm + 1e-6) / norm : 0};
}

/// Clipping by value, and x where its derivative is 1, otherwise 0; at the bounds it is 1, as in torch.
template <class V>
MAML_HOST_DEVICE inline V clamped(V g, V most) {
  const V below = g > most ? most : g;
  return below < -most ? -most : below;
}
template <class V>
MAML_HOST_DEVICE inline V where_inside(V g, V most, V x) {
  const V below = g <= most ? x : V{};
  return g >= -most ? below : V{};
}

/// The numbers that a step reads. They are computed in double: in float32, 1 - 0.999^t has an error of 6e-5.
template <class T>
struct Coefficients {
  T rate, weight_decay, momentum, beta1, beta2, eps;
  T undamped;        // 1 - dampening
  T rest1, rest2;    // 1 - beta
  T scale1, scale2;  // 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
  T slope1, slope2;  // the derivatives of their logarithms by beta
  T scale, delay;    // 1 / (1 + (t - 1) lr_decay), t - 1
  bool first;        // step = 0

  template <Rule R>
  MAML_HOST_DEVICE static Coefficients of(const double* h, int64_t step, int taken) {
    const int64_t t = step + 1 + taken;
    Coefficients c{};
    c.rate = static_cast<T>(h[kRate]), c.weight_decay = static_cast<T>(h[kWeightDecay]);
    c.momentum = static_cast<T>(h[kMomentum]), c.undamped = static_cast<T>(1 - h[kDampening]);
    c.beta1 = static_cast<T>(h[kBeta1]), c.rest1 = static_cast<T>(1 - h[kBeta1]);
    c.beta2 = static_cast<T>(h[kBeta2]), c.rest2 = static_cast<T>(1 - h[kBeta2]);
    c.eps = static_cast<T>(h[kEps]);
    c.first = step == 0;
    const double n = static_cast<double>(t);
    if constexpr (R == Rule::adam || R == Rule::adamw || R == Rule::adamax) {
      const double before = to_the(h[kBeta1], t - 1), scale = 1 / (1 - before * h[kBeta1]);
      c.scale1 = static_cast<T>(scale), c.slope1 = static_cast<T>(n * before * scale);
    }
    if constexpr (R == Rule::adam || R == Rule::adamw) {
      const double before = to_the(h[kBeta2], t - 1), scale = 1 / (1 - before * h[kBeta2]);
      c.scale2 = static_cast<T>(sqrt(scale)), c.slope2 = static_cast<T>(n * before * scale / 2);
    }
    if constexpr (R == Rule::adagrad) {
      c.scale = static_cast<T>(1 / (1 + (n - 1) * h[kLrDecay])), c.delay = static_cast<T>(n - 1);
    }
    return c;
  }
};

/// The square root of a number, or of each lane of a vector; compilers make one instruction of the loop.
template <class V>
MAML_HOST_DEVICE inline V square_root(V x) {
  if constexpr (std::is_floating_point_v<V>) {
    return sqrt(x);
  } else {
    for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = sqrt(x[i]);
    return x;
  }
}

/// An element before a step: its value, its gradient, its states. V is a number T or a vector of elements.
template <class V>
struct Element {
  V phi, g, state[kMostStates];
};

/// The cotangents of an element and of the hyperparameters. adjoint() turns those of phi and the states after
/// a step into those before it, and writes the others.
template <class V>
struct ElementAdjoint {
  V phi, g, state[kMostStates], hyper[kHyperparameters];
};

/// d sqrt(x) / dx, from the root.
template <class T, class V>
MAML_HOST_DEVICE inline V root_slope(V root) {
  return root > T(0) ? T(0.5) / root : V{};
}

/// step() changes phi and the states. adjoint() is the transpose of its derivative, at the element before it.
template <Rule R>
struct Optimizer;

/// G = g + weight_decay phi, and its adjoint.
template <class T, class V>
MAML_HOST_DEVICE inline V decayed(const Coefficients<T>& c, const Element<V>& e) {
  return e.g + c.weight_decay * e.phi;
}
template <class T, class V>
MAML_HOST_DEVICE inline void decayed_adjoint(const Coefficients<T>& c, const Element<V>& e, V grad,
                                             ElementAdjoint<V>& d) {
  d.g = grad;
  d.phi += c.weight_decay * grad;
  d.hyper[kWeightDecay] = e.phi * grad;
}

template <>
struct Optimizer<Rule::sgd> {
  template <class T, class V>
  MAML_HOST_DEVICE static V buffer(const RuleForm& f, const Coefficients<T>& c, V g, V before) {
    return c.first && !f.has_start ? g : c.momentum * before + c.undamped * g;
  }
  template <class T, class V>
  MAML_HOST_DEVICE static void step(const RuleForm& f, const Coefficients<T>& c, Element<V>& e) {
    V direction = decayed(c, e);
    if (f.has_buffer) {
      const V g = direction;
      e.state[0] = buffer(f, c, g, e.state[0]);
      direction = f.nesterov ? g + c.momentum * e.state[0] : e.state[0];
    }
    e.phi -= c.rate * direction;
  }
  template <class T, class V>
  MAML_HOST_DEVICE static void adjoint(const RuleForm& f, const Coefficients<T>& c, const Element<V>& e,
                                       ElementAdjoint<V>& d) {
    const V g = decayed(c, e), grad_direction = -c.rate * d.phi;
    V direction = g, grad = grad_direction;
    if (f.has_buffer) {
      const V b = buffer(f, c, g, e.state[0]);
      direction = f.nesterov ? g + c.momentum * b : b;
      const V grad_b = d.state[0] + (f.nesterov ? c.momentum * grad_direction : grad_direction);
      const bool copies = c.first && !f.has_start;
      d.hyper[kMomentum] = (f.nesterov ? b * grad_direction : V{}) + (copies ? V{} : e.state[0] * grad_b);
      d.hyper[kDampening] = copies ? V{} : -g * grad_b;
      d.state[0] = copies ? V{} : c.momentum * grad_b;
      grad = (f.nesterov ? grad_direction : V{}) + (copies ? grad_b : c.undamped * grad_b);
    }
    d.hyper[kRate] = -direction * d.phi;
    decayed_adjoint(c, e, grad, d);
  }
};

/// Adam, and AdamW with its own weight decay.
template <bool Decoupled>
struct AdamRule {
  template <class T, class V>
  MAML_HOST_DEVICE static V gradient(const Coefficients<T>& c, const Element<V>& e) {
    if constexpr (Decoupled) return e.g;
    return decayed(c, e);
  }
  template <class T, class V>
  MAML_HOST_DEVICE static void step(const RuleForm&, const Coefficients<T>& c, Element<V>& e) {
    const V g = gradient(c, e);
    if constexpr (Decoupled) e.phi *= T(1) - c.rate * c.weight_decay;
    e.state[0] = c.beta1 * e.state[0] + c.rest1 * g;
    e.state[1] = c.beta2 * e.state[1] + c.rest2 * (g * g);
    const V divisor = square_root(e.state[1]) * c.scale2 + c.eps;
    e.phi -= c.rate * c.scale1 * (e.state[0] / divisor);
  }
  template <class T, class V>
  MAML_HOST_DEVICE static void adjoint(const RuleForm&, const Coefficients<T>& c, const Element<V>& e,
                                       ElementAdjoint<V>& d) {
    const V g = gradient(c, e);
    const V m = c.beta1 * e.state[0] + c.rest1 * g, v = c.beta2 * e.state[1] + c.rest2 * (g * g);
    const V root = square_root(v), inverse = T(1) / (root * c.scale2 + c.eps), ratio = m * inverse;
    const T rate = c.rate * c.scale1;
    const V grad_rate = -ratio * d.phi, grad_m = d.state[0] - rate * d.phi * inverse;
    const V grad_divisor = rate * d.phi * ratio * inverse;
    const V grad_v = d.state[1] + c.scale2 * grad_divisor * root_slope<T>(root);
    d.hyper[kRate] = grad_rate * c.scale1;
    d.hyper[kEps] = grad_divisor;
    d.hyper[kBeta1] = (e.state[0] - g) * grad_m + grad_rate * rate * c.slope1;
    d.hyper[kBeta2] = (e.state[1] - g * g) * grad_v + grad_divisor * root * (c.scale2 * c.slope2);
    d.state[0] = c.beta1 * grad_m;
    d.state[1] = c.beta2 * grad_v;
    const V grad = c.rest1 * grad_m + T(2) * c.rest2 * g * grad_v;
    if constexpr (Decoupled) {
      d.hyper[kRate] -= c.weight_decay * e.phi * d.phi;
      d.hyper[kWeightDecay] = -c.rate * e.phi * d.phi;
      d.phi *= T(1) - c.rate * c.weight_decay;
      d.g = grad;
    } else {
      decayed_adjoint(c, e, grad, d);
    }
  }
};
template <>
struct Optimizer<Rule::adam> : AdamRule<false> {};
template <>
struct Optimizer<Rule::adamw> : AdamRule<true> {};

template <>
struct Optimizer<Rule::adamax> {
  template <class V>
  MAML_HOST_DEVICE static V magnitude(V g) {
    return g < V{} ? -g : g;
  }
  template <class V>
  MAML_HOST_DEVICE static V larger(V a, V b) {
    return a > b ? a : b;
  }
  template <class T, class V>
  MAML_HOST_DEVICE static void step(const RuleForm&, const Coefficients<T>& c, Element<V>& e) {
    const V g = decayed(c, e);
    e.state[0] = c.beta1 * e.state[0] + c.rest1 * g;
    e.state[1] = larger<V>(c.beta2 * e.state[1], magnitude(g) + c.eps);
    e.phi -= c.rate * c.scale1 * (e.state[0] / e.state[1]);
  }
  template <class T, class V>
  MAML_HOST_DEVICE static void adjoint(const RuleForm&, const Coefficients<T>& c, const Element<V>& e,
                                       ElementAdjoint<V>& d) {
    const V g = decayed(c, e), m = c.beta1 * e.state[0] + c.rest1 * g;
    const V old = c.beta2 * e.state[1], own = magnitude(g) + c.eps, inverse = T(1) / larger(old, own);
    const V ratio = m * inverse;
    const T rate = c.rate * c.scale1;
    const V grad_rate = -ratio * d.phi, grad_m = d.state[0] - rate * d.phi * inverse;
    const V grad_u = d.state[1] + rate * d.phi * ratio * inverse;
    const V half = T(0.5) * grad_u, unless_above = old < own ? V{} : half,
            to_old = old > own ? grad_u : unless_above;
    const V to_own = grad_u - to_old;
    d.hyper[kRate] = grad_rate * c.scale1;
    d.hyper[kEps] = to_own;
    d.hyper[kBeta1] = (e.state[0] - g) * grad_m + grad_rate * rate * c.slope1;
    d.hyper[kBeta2] = e.state[1] * to_old;
    d.state[0] = c.beta1 * grad_m;
    d.state[1] = c.beta2 * to_old;
    const V of_negative = g < V{} ? -to_own : V{}, of_magnitude = g > V{} ? to_own : of_negative;
    decayed_adjoint<T, V>(c, e, c.rest1 * grad_m + of_magnitude, d);
  }
};

template <>
struct Optimizer<Rule::rmsprop> {
  template <class T, class V>
  MAML_HOST_DEVICE static V mean(const RuleForm& f, const Coefficients<T>& c, const Element<V>& e, V g) {
    return f.centered ? c.beta2 * e.state[2] + c.rest2 * g : V{};
  }
  template <class T, class V>
  MAML_HOST_DEVICE static void step(const RuleForm& f, const Coefficients<T>& c, Element<V>& e) {
    const V g = decayed(c, e), a = mean(f, c, e, g), v = c.beta2 * e.state[0] + c.rest2 * (g * g);
    V direction = g / (square_root(v - a * a) + c.eps);
    if (f.has_buffer) direction += c.momentum * e.state[1];
    e.state[0] = v, e.state[1] = direction, e.state[2] = a;
    e.phi -= c.rate * direction;
  }
  template <class T, class V>
  MAML_HOST_DEVICE static void adjoint(const RuleForm& f, const Coefficients<T>& c, const Element<V>& e,
                                       ElementAdjoint<V>& d) {
    const V g = decayed(c, e), a = mean(f, c, e, g), v = c.beta2 * e.state[0] + c.rest2 * (g * g);
    const V root = square_root(v - a * a), inverse = T(1) / (root + c.eps), ratio = g * inverse;
    V direction = ratio, grad_ratio = -c.rate * d.phi;
    if (f.has_buffer) {
      direction += c.momentum * e.state[1];
      grad_ratio += d.state[1];
      d.hyper[kMomentum] = e.state[1] * grad_ratio;
      d.state[1] = c.momentum * grad_ratio;
    }
    d.hyper[kRate] = -direction * d.phi;
    const V grad_divisor = -grad_ratio * ratio * inverse, grad_variance = grad_divisor * root_slope<T>(root);
    const V grad_v = d.state[0] + grad_variance;
    d.hyper[kEps] = grad_divisor;
    d.hyper[kBeta2] = (e.state[0] - g * g) * grad_v;
    d.state[0] = c.beta2 * grad_v;
    V grad = grad_ratio * inverse + T(2) * c.rest2 * g * grad_v;
    if (f.centered) {
      const V grad_a = d.state[2] - T(2) * a * grad_variance;
      d.hyper[kBeta2] += (e.state[2] - g) * grad_a;
      d.state[2] = c.beta2 * grad_a;
      grad += c.rest2 * grad_a;
    }
    decayed_adjoint(c, e, grad, d);
  }
};

template <>
struct Optimizer<Rule::adagrad> {
  template <class T, class V>
  MAML_HOST_DEVICE static void step(const RuleForm&, const Coefficients<T>& c, Element<V>& e) {
    const V g = decayed(c, e);
    e.state[0] += g * g;
    e.phi -= c.rate * c.scale * (g / (square_root(e.state[0]) + c.eps));
  }
  template <class T, class V>
  MAML_HOST_DEVICE static void adjoint(const RuleForm&, const Coefficients<T>& c, const Element<V>& e,
                                       ElementAdjoint<V>& d) {
    const V g = decayed(c, e), root = square_root(e.state[0] + g * g);
    const V inverse = T(1) / (root + c.eps), ratio = g * inverse;
    const T rate = c.rate * c.scale;
    const V grad_rate = -ratio * d.phi, grad_divisor = rate * d.phi * ratio * inverse;
    d.hyper[kRate] = grad_rate * c.scale;
    d.hyper[kLrDecay] = -grad_rate * rate * (c.scale * c.delay);
    d.hyper[kEps] = grad_divisor;
    d.state[0] += grad_divisor * root_slope<T>(root);
    decayed_adjoint<T, V>(c, e, T(2) * g * d.state[0] - rate * d.phi * inverse, d);
  }
};

}  // namespace
}  // namespace maml
