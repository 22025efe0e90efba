// The layers of the CPU backend: one .cpp each.
#pragma once

#include "layers/layer.h"

namespace maml::MAML_ISA {

template <class T>
Passes<T> channels_last();
template <class T>
Passes<T> flatten();
template <class T>
Passes<T> conv2d();
template <class T>
Passes<T> batch_norm();
template <class T>
Passes<T> running_norm();
template <class T>
Passes<T> group_norm();
template <class T>
Passes<T> pointwise();
template <class T>
Passes<T> max_pool();
template <class T>
Passes<T> avg_pool();
template <class T>
Passes<T> mean_pool();
template <class T>
Passes<T> add();
template <class T>
Passes<T> conv_block();
template <class T>
Passes<T> patch_gram();
template <class T>
Passes<T> stem();
template <class T>
Passes<T> append();

template <class T>
LossPasses<T> cross_entropy();
template <class T>
LossPasses<T> mse();
template <class T>
LossPasses<T> gaussian_policy();
template <class T>
LossPasses<T> categorical_policy();

template <class T>
const LossPasses<T>& loss_passes(Loss loss) {
  static const LossPasses<T> table[] = {cross_entropy<T>(), mse<T>(), gaussian_policy<T>(),
                                        categorical_policy<T>()};
  return table[static_cast<int>(loss)];
}

Footprint conv2d_footprint(const Layer&);
Footprint batch_norm_footprint(const Layer&);
Footprint running_norm_footprint(const Layer&);
Footprint group_norm_footprint(const Layer&);
Footprint max_pool_footprint(const Layer&);
Footprint conv_block_footprint(const Layer&);
Footprint patch_gram_footprint(const Layer&);
Footprint stem_footprint(const Layer&);

}  // namespace maml::MAML_ISA
