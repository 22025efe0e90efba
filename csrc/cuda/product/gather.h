// The operands of a convolution's products, element by element.
//
// Each has an outer index (m of A, n of B) and k, and an element's offset is a sum of one part from either:
//
//   Gathered    an image [sample, h, w, c] read at (pixel, tap and channel). Pixel p is (sample, u, v), at
//               row u stride_h + origin_h, column v stride_w + origin_w; tap (r, s) adds (r, s). Zero where
//               that is outside the image. Either side may be the outer one.
//   Rows        a matrix [k, n], contiguous in n
//   Taps        weights [tap, n, o] for the input gradient: k = (tap of a parity class, last first; o)
//
// So a thread that fills a tile keeps its outer parts in registers and computes one part in k for each stage.
// Divisions are multiplications (Divisor). Offsets are 32-bit: a task's tensor has fewer than 2^31 elements.
#pragma once

#include <cstdint>

#include "cuda/product/window_order.h"
#include "layers/layer.h"

namespace maml::cuda {

/// Division of 0 <= x < 2^31 by a constant d (1 where d = 0): x ceil(2^(31 + l) / d) >> (31 + l), 2^l >= d.
struct Divisor {
  uint32_t divisor = 1, multiplier = 1u << 31, shift = 31;

  Divisor() = default;
  explicit constexpr Divisor(int64_t d) : divisor(static_cast<uint32_t>(d > 0 ? d : 1)) {
    while ((uint64_t{1} << (shift - 31)) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ int quotient(int x) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * multiplier >> shift);
  }
  __device__ __forceinline__ int remainder(int x, int quotient) const {
    return x - quotient * static_cast<int>(divisor);
  }
};

/// One side's part of an element's place: an offset, and row * 2^16 + column, so that one addition adds up
/// both.
struct Place {
  int offset, at;
};

/// Rows and columns of an image that fit a Place, with room for padding and taps around them.
inline constexpr int64_t kMostSide = 16000;

/// A part that makes every sum fall outside: far enough above, and twice as far still no overflow.
__device__ __forceinline__ Place nowhere() { return {0, -(1 << 30)}; }

/// An element: its offset, and whether there is one; else it is zero.
struct Element {
  int offset;
  bool inside;
};

/// The part of an offset that has no element: negative whatever is added, and a multiple of every vector, for
/// a copy that brings zeros must have an aligned address, too.
inline constexpr int kNoOffset = -(1 << 30);

/// Sizes of one task's tensors fit 32 bits (conv2d_footprint sees to it).
constexpr int int32(int64_t size) { return static_cast<int>(size); }

/// The positions of an image that an operand is read at, and the taps around each.
struct Gather {
  int h, w, c;  // the image
  int columns, stride_h, stride_w, origin_h, origin_w;
  int pixels, depth;  // samples * positions; taps * c
  uint32_t beyond;    // 2^15 less the height, 2^15 less the width
  // Pixels by 2 x 2 windows (window_order.h): how many windows there are; 0: row by row.
  int windows = 0, vector = 0, step_h = 0, step_w = 0;
  Divisor by_positions, by_columns, by_channels, by_taps_w;

  Gather() = default;
  Gather(int64_t samples, const Image& image, int64_t rows, int64_t columns_, int64_t stride_h_,
         int64_t stride_w_, int64_t origin_h_, int64_t origin_w_, int64_t taps_h, int64_t taps_w_)
      : h(int32(image.h)),
        w(int32(image.w)),
        c(int32(image.c)),
        columns(int32(columns_)),
        stride_h(int32(stride_h_)),
        stride_w(int32(stride_w_)),
        origin_h(int32(origin_h_)),
        origin_w(int32(origin_w_)),
        pixels(int32(samples * rows * columns_)),
        depth(int32(taps_h * taps_w_ * image.c)),
        beyond(static_cast<uint32_t>((0x8000 - image.h) << 16 | (0x8000 - image.w))),
        by_positions(rows * columns_),
        by_columns(columns_),
        by_channels(image.c),
        by_taps_w(taps_w_) {}

