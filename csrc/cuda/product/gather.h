// The operands of a convolution's products: where each element stands in memory.
//
// An operand has an outer index (m of A, n of B) and the inner index k. The offset of an element is the sum
// of one part that depends on the outer index and one that depends on k:
//
//   Gathered    an image [sample, h, w, c] that is read at (pixel, tap and channel). Pixel p is (sample, u,
// v),
//               at row u stride_h + origin_h and column v stride_w + origin_w; tap (r, s) adds (r, s). Zero
//               where that is outside the image. Either of the two may be the outer index.
//   Rows        a matrix [k, n], contiguous in n
//   Taps        weights [tap, n, o] for the input gradient: k = (tap of a parity class, last first; o)
//
// A thread that fills a tile therefore keeps its outer parts in registers and computes one part in k for each
// stage. Integer divisions are multiplications (Divisor). Offsets are 32-bit: a task's tensor has fewer than
// 2^31 elements.
#pragma once

#include <cstdint>

#include "cuda/product/window_order.h"
#include "layers/layer.h"

namespace maml::cuda {

/// Division of 0 <= x < 2^31 by a constant d (d = 0 counts as 1): x ceil(2^(31 + l) / d) >> (31 + l), with
/// the smallest l for which 2^l >= d.
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

/// One part of an element's position: an offset in memory, and row * 2^16 + column in the image, so that one
/// addition adds up both coordinates.
struct Place {
  int offset, at;
};

/// The most rows and columns of an image that fit a Place, with room for padding and taps around them.
inline constexpr int64_t kMostSide = 16000;

/// A part whose sum with any other is outside the image. Twice the value does not overflow either.
__device__ __forceinline__ Place nowhere() { return {0, -(1 << 30)}; }

/// What a lane of the warp holds; called by all lanes together.
__device__ __forceinline__ int from_lane(int mine, int lane) { return __shfl_sync(~0u, mine, lane); }
__device__ __forceinline__ Place from_lane(const Place& mine, int lane) {
  return {from_lane(mine.offset, lane), from_lane(mine.at, lane)};
}

/// The offset of an element. Where not `inside`, there is no element, and its value is zero.
struct Element {
  int offset;
  bool inside;
};

/// The part of an offset where there is no element: the sum with any other part is negative. It is a multiple
/// of every vector, because even a copy that only writes zeros needs an aligned address.
inline constexpr int kNoOffset = -(1 << 30);

/// A size of one task's tensors, as 32 bits; conv2d_footprint checks that it fits.
constexpr int int32(int64_t size) { return static_cast<int>(size); }

/// Which positions of an image an operand reads, and which taps around each.
struct PatchGather {
  int h, w, c;  // the image
  int columns, stride_h, stride_w, origin_h, origin_w;
  int pixels, depth;  // samples * positions; taps * c
  uint32_t beyond;    // (2^15 - height) * 2^16 + (2^15 - width)
  // How many 2 x 2 windows there are where pixels come by windows (window_order.h); 0: pixels come row by
  // row.
  int windows = 0, vector = 0, step_h = 0, step_w = 0;
  Divisor by_positions, by_columns, by_channels, by_taps_w;

  PatchGather() = default;
  PatchGather(int64_t samples, const Image& image, int64_t rows, int64_t columns_, int64_t stride_h_,
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
  /// Row and column are inside the image if the high bit of their half is clear both in `at` and in at +
  /// beyond.
  __device__ __forceinline__ Element element(const Place& a, const Place& b) const {
    const uint32_t at = static_cast<uint32_t>(a.at) + static_cast<uint32_t>(b.at);
    return {a.offset + b.offset, ((at | (at + beyond)) & 0x80008000u) == 0};
  }
};

/// A[pixel, (tap, channel)], contiguous in k.
struct PixelsByTaps {
  static constexpr bool kAlongK = true;
  using Outer = Place;
  using Inner = Place;
  PatchGather gather;
  __device__ __forceinline__ Place outer(int m) const { return gather.pixel(m); }
  __device__ __forceinline__ Place inner(int k) const { return gather.tap(k); }
  __device__ __forceinline__ Element element(const Place& a, const Place& b) const {
    return gather.element(a, b);
  }
};

/// A[(tap, channel), pixel], contiguous in the outer index.
struct TapsByPixels {
  static constexpr bool kAlongK = false;
  using Outer = Place;
  using Inner = Place;
  PatchGather gather;
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

/// B[(tap, o), n] of weights [tap, n, o]: tap (r, s) of a parity class starts at offset first - r row - s
/// column.
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
