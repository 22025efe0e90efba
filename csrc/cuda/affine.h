// BatchNorm with batch statistics, for one channel whose sums are known (normalise.h has the formulas): an
// affine map of x, and the tangent of that map.
#pragma once

#include "cuda/run/platform.h"
#include "layers/layer.h"

namespace maml::cuda {

/// What the passes save: six vectors [c], and for each output [n, out_h, out_w, c] of a max-pool the pixel
/// (numbered within its sample) that holds the maximum.
template <class T>
struct Saved {
  T *mu, *s, *G1, *G2, *Rmu, *c;
  int32_t* places;
  __device__ __forceinline__ Saved(T* p, int64_t channels)
      : mu(p),
        s(p + channels),
        G1(p + 2 * channels),
        G2(p + 3 * channels),
        Rmu(p + 4 * channels),
        c(p + 5 * channels),
        places(reinterpret_cast<int32_t*>(p + 6 * channels)) {}
};

/// The map x -> u of one channel, and its tangent. Every pass computes the same bits of u, so that all passes
/// agree on which side of a kink (of a ReLU, say) an element lies.
template <class T>
struct Affine {
  T mu, s, scale, beta;  // scale = gamma s
  T Rmu = 0, c = 0;
  T slope = 0, shift = 0;  // slope = k, shift = beta_dot - gamma s Rmu

  __device__ __forceinline__ Affine(const Tensors<T>& t, int channel, T mu, T s)
      : mu(mu), s(s), scale(t.w[0] ? t.w[0][channel] * s : s), beta(t.w[1] ? t.w[1][channel] : T(0)) {}

  __device__ __forceinline__ void move(const Tensors<T>& t, int channel, T mean_dot, T correlation) {
    Rmu = mean_dot, c = correlation;
    slope = s * ((t.w_dot[0] ? t.w_dot[0][channel] : T(0)) - scale * c);
    shift = (t.w_dot[1] ? t.w_dot[1][channel] : T(0)) - scale * Rmu;
  }

  __device__ __forceinline__ T xh(T x) const { return (x - mu) * s; }
  __device__ __forceinline__ T u(T x) const { return (x - mu) * scale + beta; }
  __device__ __forceinline__ T xh_dot(T x, T x_dot) const { return s * (x_dot - Rmu - xh(x) * c); }
  __device__ __forceinline__ T u_dot(T x, T x_dot) const {
    return (x - mu) * slope + (scale * x_dot + shift);
  }
};

}  // namespace maml::cuda
