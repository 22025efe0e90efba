// The layers and losses of the CPU backend, as its executors see them.
#pragma once

#include "layers/kinds.h"

namespace maml::MAML_ISA {

/// One kind of layer on this backend, instantiated in cpu/<kind>.cpp (implement.h). Hidden symbols, so that a
/// library in which a kind is missing does not link.
template <Kind K>
struct __attribute__((visibility("hidden"))) Implementation {
  static Footprint footprint(const Layer&);
  static Passes<float> passes(float);
  static Passes<double> passes(double);
};

/// The four passes of a kind; null functions where this backend does not have it.
template <class T>
const Passes<T>& passes_of(Kind kind) {
  static const auto table = for_each_kind([&]<Kind K> {
    if constexpr (Declaration<K>::on_cpu) return Implementation<K>::passes(T{});
    return Passes<T>{};
  });
  return table[static_cast<size_t>(kind)];
}

template <class T>
LossPasses<T> cross_entropy();
template <class T>
LossPasses<T> mse();
template <class T>
LossPasses<T> gaussian_policy();
template <class T>
LossPasses<T> categorical_policy();
template <class T>
LossPasses<T> computed_loss();

template <class T>
const LossPasses<T>& loss_passes(Loss loss) {
  static const LossPasses<T> table[] = {cross_entropy<T>(), mse<T>(), gaussian_policy<T>(),
                                        categorical_policy<T>(), computed_loss<T>()};
  return table[static_cast<int>(loss)];
}

}  // namespace maml::MAML_ISA
