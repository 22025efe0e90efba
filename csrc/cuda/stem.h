// The stem: y = pool(BatchNorm(conv2d(x))) of a constant x, from the moments (pbar, G) of x's patches p
// (layers/patch_moments.h). With weights w [patch, o], s = (var + eps)^-1/2, a = gamma s and k = gamma_dot s
// - a s c, per channel:
//
//   mu = w pbar, var = w G w                          Rmu = w_dot pbar, c = s w_dot G w
//   y = pool of x * (a w) + beta - a mu               y_dot = x * (a w_dot + k w) + beta_dot - a Rmu - k mu
//   D = sum g p, G1 = sum g = grad_beta               D' = sum g_dot p, R1 = sum g_dot = grad_beta_dot
//   G2 = s (w D - mu G1) = grad_gamma                 R2 = s (w D' - mu R1 + w_dot D - Rmu G1 - c G2)
//   u = D - G1 pbar - s G2 G w                        u' = D' - R1 pbar - s (R2 - s c G2) G w - s G2 G w_dot
//   grad_w = a u                                      grad_w_dot = a u' + k u
//
// where g is the cotangent before the pool. So a forward pass is a convolution with other weights, and a
// backward pass is a weight gradient (conv2d.h). What stands before the pool is never stored. The rest is
// small, per channel, and computed in double. The user's bias of the convolution has no effect and no
// gradient, because BatchNorm subtracts it.
#pragma once

#include "cuda/conv2d.h"
#include "cuda/layers.h"
#include "layers/patch_moments.h"

namespace maml::cuda {

/// What the passes save. The pointer may be a symbolic address: only offsets are computed from it.
template <class T>
struct StemSaved {
  double *Gw, *mu, *s, *Rmu, *c, *G2;  // [patch, o], then [o] each
  T *D, *G1;                           // [patch, o], [o]
  uint8_t* places;                     // the member of its window that each element of y chose

  __host__ __device__ StemSaved(T* p, int64_t patch, int64_t o)
      : Gw(doubles(p, 0)),
        mu(doubles(p, patch * o)),
        s(mu + o),
        Rmu(s + o),
        c(Rmu + o),
        G2(c + o),
        D(p + doubles_size(patch, o)),
        G1(D + patch * o),
        places(reinterpret_cast<uint8_t*>(D + sums_size(patch, o))) {}

  static constexpr int64_t size(int64_t patch, int64_t o, int64_t outputs) {
    return doubles_size(patch, o) + sums_size(patch, o) + (outputs + 3) / 4;
  }

 private:
  static __host__ __device__ double* doubles(T* p, int64_t at) { return reinterpret_cast<double*>(p) + at; }
  static __host__ __device__ constexpr int64_t lines(int64_t size) { return (size + 15) / 16 * 16; }
  static __host__ __device__ constexpr int64_t doubles_size(int64_t patch, int64_t o) {
    return lines(2 * (patch * o + 5 * o));
  }
  static __host__ __device__ constexpr int64_t sums_size(int64_t patch, int64_t o) {
    return lines(patch * o + o);
  }
};

/// y = pool of x * weights + bias, and the places of the maxima; with `tangent`, y at the places found
/// before.
template <class T>
void convolve_and_pool(const Launcher& launch, const char* name, const Layer& l, Terms<T> terms,
                       const T* bias, bool tangent, T* y, uint8_t* places);

}  // namespace maml::cuda
