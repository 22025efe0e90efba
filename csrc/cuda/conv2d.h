// What the three matrix products of a convolution share: the choice of arithmetic and tile, and the
// declarations of the products, from which conv2d.cu builds the passes.
#pragma once

#include <type_traits>

#include "cuda/product/product.h"
#include "cuda/run/launch.h"

namespace maml::cuda {

/// Tile shapes: Wide; Narrow for n <= 32; Small for few outputs, with warps that share k, so that there are
/// enough blocks and each is done soon. With small tiles (a test build) a tile has one warp, or two that
/// share k. A warp's part of the tile decides how often an operand is read from shared memory and rounded:
/// docs/gpu.md derives the rates. Wide is limited by registers: 128 sums a thread with matrix instructions,
/// 64 (8 x 8) in float32.
template <class Arithmetic, bool SmallTiles = kSmallTiles>
struct Tiles {
  static constexpr int kWarpM = Arithmetic::kMatrix ? 64 : 32;
  using Wide = std::conditional_t<sizeof(typename Arithmetic::T) == 8, Tile<32, 32, 2, 2, 1, 4>,
                                  Tile<kWarpM, 64, 2, 1, 2, 3>>;
  using Narrow = Tile<kWarpM, 32, 2, 1, 2, 3>;
  using Small = Tile<32, 32, 1, 1, 4, 3>;
};
template <class Arithmetic>
struct Tiles<Arithmetic, true> {
  using Wide = Tile<32, 32, 1, 1, 1, 3>;
  using Narrow = Wide;
  using Small = Tile<32, 32, 1, 1, 2, 2>;
};

/// Up to this number of outputs of one task, Small is used: at the usual 4 to 32 tasks, Wide tiles would be
/// too few to occupy the GPU.
constexpr int64_t kSmallOutputs = kSmallTiles ? 512 : 65536;

/// Resident blocks per multiprocessor for which the kernel's registers must suffice. Most of them hold the
/// sums of a thread and the operands of one step.
template <class Arithmetic, class Tile>
inline constexpr int kResidentProducts =
    sizeof(typename Arithmetic::T) == 8 || Tile::kSums > (Arithmetic::kMatrix ? 64 : 32) ? 2
    : Arithmetic::kMatrix                                                                ? 3
                                                                                         : 4;

/// Calls f.operator()<Arithmetic, Tile>() for `outputs` elements of C with n columns.
template <class T, class F>
void with_product(const Layer& l, int64_t outputs, int64_t n, F f) {
  auto with_tile = [&]<class Arithmetic>() {
    using Choice = Tiles<Arithmetic>;
    if (outputs <= kSmallOutputs) return f.template operator()<Arithmetic, typename Choice::Small>();
    if (n <= 32) return f.template operator()<Arithmetic, typename Choice::Narrow>();
    return f.template operator()<Arithmetic, typename Choice::Wide>();
  };
  if constexpr (std::is_same_v<T, float>) {
    switch (l.precision) {
      case Precision::bf16x3:
        return with_tile.template operator()<Bf16x3>();
      case Precision::tf32:
        return with_tile.template operator()<Tf32>();
      case Precision::bfloat16:
        return with_tile.template operator()<Bf16>();
      case Precision::float32:
        break;
    }
  }
  with_tile.template operator()<Simt<T>>();
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
              StatisticsOf<T> statistics);

/// grad_x (+)= sum of terms (grad_y, w).
template <class T>
void input_gradient(const Launcher& launch, const char* name, const Layer& l, Terms<T> terms, bool add,
                    T* grad_x);

/// grad_w (+)= sum of terms (x, grad_y), grad_b (+)= column sums of the first term's grad_y; either may be
/// null.
template <class T>
void weight_gradient(const Launcher& launch, const char* name, const Layer& l, Terms<T> terms, bool add_w,
                     bool add_b, T* grad_w, T* grad_b, T* scratch);
int64_t weight_gradient_scratch(const Layer& l);

}  // namespace maml::cuda
