// Two instructions that are launched together: the backward pass of the stem, or its tangent, and the step
// with the gradients of all layers that follows it (step_after.h).
#pragma once

#include <algorithm>
#include <optional>

#include "cuda/step_after.h"

namespace maml::cuda {

/// The step of `second`, if it reads what `first` and the passes before it have written; its slices of the
/// stem's parameters are found among those of the inner step.
template <class T>
std::optional<StepAfter<T>> step_after(const Instruction<T>& first, const Instruction<T>& second,
                                       const Problem& problem, const DevicePlan& plan, const T* rates) {
  const bool tangent = first.op == Op::backward_tangent, turns = second.op == Op::direction;
  if (first.layer.kind != Kind::stem || first.beside || plan.slices_a_step == 0) return {};
  if (tangent ? second.op != Op::retreat : first.op != Op::backward || (second.op != Op::descend && !turns)) {
    return {};
  }
  const Tensors<T>& t = second.tensors;
  const int64_t adapted = problem.packing.adapted;
  StepAfter<T> step{.op = second.op, .slices = plan.slices + second.slices, .count = plan.slices_a_step};
  step.adapted = adapted, step.size = adapted + second.size;
  step.rates = rates, step.x = t.x[0], step.g = turns ? t.x[0] : t.grad_y, step.y = t.y, step.saved = t.saved;

  const std::vector<RateSlice>& slices = problem.slices[second.slices / plan.slices_a_step];
  auto before = [](const RateSlice& a, const RateSlice& b) { return a.at < b.at; };
  if (!std::is_sorted(slices.begin(), slices.end(), before)) return {};
  for (int j = 0; j < kMostParameters; ++j) {
    const T* written = tangent ? first.tensors.grad_w_dot[j] : first.tensors.grad_w[j];
    if (!written) continue;
    auto is_its = [&](const RateSlice& s) { return step.g + s.at == written; };
    const auto found = std::find_if(slices.begin(), slices.end(), is_its);
    if (found != slices.end()) {
      step.own[j] = static_cast<int>(found - slices.begin());
    } else if (written - step.g < step.size) {
      return {};  // not adapted, but part of the step
    }
  }
  return step;
}

}  // namespace maml::cuda
