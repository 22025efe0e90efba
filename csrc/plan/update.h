// What the inner optimizer does to one adapted parameter. Its arithmetic is in optimizers.h.
#pragma once

#include <cstdint>
#include <limits>

namespace maml {

/// An offset of something that is not there.
constexpr int64_t kNowhere = -1;

enum class Rule : uint8_t { sgd, adam, adamw, adamax, rmsprop, adagrad };

/// What a rule reads besides the gradient.
enum Hyperparameter : int {
  kRate,
  kWeightDecay,
  kMomentum,
  kDampening,
  kBeta1,
  kBeta2,  // of rmsprop: alpha
  kEps,
  kLrDecay,
  kHyperparameters
};

/// The largest number of states that a rule keeps of an element.
inline constexpr int kMostStates = 3;

/// A rule with its flags.
struct RuleForm {
  Rule rule = Rule::sgd;
  bool nesterov = false;    // of sgd
  bool centered = false;    // of rmsprop
  bool has_buffer = false;  // of sgd and rmsprop: whether there is momentum
  bool has_start = false;   // of sgd: whether an initial buffer is given
  int taken = 0;            // steps that the initial states have behind them
};

/// adam, adamw: m, v. adamax: m, u. sgd: b. adagrad: s. rmsprop: v, then b with momentum, then a if centered.
constexpr int states_of(const RuleForm& form) {
  switch (form.rule) {
    case Rule::sgd:
      return form.has_buffer ? 1 : 0;
    case Rule::rmsprop:
      return form.centered ? 3 : form.has_buffer ? 2 : 1;
    case Rule::adagrad:
      return 1;
    default:
      return 2;
  }
}

/// A hyperparameter, or an initial state, of one parameter: a constant, or a tensor that the caller passes.
struct Rate {
  double constant = 0;
  int slot = -1;             // the index of the tensor; -1: the constant
  bool per_step = false;     // its first axis counts inner steps; steps beyond it use the last
  bool elementwise = false;  // its other axes are those of the parameter
};

/// Of a factor with one number for each element, what is done with that number: nothing; 1 where it is at
/// least 0 and else 0; its sign. The last two have the derivative of the first (straight-through).
enum class Through : uint8_t { identity, mask, sign };

/// One factor of the transform of a parameter's gradient, which is linear: y = x times a number for each
/// element, or times a matrix along an axis of n elements,
///   y[a, i, c] = sum over j of M[i, j] x[a, j, c],   with `inner` values of c
/// The parameter's order of elements is that of the layers (packing.h). There, element i of the axis is at
/// place(i): a weight that is read with `taps` taps has them outside of its columns.
struct FactorForm {
  int64_t n = 0;  // 0: a number for each element
  int64_t inner = 1, taps = 1;
  Through through = Through::identity;

  constexpr int64_t place(int64_t i) const { return taps == 1 ? i : i % taps * (n / taps) + i / taps; }
};

/// The largest number of factors.
inline constexpr int kMostFactors = 3;

/// The update of one adapted parameter, as the plan has it.
struct Update {
  Rate hyper[kHyperparameters];
  Rate start[kMostStates];  // the initial states
  RuleForm form;
  Rate factor[kMostFactors];  // of the transform of the gradient, the first one first
  FactorForm factor_form[kMostFactors];
  int factors = 0;

  const Rate& rate() const { return hyper[kRate]; }
  /// Whether it is phi -= rate g, with g as it comes.
  bool is_plain() const {
    const Rate& decay = hyper[kWeightDecay];
    return form.rule == Rule::sgd && !form.has_buffer && decay.slot < 0 && decay.constant == 0 &&
           factors == 0;
  }
};

/// The clipping of the inner gradient of a task, before the optimizer sees it: by its norm over all adapted
/// parameters, g min(1, norm / (|g| + 1e-6)), then of each element to [-value, value].
struct Clip {
  double norm = std::numeric_limits<double>::infinity();
  double value = std::numeric_limits<double>::infinity();

  bool by_norm() const { return norm < std::numeric_limits<double>::infinity(); }
  bool is_none() const { return !by_norm() && value == std::numeric_limits<double>::infinity(); }
};

/// Where one inner step finds a hyperparameter or an initial state of a parameter. Offsets are in packed
/// vectors.
struct Source {
  double constant = 0;         // its value, if `at` is kNowhere
  int64_t at = kNowhere;       // among the packed rates
  int64_t grad_at = kNowhere;  // its gradient in the result
  bool elementwise = false;    // one for each element
};

/// The update of one adapted parameter in one inner step.
struct UpdateSlice {
  int64_t at, size;  // the parameter's elements
  int64_t stride;    // between the states of an element, in packed vectors: state j of element i is at
                     // state[j * stride + at + i]
  RuleForm form;
  bool elementwise = false;  // whether a hyperparameter is
  bool learns = false;       // whether a hyperparameter is learned
  Clip clip = {};            // the same for all
  Source hyper[kHyperparameters] = {};
  Source start[kMostStates] = {};
  Source factor[kMostFactors] = {};
  FactorForm factor_form[kMostFactors] = {};
  int factors = 0;
};

/// What one inner step reads of a task: packed vectors over the adapted parameters.
template <class T>
struct BeforeStep {
  int64_t step = 0;  // k, from 0
  const T *phi = nullptr, *g = nullptr, *state = nullptr;
  const T* clip = nullptr;  // kClipNumbers; null: not clipped by norm
};

/// Of the clipping by norm in one step: the factor c of g; (M / (n + 1e-6)^2) / n with the largest norm M and
/// the norm n, or 0 where c = 1; in the adjoint, the sum of g times the cotangent of c g.
inline constexpr int64_t kClipNumbers = 3;

}  // namespace maml