  __device__ __forceinline__ Place pixel(int p) const {
    if (p >= pixels) return nowhere();
    int member = 0;
    if (windows > 0) {
      const WindowRow row = window_row(vector, p);
      if (row.window >= windows) return nowhere();
      p = row.window, member = row.member;
    }
    const int sample = by_positions.quotient(p), q = by_positions.remainder(p, sample);
    const int u = by_columns.quotient(q), v = by_columns.remainder(q, u);
    const int i = u * stride_h + origin_h + (member >> 1) * step_h;
    const int j = v * stride_w + origin_w + (member & 1) * step_w;
    return {((sample * h + i) * w + j) * c, i * 65536 + j};
  }
  __device__ __forceinline__ Place tap(int k) const {
    if (k >= depth) return nowhere();
    const int t = by_channels.quotient(k), channel = by_channels.remainder(k, t);
    const int r = by_taps_w.quotient(t), s = by_taps_w.remainder(t, r);
    return {(r * w + s) * c + channel, r * 65536 + s};
  }
  /// Row and column are both inside if neither they nor they plus `beyond` set the high bit of their half.
  __device__ __forceinline__ Element element(const Place& a, const Place& b) const {
    const uint32_t at = static_cast<uint32_t>(a.at) + static_cast<uint32_t>(b.at);
    return {a.offset + b.offset, ((at | (at + beyond)) & 0x80008000u) == 0};
  }
};

/// A[pixel, k], contiguous in k.
struct PixelsByTaps {
  static constexpr bool kAlongK = true;
  using Outer = Place;
  using Inner = Place;
  Gather gather;
  __device__ __forceinline__ Place outer(int m) const { return gather.pixel(m); }
  __device__ __forceinline__ Place inner(int k) const { return gather.tap(k); }
  __device__ __forceinline__ Element element(const Place& a, const Place& b) const {
    return gather.element(a, b);
  }
};

/// A[(tap, channel), pixel], contiguous in its outer index.
struct TapsByPixels {
  static constexpr bool kAlongK = false;
  using Outer = Place;
  using Inner = Place;
  Gather gather;
  __device__ __forceinline__ Place outer(int m) const { return gather.tap(m); }
  __device__ __forceinline__ Place inner(int k) const { return gather.pixel(k); }
  __device__ __forceinline__ Element element(const Place& a, const Place& b) const {
    return gather.element(a, b);
  }
};

/// B[k, n] of a matrix [depth, n].
struct Rows {
  static constexpr bool kAlongK = false;
  using Outer = int;
  using Inner = int;
  int depth, n;
  __device__ __forceinline__ int outer(int j) const { return j < n ? j : kNoOffset; }
  __device__ __forceinline__ int inner(int k) const { return k < depth ? k * n : kNoOffset; }
  __device__ __forceinline__ Element element(int a, int b) const { return {a + b, (a | b) >= 0}; }
};

/// B[(tap, o), n] of weights [tap, n, o]: tap (r, s) of a class stands at first - r row - s column elements.
struct Taps {
  static constexpr bool kAlongK = true;
  using Outer = int;
  using Inner = int;
  int n, o, depth;
  int first, row, column;
  Divisor by_o, by_taps_w;
  __device__ __forceinline__ int outer(int j) const { return j < n ? j * o : kNoOffset; }
  __device__ __forceinline__ int inner(int k) const {
    if (k >= depth) return kNoOffset;
    const int t = by_o.quotient(k), channel = by_o.remainder(k, t);
    const int r = by_taps_w.quotient(t), s = by_taps_w.remainder(t, r);
    return first - r * row - s * column + channel;
  }
  __device__ __forceinline__ Element element(int a, int b) const { return {a + b, (a | b) >= 0}; }
};

}  // namespace maml::cuda
