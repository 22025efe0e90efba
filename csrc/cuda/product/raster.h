// Images as rows of positions, for convolutions by matrix instructions of a warpgroup (wgmma.h).
//
// All images of a task stand one behind the other in a raster of rows x columns positions a sample, which has
// a gap right of each image and one below it. A tap of a convolution then is one distance between positions,
// the same for all pixels: what a pixel at the edge reads outside its image is in a gap, and gaps hold zeros.
// So a block copies each pixel of a tile to shared memory once, and all taps read the same copy, each from
// another start. A stride is taken apart into planes: the pixels that one tap reads with stride 2 are every
// second one, from the first or from the second.
//
// Copies are rounded to bf16, or split into two of them, x = hi + lo. In shared memory (wgmma.h)
//
//   [part, chunk of 8 channels, position]   16 bytes each
//
// A core matrix is 8 consecutive positions of a chunk, wherever it starts. Read along k it is a matrix
// [position, channel]; read along MN, the sum of a product runs over the positions.
#pragma once

#include "cuda/product/arithmetic.h"
#include "cuda/product/gather.h"
#include "cuda/product/wgmma.h"

namespace maml::cuda {

struct Raster {
  int columns = 1, positions = 0;  // positions: of all samples
  Divisor by_sample, by_columns;

  Raster() = default;
  Raster(int64_t samples, int64_t rows, int64_t columns_)
      : columns(int32(columns_)),
        positions(int32(samples * rows * columns_)),
        by_sample(rows * columns_),
        by_columns(columns_) {}
};

/// The pixels of an image that stand in a raster: position (u, v) of a sample is row u step_h + first_h and
/// column v step_w + first_w.
struct Plane {
  int h, w, step_h, step_w, first_h, first_w;

  struct Pixel {
    int index, sample;  // index: among the pixels of all samples, -1 in a gap
  };
  __device__ __forceinline__ Pixel pixel(const Raster& raster, int q) const {
    if (q < 0 || q >= raster.positions) return {-1, 0};
    const int sample = raster.by_sample.quotient(q), p = raster.by_sample.remainder(q, sample);
    const int u = raster.by_columns.quotient(p), v = raster.by_columns.remainder(p, u);
    const int i = u * step_h + first_h, j = v * step_w + first_w;
    return {i < h && j < w ? (sample * h + i) * w + j : -1, sample};
  }
};

/// The distance in positions from one chunk of channels to the next: at least `positions`. Threads store
/// `chunks` chunks of a position, then those of the next; eight neighbours cover the 32 banks.
__host__ __device__ constexpr int chunk_distance(int positions, int chunks) {
  return (positions + 7) / 8 * 8 + 8 / chunks;
}

inline constexpr int kChannels = 8;  // of a chunk
inline constexpr int kChunkBytes = 16;

/// Rounds eight numbers to bf16; with two parts, `low` is what is left of them.
template <int Parts>
__device__ __forceinline__ void split(const Vector<float> (&from)[2], Chunk& high, Chunk& low) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float first = from[i / 2].element[i % 2 * 2], second = from[i / 2].element[i % 2 * 2 + 1];
    high.word[i] = to_bf16(first, second);
    if constexpr (Parts == 2)
      low.word[i] = to_bf16(first - low_half(high.word[i]), second - high_half(high.word[i]));
  }
}

/// Copies `count` rows of 8 `Chunks` channels to shared memory, by the first `Threads` threads of the block.
/// row_of(i): where row i starts in `from`, negative for zeros (then another row is read). place_of(i,
/// chunk): the offset of its chunk. `low`: the distance from a chunk to its second part. see(values) gets all
/// numbers of chunk thread % Chunks.
template <int Parts, int Chunks, int Threads, class RowOf, class PlaceOf, class See>
__device__ __forceinline__ void fill_split(int count, const float* from, unsigned char* to, int low,
                                           RowOf row_of, PlaceOf place_of, See see) {
  static_assert(Threads % Chunks == 0);
  constexpr int kAtOnce = 2;
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % Chunks;
#pragma unroll 1
  for (int first = thread / Chunks; first < count; first += kAtOnce * (Threads / Chunks)) {
    Vector<float> values[kAtOnce][2];
#pragma unroll
    for (int a = 0; a < kAtOnce; ++a) {
      const int i = first + a * (Threads / Chunks);
      const int row = i < count ? row_of(i) : -1;
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        values[a][v] = reinterpret_cast<const Vector<float>*>(from + (row < 0 ? 0 : row))[2 * chunk + v];
        if (row < 0) values[a][v] = {};
      }
    }
#pragma unroll
    for (int a = 0; a < kAtOnce; ++a) {
      const int i = first + a * (Threads / Chunks);
      if (i >= count) break;
      see(values[a]);
      Chunk high, rest;
      split<Parts>(values[a], high, rest);
      unsigned char* const place = to + place_of(i, chunk);
      *reinterpret_cast<Chunk*>(place) = high;
      if constexpr (Parts == 2) *reinterpret_cast<Chunk*>(place + low) = rest;
    }
  }
}

/// The copy of some positions of a plane.
struct PositionTile {
  unsigned char* start;
  int distance;  // chunk_distance

  /// Fills it with channels [channel, channel + 8 Chunks) of c, of positions [q, q + count).
  template <int Parts, int Chunks, int Threads, class See>
  __device__ __forceinline__ void fill(const Raster& raster, const Plane& plane, const float* source, int c,
                                       int channel, int q, int count, See see) const {
    fill_split<Parts, Chunks, Threads>(
        count, source + channel, start, Chunks * distance * kChunkBytes,
        [&](int i) {
          const int pixel = plane.pixel(raster, q + i).index;
          return pixel < 0 ? -1 : pixel * c;
        },
        [&](int i, int chunk) { return (chunk * distance + i) * kChunkBytes; }, see);
  }
  /// As a matrix [position, channel] from some position and chunk on; its second part is `Chunks` chunks on.
  __device__ __forceinline__ uint64_t along_k(int position, int chunk) const {
    return matrix_descriptor(start + (chunk * distance + position) * kChunkBytes, distance * kChunkBytes,
                             8 * kChunkBytes);
  }
  /// As the transposed matrix.
  __device__ __forceinline__ uint64_t along_mn(int position, int chunk) const {
    return matrix_descriptor(start + (chunk * distance + position) * kChunkBytes, 8 * kChunkBytes,
                             distance * kChunkBytes);
  }
};

}  // namespace maml::cuda
