// BatchNorm with batch statistics, for channels whose sums are known (normalise.h has the formulas): an
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

/// The map x -> u, and its tangent, of one channel or of a vector of channels. Every pass computes the same
/// bits of u, so that all passes agree on which side of a kink (of a ReLU, say) an element lies.
template <class V>
struct Affine {
  V mu, s, scale, beta;  // scale = gamma s
  V Rmu, c;
  V slope, shift;  // slope = k, shift = beta_dot - gamma s Rmu

  __device__ __forceinline__ Affine(const V& gamma, const V& beta, const V& mu, const V& s)
      : mu(mu), s(s), scale(gamma * s), beta(beta), Rmu(0), c(0), slope(0), shift(0) {}

  __device__ __forceinline__ void move(const V& gamma_dot, const V& beta_dot, const V& mean_dot,
                                       const V& correlation) {
    Rmu = mean_dot, c = correlation;
    slope = s * (gamma_dot - scale * c);
    shift = beta_dot - scale * Rmu;
  }

  __device__ __forceinline__ V xh(const V& x) const { return (x - mu) * s; }
  __device__ __forceinline__ V u(const V& x) const { return (x - mu) * scale + beta; }
  __device__ __forceinline__ V xh_dot(const V& x, const V& x_dot) const {
    return s * (x_dot - Rmu - xh(x) * c);
  }
  __device__ __forceinline__ V u_dot(const V& x, const V& x_dot) const {
    return (x - mu) * slope + (scale * x_dot + shift);
  }
};

}  // namespace maml::cuda
