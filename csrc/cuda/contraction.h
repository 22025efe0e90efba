// out = the sum of a b along the axes that out does not have, for all tasks: any of the products of a
// contraction, and of an attention, is such a sum.
#pragma once

#include "cuda/implement.h"
#include "layers/loops.h"

namespace maml::cuda {

/// A sum of products over nested loops: `to` (+)= scale times the sum of a b, the operands as their views see
/// them.
struct Contraction {
  const char* name;
  const Loops& loops;
  int64_t n;  // samples
  const View &to, &a, &b;
  Precision precision;
};

/// The elements of T that a contraction needs in scratch. It does not decrease with the number of samples.
int64_t contraction_scratch(const Contraction& c);

/// Computes it with one or two terms, or none. An element of `out` that `to` does not reach is 0, unless it
/// adds.
template <class T>
void contract(const Launcher& launch, const Contraction& c, const Factors<T>* factors, int count, T scale,
              bool add, T* out, T* scratch);

}  // namespace maml::cuda
