// Two instructions that are launched together: the backward pass of a convolution, or its tangent, and that
// of the normalisation before it, whose cotangent the convolution writes and adds up (cotangent_sums.h).
#pragma once

#include "cuda/cotangent_sums.h"
#include "cuda/run/work.h"

namespace maml::cuda {

/// Whether `second` reads all of what `first` writes, and takes the sums of it.
template <class T>
bool is_summed_pair(const Instruction<T>& first, const Instruction<T>& second) {
  if (first.op != second.op || first.beside != second.beside || first.tensors.add_x[0]) return false;
  if (second.tensors.x[1]) return false;  // padding, whose cotangents are not added up
  const bool dot = first.op == Op::backward_tangent;
  if (first.op != Op::backward && !dot) return false;
  const T* written = dot ? first.tensors.grad_x_dot[0] : first.tensors.grad_x[0];
  const T* read = dot ? second.tensors.grad_y_dot : second.tensors.grad_y;
  return written && written == read && sums_cotangent(first.layer, second.layer);
}

template <class T>
void launch_summed_pair(const Launcher& launch, const Instruction<T>& first, const Instruction<T>& second,
                        int64_t adapted) {
  const Layer& l = second.layer;
  const Tensors<T>& t = second.tensors;
  const bool tangent = first.op == Op::backward_tangent, plain = l.kind == Kind::batch_norm;
  const double below = plain ? 1 : l.function == Function::leaky_relu ? l.a : 0;
  const Normalised<T> norm{t.x[0],
                           tangent ? t.x_dot[0] : nullptr,
                           tangent ? t.grad_y : nullptr,
                           t.w[0],
                           t.w[1],
                           t.saved,
                           static_cast<T>(below),
                           l.pooled,
                           static_cast<int>(l.in.h * l.in.w)};
  const CotangentSums<T> sums = gradients_with_sums(launch, tangent, first.layer, first.tensors, norm);
  note([&] { return work_of(second, adapted); });
  const auto from_sums = plain ? batch_norm_from_sums<T> : norm_block_from_sums<T>;
  from_sums(launch, tangent, l, t, sums);
}

}  // namespace maml::cuda
