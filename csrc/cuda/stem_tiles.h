// The image of a stem in shared memory, and its patches there.
//
// A tile is tile_h x tile_w outputs of one sample. With a pool an output stands for the 2 x 2 pixels of its
// window. The block copies the rectangle of the image that the patches of these pixels cover, zeros outside
// the image, once; element k of a pixel's patch is then tile[row[pixel] + tap[k]]. Both offsets come from
// tables, because they are the same for every tile.
//
// The user's images, [c, h, w], are copied as they are: the tile then has a plane for each channel. Others
// are one plane, whose rows [w, c] are contiguous.
//
// Where a row of a plane is a whole number of 16-byte vectors, so is its copy: a
// tile then starts at the vector that contains its first element, `skew` elements earlier. Other images are
// copied element by element. If the stride is larger than the kernel, the pixels between two patches are left
// out; tile rows `cell_h` apart, and elements `cell_w` apart, belong to neighbouring pixels.
#pragma once

#include <algorithm>

#include "cuda/conv2d.h"
#include "cuda/product/copy_async.h"
#include "layers/patch_moments.h"

namespace maml::cuda {

inline constexpr int kStemRows = kSmallTiles ? 32 : 128;  // pixels of a tile
inline constexpr int kStemColumns = 32;                   // channels of a block
inline constexpr int kStemPatch = 32;                     // elements of a patch, rounded up to whole slabs
static_assert(kMostPatch <= kStemPatch && kStemPatch <= kStemRows);

/// Whether an image is the user's, [c, h, w].
inline bool is_planar(const void* symbolic) {
  const auto region = static_cast<Region>(reinterpret_cast<uint64_t>(symbolic) >> kRegionShift);
  return region == Region::x_support || region == Region::x_query;
}

struct StemTiles {
  int h, row, out_h, out_w;  // a plane of the image: rows, elements of a row; the outputs
  int planes;
  int tile_h, tile_w, across, tiles;         // tiles in a row of tiles, and of all samples
  int pool, vector;                          // pool: 2 or 1; vector: elements of T in 16 bytes
  int stride_h, stride_w, first_h, first_w;  // w counts elements: of a pixel's step; of the first patch
  int cell_h, cell_w, rows, pitch;           // in the tile
  int patch;
  bool aligned;  // rows of the image are whole vectors
  Divisor by_tile, by_sample, by_across, by_pieces, by_rows, by_cell_h, by_cell_w;
  int tap[kStemPatch];

  StemTiles() = default;
  /// `planar`: the image has a plane for each channel.
  StemTiles(const Layer& l, int vector_, bool planar) : planes(planar ? int32(l.in.c) : 1), vector(vector_) {
    const Window& k = l.window;
    const int c = int32(l.in.c) / planes;  // channels of a plane
    h = int32(l.in.h), row = int32(l.in.w) * c;
    out_h = int32(l.out.h), out_w = int32(l.out.w);
    pool = l.pooled ? 2 : 1;
    stride_h = int32(k.stride_h), stride_w = int32(k.stride_w) * c;
    first_h = -int32(k.pad_top), first_w = -int32(k.pad_left) * c;
    cell_h = std::min(stride_h, int32(k.kernel_h)), cell_w = std::min(stride_w, int32(k.kernel_w) * c);
    patch = int32(patch_size(k, l.in));
    aligned = row % vector == 0 && cell_w == stride_w;
    choose(int32(k.kernel_h), int32(k.kernel_w) * c);
    across = (out_w + tile_w - 1) / tile_w;
    const int a_sample = across * ((out_h + tile_h - 1) / tile_h);
    tiles = int32(l.n) * a_sample;
    by_tile = Divisor(tile_w), by_sample = Divisor(a_sample), by_across = Divisor(across);
    by_pieces = Divisor(pitch / vector), by_rows = Divisor(rows);
    by_cell_h = Divisor(cell_h), by_cell_w = Divisor(cell_w);
    for (int e = 0; e < kStemPatch; ++e) {  // what is beyond the patch has weight zero
      const int at = e < patch ? e : 0, width = int32(k.kernel_w * l.in.c), along = at % width;
      tap[e] = along % planes * rows * pitch + at / width * pitch + along / planes;
    }
  }

  __host__ __device__ int pieces() const { return planes * rows * (pitch / vector); }
  __host__ __device__ int elements() const { return planes * rows * pitch; }
  /// Outputs of a tile.
  __device__ __forceinline__ int outputs() const { return tile_h * tile_w; }

  /// One tile: its sample and its first output.
  struct Tile {
    int sample, i, j;
  };
  __device__ __forceinline__ Tile tile(int number) const {
    const int sample = by_sample.quotient(number), t = by_sample.remainder(number, sample);
    const int down = by_across.quotient(t);
    return {sample, down * tile_h, by_across.remainder(t, down) * tile_w};
  }
  /// Elements between the start of the tile in shared memory and its first patch.
  __device__ __forceinline__ int skew(const Tile& t) const {
    return aligned ? (t.j * pool * stride_w + first_w) & (vector - 1) : 0;
  }
  /// The number of output `at` (row * 2^16 + column, within the tile) among those of all samples; -1 if there
  /// is none.
  __device__ __forceinline__ int output(const Tile& t, int at) const {
    const int i = t.i + (at >> 16), j = t.j + (at & 0xffff);
    return at >= 0 && i < out_h && j < out_w ? (t.sample * out_h + i) * out_w + j : -1;
  }

