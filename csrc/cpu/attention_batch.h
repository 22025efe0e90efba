// The batch of matrices of an attention, and into how many groups it can be divided for threads.
#pragma once

#include <algorithm>
#include <iterator>
#include <set>

#include "cpu/strided.h"
#include "layers/kinds.h"

namespace maml::MAML_ISA {

/// The loops over the batch, with the strides of q, k, v, the bias and y.
inline Nest<5> batch_of(const Layer& l) {
  const Loops& loops = *l.loops;
  Nest<5> batch;
  for (int a = 0; a < loops.axes - 4; ++a) {
    batch.append(extent(loops, a, l.n), {loops.x[0].stride[a], loops.x[1].stride[a], loops.x[2].stride[a],
                                         loops.x[3].stride[a], loops.y.stride[a]});
  }
  return batch;
}

/// Whether no two indices of the batch write to one element of the cotangents `grad`. Several operands can be
/// parts of one value, as q, k and v are of one projection: these must be alike and evenly apart.
template <class T>
bool is_apart(const Loops& loops, int64_t n, T* const* grad) {
  const int batch = loops.axes - 4;
  for (int j = 0; j < kMostInputs; ++j) {
    if (!grad[j]) continue;
    std::set<int64_t> offsets;
    int64_t size[2] = {1, 1}, stride[2];
    for (int i = 0; i < 2; ++i) stride[i] = loops.x[j].stride[batch + kAttentionAxes[j][i]];
    for (int other = 0; other < kMostInputs; ++other) {
      if (grad[other] != grad[j]) continue;
      const View& view = loops.x[other];
      if (!std::equal(view.stride, view.stride + batch, loops.x[j].stride)) return false;
      for (int i = 0; i < 2; ++i) {
        const int axis = batch + kAttentionAxes[other][i];
        if (view.stride[axis] != stride[i]) return false;
        size[i] = std::max(size[i], loops.size[axis]);
      }
      offsets.insert(view.offset);
    }
    Nest<1> nest;  // what the batch, the matrices and the operands come to
    for (int a = 0; a < batch; ++a) nest.append(extent(loops, a, n), {loops.x[j].stride[a]});
    for (int i = 0; i < 2; ++i) {
      if (stride[i] != 0) nest.append(size[i], {stride[i]});
    }
    const int64_t first = *offsets.begin(), last = *offsets.rbegin();
    const auto count = static_cast<int64_t>(offsets.size());
    const int64_t step = count > 1 ? *std::next(offsets.begin()) - first : 0;
    nest.append(count, {step});
    if (!injective(nest) || last - first != (count - 1) * step) return false;
  }
  return true;
}

/// The number of groups of equal size, of which no two write to one element of the cotangents `grad`: each
/// index of the batch, each sample, or all.
template <class T>
int64_t groups_apart(const Loops& loops, int64_t n, T* const* grad) {
  if (is_apart(loops, n, grad)) return attention_batch(loops, n);
  for (int j = 0; j < kMostInputs; ++j) {
    if (grad[j] && loops.x[j].stride[0] == 0) return 1;
  }
  return loops.size[0] == kSamples ? n : 1;
}

}  // namespace maml::MAML_ISA
