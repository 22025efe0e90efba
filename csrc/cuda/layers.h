// The layers and losses of the CUDA backend, as its executors see them. A pass launches its kernels for all
// tasks; the tensors are symbolic addresses (run/address.h).
#pragma once

#include "cuda/run/launch.h"
#include "layers/kinds.h"

namespace maml::cuda {

template <class T>
struct LaunchPasses {
  void (*forward)(const Launcher&, const Layer&, const Tensors<T>&);
  void (*backward)(const Launcher&, const Layer&, const Tensors<T>&);
  void (*forward_tangent)(const Launcher&, const Layer&, const Tensors<T>&);
  void (*backward_tangent)(const Launcher&, const Layer&, const Tensors<T>&);
};

/// One kind of layer on this backend, instantiated in cuda/<kind>.cu (implement.h). Hidden symbols, so that a
/// library in which a kind is missing does not link.
template <Kind K>
struct __attribute__((visibility("hidden"))) Implementation {
  static Footprint footprint(const Layer&);
  static LaunchPasses<float> passes(float);
  static LaunchPasses<double> passes(double);
};

/// The four passes of a kind; null functions where this backend does not have it.
template <class T>
const LaunchPasses<T>& passes_of(Kind kind) {
  static const auto table = for_each_kind([&]<Kind K> {
    if constexpr (Declaration<K>::on_cuda) return Implementation<K>::passes(T{});
    return LaunchPasses<T>{};
  });
  return table[static_cast<size_t>(kind)];
}

/// What a layer saves and needs besides its tensors (run/run.cu).
Footprint footprint(const Layer& layer);

/// How many rows of y one entry of Tensors::statistics stands for: row m belongs to entry m / rows.
int64_t conv2d_statistics_rows(const Layer&);

/// The losses (loss.cu). Writes the loss of each task [1], and grad_z with saved, each unless it is null.
template <class T>
void launch_loss(const Launcher&, const LossPart&, const T* z, const Target<T>&, T* loss, T* grad_z,
                 T* saved);
template <class T>
void launch_loss_tangent(const Launcher&, const LossPart&, const T* z, const Target<T>&, const T* z_dot,
                         const T* saved, T* grad_z_dot);
template <class T>
void launch_metric(const Launcher&, const LossPart&, const T* z, const Target<T>&, const T* z_dot, T* grad_z);

}  // namespace maml::cuda
