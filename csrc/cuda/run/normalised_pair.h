// Two instructions that are launched together: a forward pass of a convolution, or its tangent, and that of
// the normalisation that reads its output (normalise_columns.h).
#pragma once

#include "cuda/following.h"
#include "cuda/run/small_run.h"

namespace maml::cuda {

/// Whether `second` normalises what `first` writes, and it pays.
template <class T>
bool is_normalised_pair(const Instruction<T>& first, const Instruction<T>& second) {
  const Layer &l = first.layer, &norm = second.layer;
  if (first.op != second.op || first.beside != second.beside) return false;
  if (l.kind != Kind::conv2d || (norm.kind != Kind::norm_block && norm.kind != Kind::batch_norm))
    return false;
  const bool forward = first.op == Op::forward && first.tensors.statistics;
  const bool tangent = first.op == Op::forward_tangent && first.tensors.statistics_dot;
  if (!forward && !tangent) return false;
  const bool reads =
      forward ? first.tensors.y == second.tensors.x[0] : first.tensors.y_dot == second.tensors.x_dot[0];
  return reads && !norm.pooled && has_block_passes(norm) && normalises_at_once(l);
}

template <class T>
void launch_normalised_pair(const Launcher& launch, const Instruction<T>& first,
                            const Instruction<T>& second) {
  const Following<T> following{second.layer, second.tensors, second.op == Op::forward_tangent};
  convolve_and_normalise(launch, first.layer, first.tensors, following);
}

}  // namespace maml::cuda