 private:
  /// The fewest tiles; among these, the smallest.
  void choose(int kernel_h, int kernel_w) {
    const int outputs = kStemRows / (pool * pool);
    int64_t fewest = INT64_MAX;
    int smallest = 0;
    for (int w = std::min(outputs, out_w); w > 0; --w) {
      const int height = std::min(outputs / w, out_h);
      const int64_t count = blocks_for(out_h, height) * blocks_for(out_w, w);
      const int tile_rows = (height * pool - 1) * cell_h + kernel_h;
      const int width = (w * pool - 1) * cell_w + kernel_w + (aligned ? vector - 1 : 0);
      const int tile_pitch = (width + vector - 1) / vector * vector;
      if (count > fewest || (count == fewest && tile_rows * tile_pitch >= smallest)) continue;
      fewest = count, smallest = tile_rows * tile_pitch;
      tile_h = height, tile_w = w, rows = tile_rows, pitch = tile_pitch;
    }
  }
};

/// The tables of a block, in shared memory.
struct alignas(16) StemTables {
  int row[kStemRows];     // of a pixel: where its patch starts in the tile
  int tap[kStemPatch];    // of an element of a patch: its distance from there
  int output[kStemRows];  // of an output: row * 2^16 + column within the tile; -1: there is none
};

/// block[i][j] = tile[a[i] + b[j]], for two parts of the tables that start at multiples of V.
template <class T>
__device__ __forceinline__ void read_block(const T* tile, const int* a, const int* b,
                                           T (&block)[kVector<T>][kVector<T>]) {
  struct alignas(4 * kVector<T>) Offsets {
    int at[kVector<T>];
  };
  const Offsets i = *reinterpret_cast<const Offsets*>(a), j = *reinterpret_cast<const Offsets*>(b);
#pragma unroll
  for (int x = 0; x < kVector<T>; ++x) {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) block[x][e] = tile[i.at[x] + j.at[e]];
  }
}

/// The output and the pixel of its window in row `pixel` of the product; with a pool in window order.
__device__ __forceinline__ WindowRow stem_pixel(const StemTiles& s, int pixel) {
  return s.pool == 2 ? window_row(s.vector, pixel) : WindowRow{pixel, 0};
}

__device__ __forceinline__ void fill_tables(const StemTiles& s, StemTables& tables) {
  for (int p = static_cast<int>(threadIdx.x); p < kStemRows; p += static_cast<int>(blockDim.x)) {
    const auto [output, member] = stem_pixel(s, p);
    const int i = s.by_tile.quotient(output), j = s.by_tile.remainder(output, i);
    const int row = i * s.pool + member / 2, column = j * s.pool + member % 2;
    tables.row[p] = i < s.tile_h ? row * s.cell_h * s.pitch + column * s.cell_w : 0;
    const int own = s.by_tile.quotient(p);
    tables.output[p] = own < s.tile_h ? own << 16 | s.by_tile.remainder(p, own) : -1;
    if (p < kStemPatch) tables.tap[p] = s.tap[p];
  }
}

/// Copies a tile of image x to shared memory, asynchronously.
template <class T>
__device__ __forceinline__ void copy_tile(const StemTiles& s, const StemTiles::Tile& t, const T* x, T* to) {
  constexpr int V = kVector<T>;
  const int skew = s.skew(t), first = t.j * s.pool * s.stride_w + s.first_w - skew;
  const int top = t.i * s.pool * s.stride_h + s.first_h;
  const bool vectors = s.aligned && reinterpret_cast<uint64_t>(x) % 16 == 0;
  for (int piece = static_cast<int>(threadIdx.x); piece < s.pieces(); piece += static_cast<int>(blockDim.x)) {
    const int line = s.by_pieces.quotient(piece), q = s.by_pieces.remainder(piece, line);
    const int plane = s.by_rows.quotient(line), a = s.by_rows.remainder(line, plane);
    const int cell = s.by_cell_h.quotient(a);
    const int r = top + cell * s.stride_h + s.by_cell_h.remainder(a, cell);
    const bool row_inside = static_cast<unsigned>(r) < static_cast<unsigned>(s.h);
    const T* const row =
        x + static_cast<int64_t>(row_inside ? (t.sample * s.planes + plane) * s.h + r : 0) * s.row;
    if (vectors) {
      const int column = first + V * q;
      const bool inside = row_inside && static_cast<unsigned>(column) < static_cast<unsigned>(s.row);
      copy_async<16>(to + V * piece, inside ? row + column : x, inside);
    } else {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int b = V * q + e, along = s.by_cell_w.quotient(b);
        const int column = first + along * s.stride_w + s.by_cell_w.remainder(b, along);
        const bool inside = row_inside && static_cast<unsigned>(column) < static_cast<unsigned>(s.row);
        copy_async<sizeof(T)>(to + V * piece + e, inside ? row + column : x, inside);
      }
    }
  }
}

}  // namespace maml::cuda
