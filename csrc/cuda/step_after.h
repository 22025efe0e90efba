// The update of the packed parameters that follows a gradient (run/updates.h), in the launch of the stem's
// gradients (stem_backward.cu), which are the last ones of a pass. A launch of its own would take some 2 us
// and move the same bytes.
//
// Further blocks behind those of the stem take kStepRange elements of the vectors each, without the stem's
// own parameters. The last block of the stem's takes these, after it has written their gradients. The
// gradients of all other parameters come from kernels before this one.
#pragma once

#include "cuda/run/updates.h"
#include "cuda/run/work.h"

namespace maml::cuda {

inline constexpr int64_t kStepRange = kSmallTiles ? 64 : 4096;

template <class T>
struct StepAfter {
  int blocks = 0;  // along x, behind those of the gradients; 0: there is no step
  Op op = Op::join;
  const RateSlice* slices = nullptr;  // of the inner step
  int count = 0;
  int own[kMostParameters] = {-1, -1, -1, -1};  // the slices of the stem's parameters; -1: none
  int64_t adapted = 0, size = 0;                // elements; those of retreat, also beyond the adapted ones
  const T *rates = nullptr, *x = nullptr,
          *g = nullptr;  // as in an Instruction: x is phi, or v of a direction
  T *y = nullptr, *saved = nullptr;
};

/// The backward pass of the stem, or its tangent, and the step: one launch. `after` has no blocks yet.
template <class T>
void stem_backward_and_step(const Launcher& launch, const Layer& l, const Tensors<T>& t, bool tangent,
                            StepAfter<T> after, const Work& of_step);

template <class T>
__device__ __forceinline__ StepAfter<T> resolve(const StepAfter<T>& symbolic, const Memory& memory,
                                                int64_t task) {
  StepAfter<T> step = symbolic;
  step.rates = resolve(symbolic.rates, memory, task), step.x = resolve(symbolic.x, memory, task);
  step.g = resolve(symbolic.g, memory, task), step.y = resolve(symbolic.y, memory, task);
  step.saved = resolve(symbolic.saved, memory, task);
  return step;
}

/// `count` elements of a slice, from `first` on.
__device__ __forceinline__ RateSlice part_of(RateSlice s, int64_t first, int64_t count) {
  s.at += first, s.size = count;
  if (s.elementwise && s.rate_at != kNowhere) s.rate_at += first;
  return s;
}

template <bool Retreat, class T>
__device__ __forceinline__ void take_step(Team team, const StepAfter<T>& p, const RateSlice& s) {
  if constexpr (Retreat) {
    retreat(team, s, p.rates, p.g, p.y, p.saved);
  } else if (p.op == Op::descend) {
    descend(team, s, p.rates, p.x, p.g, p.y);
  } else {
    direction(team, s, p.rates, p.x, p.y);
  }
}
/// The same for element i of a slice.
template <bool Retreat, class T>
__device__ __forceinline__ void take_step(const StepAfter<T>& p, const RateSlice& s, int64_t i) {
  const SliceRates<T> rates(s, p.rates);
  const T rate = rates.of(rates.each ? rates.each[i] : T(0));
  const int64_t at = s.at + i;
  if constexpr (Retreat) {
    const T moved = p.y[at] - p.g[at];
    p.y[at] = moved;
    if (p.saved) p.saved[at] = rate * moved;
  } else {
    p.y[at] = p.op == Op::descend ? p.x[at] - rate * p.g[at] : rate * p.x[at];
  }
}

/// Range `block` of the vectors, by a whole block.
template <bool Retreat, class T>
__device__ void step_of_others(const StepAfter<T>& p, int64_t block) {
  const int64_t first = block * kStepRange, end = first + kStepRange;
  const Team team{0, 1};
  int low = 0, high = p.count;  // the first slice that does not end before the range
  while (low < high) {
    const int middle = (low + high) / 2;
    const RateSlice& s = p.slices[middle];
    s.at + s.size <= first ? low = middle + 1 : high = middle;
  }
  for (int s = low; s < p.count; ++s) {
    const RateSlice slice = p.slices[s];
    if (slice.at >= end) break;
    if (s == p.own[0] || s == p.own[1] || s == p.own[2] || s == p.own[3]) continue;
    const int64_t from = std::max<int64_t>(first - slice.at, 0);
    take_step<Retreat>(team, p, part_of(slice, from, std::min(end - slice.at, slice.size) - from));
  }
  if constexpr (Retreat) {
    const int64_t from = std::max(first, p.adapted), to = std::min(end, p.size);
    if (from < to) subtract(team, to - from, p.g + from, p.y + from);
  }
}

/// The stem's parameter j, [rows, columns]: `width` columns from `column` on, by a whole block.
template <bool Retreat, class T>
__device__ __forceinline__ void step_of_own(const StepAfter<T>& p, int j, int rows, int columns, int column,
                                            int width) {
  if (p.own[j] < 0) return;
  const RateSlice slice = p.slices[p.own[j]];
  for (int e = static_cast<int>(threadIdx.x); e < rows * width; e += static_cast<int>(blockDim.x)) {
    const int row = e / width;
    take_step<Retreat>(p, slice, static_cast<int64_t>(row) * columns + column + e - row * width);
  }
}

}  // namespace maml::cuda
