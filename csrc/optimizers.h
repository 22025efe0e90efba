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

/// Clipping by value, and whether its derivative is 1; at the bounds it is, as in torch.
template <class T>
MAML_HOST_DEVICE inline T clamped(T g, T most) {
  return g > most ? most : g < -most ? -most : g;
}
template <class T>
MAML_HOST_DEVICE inline bool is_inside(T g, T most) {
  return g <= most && g >= -most;
}

/// The numbers that a step reads. They are computed in double: in float32, 1 - 0.999^t has an error of 6e-5.
template <class T>
struct Coefficients {
  T rate, weight_decay, momentum, beta1, beta2, eps;
  T undamped;                  // 1 - dampening
  T rest1, rest2;              // 1 - beta
  T correction1, correction2;  // 1 - beta1^t, sqrt(1 - beta2^t)
  T slope1, slope2;            // the derivatives of these corrections by beta
  T delay, growth;             // t - 1, 1 + (t - 1) lr_decay
  bool first;                  // step = 0

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
      const double before = to_the(h[kBeta1], t - 1);
      c.correction1 = static_cast<T>(1 - before * h[kBeta1]), c.slope1 = static_cast<T>(-n * before);
    }
    if constexpr (R == Rule::adam || R == Rule::adamw) {
      const double before = to_the(h[kBeta2], t - 1), root = sqrt(1 - before * h[kBeta2]);
      c.correction2 = static_cast<T>(root), c.slope2 = static_cast<T>(-n * before / (2 * root));
    }
    if constexpr (R == Rule::adagrad) {
      c.delay = static_cast<T>(n - 1), c.growth = static_cast<T>(1 + (n - 1) * h[kLrDecay]);
    }
    return c;
  }
};

/// An element before a step: its value, its gradient, its states.
template <class T>
struct Element {
  T phi, g, state[kMostStates];
};

/// The cotangents of an element and of the hyperparameters. adjoint() turns those of phi and the states after
/// a step into those before it, and writes the others.
template <class T>
struct ElementAdjoint {
  T phi, g, state[kMostStates], hyper[kHyperparameters];
};

/// d sqrt(x) / dx, from the root.
template <class T>
MAML_HOST_DEVICE inline T root_slope(T root) {
  return root > T(0) ? T(0.5) / root : T(0);
}

/// step() changes phi and the states. adjoint() is the transpose of its derivative, at the element before it.
template <Rule R>
struct Optimizer;

/// G = g + weight_decay phi, and its adjoint.
template <class T>
MAML_HOST_DEVICE inline T decayed(const Coefficients<T>& c, const Element<T>& e) {
  return e.g + c.weight_decay * e.phi;
}
template <class T>
MAML_HOST_DEVICE inline void decayed_adjoint(const Coefficients<T>& c, const Element<T>& e, T grad,
                                             ElementAdjoint<T>& d) {
  d.g = grad;
  d.phi += c.weight_decay * grad;
  d.hyper[kWeightDecay] = e.phi * grad;
}

template <>
struct Optimizer<Rule::sgd> {
  template <class T>
  MAML_HOST_DEVICE static T buffer(const RuleForm& f, const Coefficients<T>& c, T g, T before) {
    return c.first && !f.has_start ? g : c.momentum * before + c.undamped * g;
  }
  template <class T>
  MAML_HOST_DEVICE static void step(const RuleForm& f, const Coefficients<T>& c, Element<T>& e) {
    T direction = decayed(c, e);
    if (f.has_buffer) {
      const T g = direction;
      e.state[0] = buffer(f, c, g, e.state[0]);
      direction = f.nesterov ? g + c.momentum * e.state[0] : e.state[0];
    }
    e.phi -= c.rate * direction;
  }
  template <class T>
  MAML_HOST_DEVICE static void adjoint(const RuleForm& f, const Coefficients<T>& c, const Element<T>& e,
                                       ElementAdjoint<T>& d) {
    const T g = decayed(c, e), grad_direction = -c.rate * d.phi;
    T direction = g, grad = grad_direction;
    if (f.has_buffer) {
      const T b = buffer(f, c, g, e.state[0]);
      direction = f.nesterov ? g + c.momentum * b : b;
      const T grad_b = d.state[0] + (f.nesterov ? c.momentum * grad_direction : grad_direction);
      const bool copies = c.first && !f.has_start;
      d.hyper[kMomentum] = (f.nesterov ? b * grad_direction : T(0)) + (copies ? T(0) : e.state[0] * grad_b);
      d.hyper[kDampening] = copies ? T(0) : -g * grad_b;
      d.state[0] = copies ? T(0) : c.momentum * grad_b;
      grad = (f.nesterov ? grad_direction : T(0)) + (copies ? grad_b : c.undamped * grad_b);
    }
    d.hyper[kRate] = -direction * d.phi;
    decayed_adjoint(c, e, grad, d);
  }
};

