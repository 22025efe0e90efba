// The stem: y = f(pool(BatchNorm(conv2d(x)))) of a constant x, from the moments (pbar, G) of x's patches p
// (layers/patch_moments.h). With weights w [patch, o], s = (var + eps)^-1/2, a = gamma s and k = gamma_dot s
// - a s c, per channel:
//
//   mu = w pbar, var = w G w                          Rmu = w_dot pbar, c = s w_dot G w
//   u = pool of x * (a w) + beta - a mu               u_dot = x * (a w_dot + k w) + beta_dot - a Rmu - k mu
//   y = f(u)                                          y_dot = f'(u) u_dot
//   g = f'(u) grad_y                                  g_dot = f'(u) grad_y_dot + f''(u) u_dot grad_y
//   D = sum g p, G1 = sum g = grad_beta               D' = sum g_dot p, R1 = sum g_dot = grad_beta_dot
//   G2 = s (w D - mu G1) = grad_gamma                 R2 = s (w D' - mu R1 + w_dot D - Rmu G1 - c G2)
//   v = D - G1 pbar - s G2 G w                        v' = D' - R1 pbar - s (R2 - s c G2) G w - s G2 G w_dot
//   grad_w = a v                                      grad_w_dot = a v' + k v
//
// where p in D is the patch of the pixel that the pool chose. So a forward pass is a convolution with other
// weights (stem_forward.cu), and a backward pass is a weight gradient (stem_backward.cu); each is one launch.
// What stands before the pool is never stored, and neither is its cotangent. The rest is small, per channel
// (stem_channels.h), and computed in double. The user's bias of the convolution has no effect and no
// gradient, because BatchNorm subtracts it.
//
// f' is computed from y where that is possible (Kink). For other functions the forward pass saves f'(u) and
// f''(u), and its tangent saves f''(u) u_dot: no other pass evaluates f.
#pragma once

#include "cuda/conv2d.h"
#include "cuda/layers.h"
#include "cuda/stem_tiles.h"
#include "layers/functions.h"
#include "layers/registry.h"

namespace maml::cuda {

/// Whether f'(u) does not follow from f(u).
inline bool is_curved(const Layer& l) { return bends(l.function) || !ascends(l); }

/// f(u) = u between low and high; above, high; below, low, or a u where low is zero: hardtanh, relu and
/// leaky_relu. No function is a = 1.
template <class T>
struct Kink {
  T low = 0, high = 0, a = 0;
  bool bounded = false;

  explicit Kink(const Layer& l) {
    if (l.function == Function::leaky_relu) a = static_cast<T>(l.a);
    bounded = l.function == Function::hardtanh;
    if (bounded) low = static_cast<T>(l.a), high = static_cast<T>(l.b);
  }
  __host__ __device__ bool is_identity() const { return a == 1; }
  __device__ __forceinline__ T operator()(T u) const {
    if (bounded && u > high) return high;
    if (a != 0) return u > 0 ? u : a * u;
    return u <= low ? low : u;
  }
  __device__ __forceinline__ T slope(T y) const { return y > low && !(bounded && y >= high) ? T(1) : a; }
};

/// What the passes save. The pointer may be a symbolic address: only offsets are computed from it.
template <class T>
struct StemSaved {
  double *Gw, *mu, *s, *Rmu, *c, *G2;  // [patch, o], then [o] each
  T *D, *G1;                           // [patch, o], [o]
  T *slope, *curvature;                // f'(u) and f''(u) of each element of y, if f is curved
  uint8_t* places;                     // the member of its window that each element of y chose, if pooled

  __host__ __device__ StemSaved(T* p, int64_t patch, int64_t o, int64_t curved)
      : Gw(doubles(p, 0)),
        mu(doubles(p, patch * o)),
        s(mu + o),
        Rmu(s + o),
        c(Rmu + o),
        G2(c + o),
        D(p + doubles_size(patch, o)),
        G1(D + patch * o),
        slope(D + lines(patch * o + o)),
        curvature(slope + lines(curved)),
        places(reinterpret_cast<uint8_t*>(curvature + lines(curved))) {}

  /// `curved`, `pooled`: the number of outputs if f is curved, if there is a pool; else zero.
  static constexpr int64_t size(int64_t patch, int64_t o, int64_t curved, int64_t pooled) {
    return doubles_size(patch, o) + lines(patch * o + o) + 2 * lines(curved) + (pooled + 3) / 4;
  }

 private:
  static __host__ __device__ double* doubles(T* p, int64_t at) { return reinterpret_cast<double*>(p) + at; }
  static __host__ __device__ constexpr int64_t lines(int64_t size) { return (size + 15) / 16 * 16; }
  static __host__ __device__ constexpr int64_t doubles_size(int64_t patch, int64_t o) {
    return lines(2 * (patch * o + 5 * o));
  }
};

/// The arguments of a pass.
template <class T>
struct Stem {
  StemTiles tiles;
  Tensors<T> tensors;
  Constants constants;
  Function function;
  Kink<T> kink;
  double eps;
  int n;                 // channels
  int tiles_of_block;    // the block with number b takes tiles [b tiles_of_block, (b + 1) tiles_of_block)
  bool curved, vectors;  // vectors: y, its tangent and their cotangents can be accessed in vectors
  int64_t outputs;       // elements of y

  Stem(const Layer& l, const Tensors<T>& t, int64_t most_blocks);

  int64_t blocks() const { return blocks_for(tiles.tiles, tiles_of_block); }
  __host__ __device__ StemSaved<T> saved(T* p) const { return {p, tiles.patch, n, curved ? outputs : 0}; }
};

/// y, or with `tangent` y_dot.
template <class T>
void stem_forward(const Launcher& launch, const Layer& l, const Tensors<T>& t, bool tangent);

/// The gradients, or with `tangent` their tangents. grad_y may then be absent: D, G1, G2 and all tangents of
/// the forward pass count as zero.
template <class T>
void stem_backward(const Launcher& launch, const Layer& l, const Tensors<T>& t, bool tangent);
int64_t stem_backward_scratch(const Layer& l);

/// The elements of V channels from `from` on, of which `left` exist.
template <class T>
__device__ __forceinline__ void get(const T* from, T (&values)[kVector<T>], int left, bool vectors) {
  if (vectors) {
    const Vector<T> v = *reinterpret_cast<const Vector<T>*>(from);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) values[e] = v.element[e];
    return;
  }
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) values[e] = e < left ? from[e] : T(0);
}

/// The chosen places of V channels.
template <class T>
struct alignas(kVector<T>) Members {
  uint8_t member[kVector<T>];

  static __device__ __forceinline__ Members read(const uint8_t* from, int left, bool vectors) {
    if (vectors) return *reinterpret_cast<const Members*>(from);
    Members m{};
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      if (e < left) m.member[e] = from[e];
    }
    return m;
  }
  __device__ __forceinline__ void write(uint8_t* to, int left, bool vectors) const {
    if (vectors) {
      *reinterpret_cast<Members*>(to) = *this;
      return;
    }
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      if (e < left) to[e] = member[e];
    }
  }
};

}  // namespace maml::cuda
