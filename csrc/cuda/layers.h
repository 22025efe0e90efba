// The layers of the CUDA backend: one .cu each. A pass launches its kernels for all tasks; the tensors are
// symbolic addresses (address.h).
#pragma once

#include "cuda/run/launch.h"

namespace maml::cuda {

template <class T>
struct LaunchPasses {
  void (*forward)(const Launcher&, const Layer&, const Tensors<T>&);
  void (*backward)(const Launcher&, const Layer&, const Tensors<T>&);
  void (*forward_tangent)(const Launcher&, const Layer&, const Tensors<T>&);
  void (*backward_tangent)(const Launcher&, const Layer&, const Tensors<T>&);
};

template <class T>
LaunchPasses<T> channels_last();
template <class T>
LaunchPasses<T> flatten();
template <class T>
LaunchPasses<T> conv2d();
template <class T>
LaunchPasses<T> batch_norm();
template <class T>
LaunchPasses<T> running_norm();
template <class T>
LaunchPasses<T> group_norm();
template <class T>
LaunchPasses<T> pointwise();
template <class T>
LaunchPasses<T> max_pool();
template <class T>
LaunchPasses<T> avg_pool();
template <class T>
LaunchPasses<T> mean_pool();
template <class T>
LaunchPasses<T> add();
template <class T>
LaunchPasses<T> append();
template <class T>
LaunchPasses<T> block();
template <class T>
LaunchPasses<T> patch_gram();
template <class T>
LaunchPasses<T> stem();

Footprint conv2d_footprint(const Layer&);
/// Rows of y that one entry of Tensors::statistics stands for: row m belongs to entry m / rows.
int64_t conv2d_statistics_rows(const Layer&);
Footprint batch_norm_footprint(const Layer&);
Footprint running_norm_footprint(const Layer&);
Footprint group_norm_footprint(const Layer&);
Footprint max_pool_footprint(const Layer&);
Footprint block_footprint(const Layer&);
Footprint patch_gram_footprint(const Layer&);
Footprint stem_footprint(const Layer&);

/// The losses (loss.cu): writes the loss of each task [1] where wanted, and grad_z, saved where wanted.
template <class T>
void launch_loss(const Launcher&, const LossPart&, const T* z, const Target<T>&, T* loss, T* grad_z,
                 T* saved);
template <class T>
void launch_loss_tangent(const Launcher&, const LossPart&, const T* z, const Target<T>&, const T* z_dot,
                         const T* saved, T* grad_z_dot);
template <class T>
void launch_metric(const Launcher&, const LossPart&, const T* z, const Target<T>&, const T* z_dot, T* grad_z);

}  // namespace maml::cuda