/// Adam, and AdamW with its own weight decay.
template <bool Decoupled>
struct AdamRule {
  template <class T>
  MAML_HOST_DEVICE static T gradient(const Coefficients<T>& c, const Element<T>& e) {
    if constexpr (Decoupled) return e.g;
    return decayed(c, e);
  }
  template <class T>
  MAML_HOST_DEVICE static void step(const RuleForm&, const Coefficients<T>& c, Element<T>& e) {
    const T g = gradient(c, e);
    if constexpr (Decoupled) e.phi *= T(1) - c.rate * c.weight_decay;
    e.state[0] = c.beta1 * e.state[0] + c.rest1 * g;
    e.state[1] = c.beta2 * e.state[1] + c.rest2 * (g * g);
    const T divisor = sqrt(e.state[1]) / c.correction2 + c.eps;
    e.phi -= c.rate / c.correction1 * (e.state[0] / divisor);
  }
  template <class T>
  MAML_HOST_DEVICE static void adjoint(const RuleForm&, const Coefficients<T>& c, const Element<T>& e,
                                       ElementAdjoint<T>& d) {
    const T g = gradient(c, e);
    const T m = c.beta1 * e.state[0] + c.rest1 * g, v = c.beta2 * e.state[1] + c.rest2 * (g * g);
    const T root = sqrt(v), divisor = root / c.correction2 + c.eps, ratio = m / divisor;
    const T rate = c.rate / c.correction1, grad_rate = -ratio * d.phi, grad_ratio = -rate * d.phi;
    const T grad_divisor = -grad_ratio * ratio / divisor, grad_root = grad_divisor / c.correction2;
    const T grad_m = d.state[0] + grad_ratio / divisor, grad_v = d.state[1] + grad_root * root_slope(root);
    d.hyper[kRate] = grad_rate / c.correction1;
    d.hyper[kEps] = grad_divisor;
    d.hyper[kBeta1] = (e.state[0] - g) * grad_m - grad_rate * rate / c.correction1 * c.slope1;
    d.hyper[kBeta2] = (e.state[1] - g * g) * grad_v - grad_root * root / c.correction2 * c.slope2;
    d.state[0] = c.beta1 * grad_m;
    d.state[1] = c.beta2 * grad_v;
    const T grad = c.rest1 * grad_m + T(2) * c.rest2 * g * grad_v;
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
  template <class T>
  MAML_HOST_DEVICE static T magnitude(T g) {
    return g < T(0) ? -g : g;
  }
  template <class T>
  MAML_HOST_DEVICE static T larger(T a, T b) {
    return a > b ? a : b;
  }
  template <class T>
  MAML_HOST_DEVICE static void step(const RuleForm&, const Coefficients<T>& c, Element<T>& e) {
    const T g = decayed(c, e);
    e.state[0] = c.beta1 * e.state[0] + c.rest1 * g;
    e.state[1] = larger(c.beta2 * e.state[1], magnitude(g) + c.eps);
    e.phi -= c.rate / c.correction1 * (e.state[0] / e.state[1]);
  }
  template <class T>
  MAML_HOST_DEVICE static void adjoint(const RuleForm&, const Coefficients<T>& c, const Element<T>& e,
                                       ElementAdjoint<T>& d) {
    const T g = decayed(c, e), m = c.beta1 * e.state[0] + c.rest1 * g;
    const T old = c.beta2 * e.state[1], own = magnitude(g) + c.eps, u = larger(old, own), ratio = m / u;
    const T rate = c.rate / c.correction1, grad_rate = -ratio * d.phi, grad_ratio = -rate * d.phi;
    const T grad_m = d.state[0] + grad_ratio / u, grad_u = d.state[1] - grad_ratio * ratio / u;
    const T to_old = old > own ? grad_u : old < own ? T(0) : T(0.5) * grad_u, to_own = grad_u - to_old;
    d.hyper[kRate] = grad_rate / c.correction1;
    d.hyper[kEps] = to_own;
    d.hyper[kBeta1] = (e.state[0] - g) * grad_m - grad_rate * rate / c.correction1 * c.slope1;
    d.hyper[kBeta2] = e.state[1] * to_old;
    d.state[0] = c.beta1 * grad_m;
    d.state[1] = c.beta2 * to_old;
    const T of_magnitude = g > T(0) ? to_own : g < T(0) ? -to_own : T(0);
    decayed_adjoint(c, e, c.rest1 * grad_m + of_magnitude, d);
  }
};

template <>
struct Optimizer<Rule::rmsprop> {
  template <class T>
  MAML_HOST_DEVICE static T mean(const RuleForm& f, const Coefficients<T>& c, const Element<T>& e, T g) {
    return f.centered ? c.beta2 * e.state[2] + c.rest2 * g : T(0);
  }
  template <class T>
  MAML_HOST_DEVICE static void step(const RuleForm& f, const Coefficients<T>& c, Element<T>& e) {
    const T g = decayed(c, e), a = mean(f, c, e, g), v = c.beta2 * e.state[0] + c.rest2 * (g * g);
    T direction = g / (sqrt(v - a * a) + c.eps);
    if (f.has_buffer) direction += c.momentum * e.state[1];
    e.state[0] = v, e.state[1] = direction, e.state[2] = a;
    e.phi -= c.rate * direction;
  }
  template <class T>
  MAML_HOST_DEVICE static void adjoint(const RuleForm& f, const Coefficients<T>& c, const Element<T>& e,
                                       ElementAdjoint<T>& d) {
    const T g = decayed(c, e), a = mean(f, c, e, g), v = c.beta2 * e.state[0] + c.rest2 * (g * g);
    const T root = sqrt(v - a * a), divisor = root + c.eps, ratio = g / divisor;
    T direction = ratio, grad_ratio = -c.rate * d.phi;
    if (f.has_buffer) {
      direction += c.momentum * e.state[1];
      grad_ratio += d.state[1];
      d.hyper[kMomentum] = e.state[1] * grad_ratio;
      d.state[1] = c.momentum * grad_ratio;
    }
    d.hyper[kRate] = -direction * d.phi;
    const T grad_divisor = -grad_ratio * ratio / divisor, grad_variance = grad_divisor * root_slope(root);
    const T grad_v = d.state[0] + grad_variance;
    d.hyper[kEps] = grad_divisor;
    d.hyper[kBeta2] = (e.state[0] - g * g) * grad_v;
    d.state[0] = c.beta2 * grad_v;
    T grad = grad_ratio / divisor + T(2) * c.rest2 * g * grad_v;
    if (f.centered) {
      const T grad_a = d.state[2] - T(2) * a * grad_variance;
      d.hyper[kBeta2] += (e.state[2] - g) * grad_a;
      d.state[2] = c.beta2 * grad_a;
      grad += c.rest2 * grad_a;
    }
    decayed_adjoint(c, e, grad, d);
  }
};

template <>
struct Optimizer<Rule::adagrad> {
  template <class T>
  MAML_HOST_DEVICE static void step(const RuleForm&, const Coefficients<T>& c, Element<T>& e) {
    const T g = decayed(c, e);
    e.state[0] += g * g;
    e.phi -= c.rate / c.growth * (g / (sqrt(e.state[0]) + c.eps));
  }
  template <class T>
  MAML_HOST_DEVICE static void adjoint(const RuleForm&, const Coefficients<T>& c, const Element<T>& e,
                                       ElementAdjoint<T>& d) {
    const T g = decayed(c, e), root = sqrt(e.state[0] + g * g), divisor = root + c.eps, ratio = g / divisor;
    const T rate = c.rate / c.growth, grad_rate = -ratio * d.phi, grad_ratio = -rate * d.phi;
    const T grad_divisor = -grad_ratio * ratio / divisor;
    d.hyper[kRate] = grad_rate / c.growth;
    d.hyper[kLrDecay] = -grad_rate * rate / c.growth * c.delay;
    d.hyper[kEps] = grad_divisor;
    d.state[0] += grad_divisor * root_slope(root);
    decayed_adjoint(c, e, grad_ratio / divisor + T(2) * g * d.state[0], d);
  }
};

}  // namespace
}  // namespace maml
