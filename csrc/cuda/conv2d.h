// What the three matrix products of a convolution share: the choice of arithmetic, and the declarations of
// the launches, from which conv2d.cu builds the passes.
#pragma once

#include <type_traits>

#include "cuda/cotangent_sums.h"
#include "cuda/product/cut.h"
#include "cuda/product/product.h"
#include "cuda/run/launch.h"

namespace maml::cuda {

/// Resident blocks per multiprocessor for which the kernel's registers must suffice: 168 a thread for three
/// blocks, 255 for two. Most of them hold the sums of a thread and the operands of one step, of which bf16x3
/// has two parts.
template <class Arithmetic, class Tile>
inline constexpr int kResidentProducts =
    sizeof(typename Arithmetic::T) == 8 ||
            Tile::kSums > (Arithmetic::kMatrix && !std::is_same_v<Arithmetic, Bf16x3> ? 64 : 32)
        ? 2
        : 3;

/// Calls f.operator()<Arithmetic>() for the precision of a layer on tensors of T.
template <class T, class F>
void with_arithmetic(Precision precision, F f) {
  if constexpr (std::is_same_v<T, float>) {
    switch (precision) {
      case Precision::bf16x3:
        return f.template operator()<Bf16x3>();
      case Precision::tf32:
        return f.template operator()<Tf32>();
      case Precision::bfloat16:
        return f.template operator()<Bf16>();
      case Precision::float32:
        break;
    }
  }
  f.template operator()<Simt<T>>();
}

/// Up to this number of outputs of one task, a product that is not split has Small tiles.
constexpr int64_t kSmallOutputs = kSmallTiles ? 512 : 65536;

/// Calls f.operator()<Arithmetic, Tile>() for `outputs` elements of C with n columns, where k is not split.
template <class T, class F>
void with_product(const Layer& l, int64_t outputs, int64_t n, F f) {
  const TileClass tile = outputs <= kSmallOutputs ? TileClass::small
                         : n <= 32                ? TileClass::narrow
                                                  : TileClass::wide;
  with_arithmetic<T>(l.precision, [&]<class Arithmetic>() {
    with_tile<Arithmetic>(tile, [&]<class Tile>() { f.template operator()<Arithmetic, Tile>(); });
  });
}

/// Elements of scratch for a launch of these products. Precisions with matrix instructions have other tiles.
inline int64_t split_scratch(const Layer& l, std::span<const Extent> products) {
  const int64_t plain = Cut(false, products).parts_size(products);
  if (l.precision == Precision::float32) return plain;
  return std::max(plain, Cut(true, products).parts_size(products));  // a layer may also be computed in double
}

/// Whether a tensor can be accessed in 16-byte vectors: its rows are whole vectors, and its address is
/// aligned in every task. False for the user's own tensors, whose alignment is not known.
template <class T>
bool in_vectors(const T* symbolic, int64_t row) {
  const uint64_t word = reinterpret_cast<uint64_t>(symbolic);
  const auto region = static_cast<Region>(word >> kRegionShift);
  return row % kVector<T> == 0 && word % 16 == 0 && (region == Region::shared || region == Region::task);
}

template <class T>
bool in_vectors(const T* const (&symbolic)[2], int count, int64_t row) {
  for (int t = 0; t < count; ++t) {
    if (!in_vectors(symbolic[t], row)) return false;
  }
  return true;
}

/// The patches that a convolution reads: one for each output pixel, or, in a stem, for each pixel of the
/// pool's windows.
template <class T>
PatchGather patch_gather(const Layer& l) {
  const Window& k = l.window;
  const int64_t step = l.pooled ? 2 : 1;
  PatchGather gather(l.n, l.in, l.out.h, l.out.w, step * k.stride_h, step * k.stride_w, -k.pad_top,
                     -k.pad_left, k.kernel_h, k.kernel_w);
  if (l.pooled) {
    gather.windows = gather.pixels;
    gather.pixels = int32(window_rows(gather.windows));
    gather.vector = kVector<T>;
    gather.step_h = int32(k.stride_h), gather.step_w = int32(k.stride_w);
  }
  return gather;
}

/// Throws Unsupported for a layer that is too large for the kernels' 32-bit offsets and 16-bit coordinates.
void refuse_large(const Layer& l);

/// The statistics that forward and forward_tangent compute of their output.
template <class T>
struct StatisticsOf {
  T* entries = nullptr;       // [tiles, 2, c], or with `primal` [tiles, 3, c]; null: none
  const T* primal = nullptr;  // y, where the output is y_dot
};

/// out = bias + sum of terms (x, w).
template <class T>
void convolve(const Launcher& launch, const char* name, const Layer& l, Terms<T> terms, const T* bias, T* out,
              StatisticsOf<T> statistics, T* scratch);
int64_t convolve_scratch(const Layer& l);

/// grad_w (+)= sum of terms (x, grad_y), grad_b (+)= column sums of the first term's grad_y; either may be
/// null.
template <class T>
struct WeightTerms {
  Terms<T> terms;
  bool add_w = false, add_b = false;
  T *grad_w = nullptr, *grad_b = nullptr;
};

/// grad_x (+)= sum of terms (grad_y, w); null: not wanted.
template <class T>
struct InputTerms {
  Terms<T> terms;
  bool add = false;
  T* grad_x = nullptr;
};

/// Both gradients in one launch, or the one that is wanted. With `norm`, also the sums of grad_x for it.
template <class T>
CotangentSums<T> gradients(const Launcher& launch, const char* name, const Layer& l,
                           const WeightTerms<T>& weight, const InputTerms<T>& input, T* scratch,
                           const Normalised<T>* norm = nullptr);
int64_t gradients_scratch(const Layer& l);

}  // namespace maml::cuda
