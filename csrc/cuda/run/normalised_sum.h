// Two instructions that are launched together: a sum of two tensors, which is a map, and the group_norm that
// reads it (group_norm.h), in the forward pass or its tangent.
#pragma once

#include <optional>

#include "cuda/group_norm.h"
#include "cuda/run/work.h"
#include "layers/loops.h"

namespace maml::cuda {

/// The elements of an operand x of which element i % size belongs to element i of y, which is contiguous; 0
/// where there is no such number. So the outer axes of y may be missing in x.
inline int64_t period(const Loops& loops, int64_t n, const View& x) {
  int64_t inner = 1, size = 1;  // elements of the axes so far
  for (int a = loops.axes - 1; a >= 0; --a) {
    const int64_t count = extent(loops, a, n);
    if (count == 1) continue;
    if (loops.y.stride[a] != inner) return 0;
    if (x.stride[a] == inner && size == inner) {
      size *= count;
    } else if (x.stride[a] != 0) {
      return 0;
    }
    inner *= count;
  }
  return loops.y.offset == 0 && inner == elements(loops.y, n) ? size : 0;
}

/// The summands, if `first` adds two tensors and `second` normalises the sum.
template <class T>
std::optional<Summands<T>> normalised_sum(const Instruction<T>& first, const Instruction<T>& second) {
  if (first.op != second.op || first.beside != second.beside) return {};
  const bool tangent = first.op == Op::forward_tangent;
  if (first.op != Op::forward && !tangent) return {};
  const Layer& l = first.layer;
  if (l.kind != Kind::map || second.layer.kind != Kind::group_norm) return {};
  const Tensors<T>&t = first.tensors, &of_norm = second.tensors;
  if (tangent ? t.y_dot != of_norm.x_dot[0] : t.y != of_norm.x[0]) return {};
  const Expression& e = *l.expression;
  const ExpressionStep& s = e.step[0];
  if (e.operands != 2 || e.count != 1 || s.unary || s.combination != Combination::add ||
      s.argument[0] == s.argument[1]) {
    return {};
  }
  const Loops& loops = *l.loops;
  const int64_t a = period(loops, l.n, loops.x[0]), b = period(loops, l.n, loops.x[1]);
  if (a == 0 || b == 0) return {};
  const T* const* const x = tangent ? t.x_dot : t.x;
  auto at = [&](int j) { return x[j] ? x[j] + loops.x[j].offset : nullptr; };
  return Summands<T>{at(0), at(1), static_cast<unsigned>(a), static_cast<unsigned>(b),
                     tangent ? t.y_dot : t.y};
}

template <class T>
void launch_normalised_sum(const Launcher& launch, const Instruction<T>& first, const Instruction<T>& second,
                           const Summands<T>& summands, int64_t adapted) {
  const Layer& l = second.layer;
  note([&] {  // the norm does not read the sum from memory
    return work_of(first, adapted) + work_of(second, adapted) + traffic<T>(-l.n * size(l.in), 1);
  });
  normalise_sum(launch, l, second.tensors, first.op == Op::forward_tangent, summands);
}

}  // namespace maml::cuda
