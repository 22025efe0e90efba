// The blocks of conv2d_raster_gradients.cu: what one block of either gradient computes.
#pragma once

#include <algorithm>

#include "cuda/conv2d.h"
#include "cuda/product/raster.h"
#include "cuda/product/split.h"
#include "cuda/run/last_block.h"
#include "cuda/sum_cotangents.h"

namespace maml::cuda {

inline constexpr int kTaps = 3, kWarpgroups = 3, kBlock = 128 * kWarpgroups;
inline constexpr int kRowsOfBlock = 64 * kWarpgroups;
inline constexpr int kStageChannels = 32,
                     kStageChunks = kStageChannels / kChannels;  // of k, in an input gradient
inline constexpr int kMostRasterClasses = 4;                     // strides up to 2 x 2

template <class Arithmetic>
inline constexpr int kParts = std::is_same_v<Arithmetic, Bf16x3> ? 2 : 1;

/// The positions of a stage of the weight gradient, with tiles of so many channels.
inline constexpr int depth_of(int64_t channels) { return kSmallTiles ? 32 : channels == 32 ? 256 : 128; }

/// The shapes of one instantiation.
template <class Arithmetic, int Channels>
struct RasterProduct {
  static constexpr int C = Channels, kParts = cuda::kParts<Arithmetic>, kChunks = C / kChannels;
  static constexpr bool kStacked = C == 32 && kParts == 2;  // hi and lo are one matrix of 64
  static constexpr int kSums = kStacked || C == 64 ? 32 : 16;
  static constexpr int kDepth = depth_of(C);
  /// Of B [k, n] of an input gradient: from one chunk of k to the next, for each tap and chunk n of all
  /// parts.
  static constexpr int kChunkOfWeights = (kParts * C + 2) * kChunkBytes;
  static constexpr int kTapOfWeights = kStageChunks * kChunkOfWeights;
};

/// The tile of an input gradient, as sum_cotangents.h sees it.
template <int Channels>
struct RasterTile {
  static constexpr int kM = kRowsOfBlock, kN = Channels, kThreads = kBlock;
};

struct RasterClass {
  Plane to;  // where its positions are in grad_x
  int taps;  // each reads grad_y so many positions from its own, and the weights at an offset
  int shift[kTaps * kTaps], weights[kTaps * kTaps];
  int lowest, count;  // the positions of grad_y that a tile reads: from its first + lowest on
  Split split;        // tiles along m; k is not split
  int first_block, first_entry, first_folded;
};

struct RasterInput {
  RasterClass classes[kMostRasterClasses];
  int count;
  Terms<float> terms;
  float* grad_x;
  bool add;
  SumOfTiles<float> sums;
};

/// A block's class, and its tile of that.
struct InputTile {
  int own = 0, m, n;
  __device__ __forceinline__ InputTile(const RasterInput& p, int block) {
    while (own + 1 < p.count && block >= p.classes[own + 1].first_block) ++own;
    const RasterClass& c = p.classes[own];
    n = (block - c.first_block) / c.split.tiles_m;
    m = block - c.first_block - n * c.split.tiles_m;
  }
};

struct RasterWeight {
  Terms<float> terms;
  int first_row[kTaps],
      row_shift[kTaps];            // of the plane of x that a row of taps reads; in rows of the raster
  int plane[kTaps], shift[kTaps];  // of a column of taps
  int planes, first_column[2], lowest[2];  // of the planes, and their lowest shifts
  int tiles_in, tiles, parts, depth;
  float *grad_w, *grad_b, *memory, *bias_memory;
  bool add_w, add_b;
};

struct RasterGradients {
  Raster raster;
  Plane x, y;  // x: its first row and column are those of a tap
  int c_in, c_out;
  RasterWeight weight;
  RasterInput input;
  int weight_blocks;
};
static_assert(sizeof(RasterGradients) <= 4000);

/// Where a thread's sums are in the 64 rows of a warpgroup: value i is in row(i), column(i).
struct Fragment {
  int row0, column0;
  __device__ __forceinline__ Fragment() {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    row0 = thread / 32 * 16 + thread % 32 / 4, column0 = thread % 4 * 2;
  }
};

__device__ __forceinline__ void put_pair(float* to, float first, float second, bool add) {
  struct alignas(8) Pair {
    float first, second;
  };
  auto* const pair = reinterpret_cast<Pair*>(to);
  const Pair before = add ? *pair : Pair{0, 0};
  *pair = {before.first + first, before.second + second};
}

/// d += the product of some 64 rows of `a` and the weights of one tap, over one stage of channels.
template <class S>
__device__ __forceinline__ void multiply_tap(float (&d)[S::kSums], const PositionTile& a, int position,
                                             const unsigned char* weights) {
  begin_products();
#pragma unroll
  for (int chunk = 0; chunk < kStageChunks; chunk += 2) {
    const uint64_t high = a.along_k(position, chunk);
    const uint64_t b =
        matrix_descriptor(weights + chunk * S::kChunkOfWeights, S::kChunkOfWeights, 8 * kChunkBytes);
    if constexpr (S::kParts == 2) {
      const uint64_t low = a.along_k(position, kStageChunks + chunk);
      if constexpr (S::kStacked) {
        wgmma<Along::k, Along::k>(reinterpret_cast<float (&)[16]>(d), low, b);
      } else {
        wgmma<Along::k, Along::k>(d, low, b);
        wgmma<Along::k, Along::k>(d, high, later(b, S::C * kChunkBytes));
      }
    }
    wgmma<Along::k, Along::k>(d, high, b);
  }
  commit_products();
}

template <class S>
__device__ __forceinline__ void input_block(const RasterGradients& all, const Memory& memory, int64_t task,
                                            int block) {
  const RasterInput& p = all.input;
  const InputTile tile(p, block);
  const RasterClass& c = p.classes[tile.own];
  const int q0 = tile.m * kRowsOfBlock, n0 = tile.n * S::C;
  const int group = static_cast<int>(threadIdx.x) / 128;
  const PositionTile a{dynamic_shared(), chunk_distance(c.count, kStageChunks)};
  unsigned char* const weights = a.start + S::kParts * kStageChunks * a.distance * kChunkBytes;

  float d[S::kSums] = {};
#pragma unroll 1
  for (int term = 0; term < p.terms.count; ++term) {
    const float* const g = resolve(p.terms.a[term], memory, task);
    const float* const w = resolve(p.terms.b[term], memory, task);
#pragma unroll 1
    for (int channel = 0; channel < all.c_out; channel += kStageChannels) {
      a.fill<S::kParts, kStageChunks, kBlock>(all.raster, all.y, g, all.c_out, channel, q0 + c.lowest,
                                              c.count, [](const auto&) {});
      fill_split<S::kParts, kStageChunks, kBlock>(
          c.taps * S::C, w + channel, weights, S::C * kChunkBytes,
          [&](int i) {
            const int tap = i / S::C, n = i % S::C;
            return c.weights[tap] + (n0 + n) * all.c_out;
          },
          [&](int i, int chunk) {
            return i / S::C * S::kTapOfWeights + chunk * S::kChunkOfWeights + i % S::C * kChunkBytes;
          },
          [](const auto&) {});
      publish_shared();
      __syncthreads();
#pragma unroll 1
      for (int tap = 0; tap < c.taps; ++tap)
        multiply_tap<S>(d, a, c.shift[tap] - c.lowest + 64 * group, weights + tap * S::kTapOfWeights);
      wait_products<0>(d);
      __syncthreads();  // the copies may be overwritten
    }
  }

  float* const grad_x = resolve(p.grad_x, memory, task);
  const Fragment at;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int pixel = c.to.pixel(all.raster, q0 + 64 * group + at.row0 + 8 * half).index;
    if (pixel < 0) continue;
    float* const row = grad_x + static_cast<int64_t>(pixel) * all.c_in + n0 + at.column0;
#pragma unroll
    for (int j = 0; j < S::C / 8; ++j) {
      float pair[2] = {d[4 * j + 2 * half], d[4 * j + 2 * half + 1]};
      if constexpr (S::kStacked) pair[0] += d[16 + 4 * j + 2 * half], pair[1] += d[17 + 4 * j + 2 * half];
      put_pair(row + 8 * j, pair[0], pair[1], p.add);
    }
  }
}

/// The sums of what input_block has written, in pairs of channels: those of four need more registers than
/// there are.
template <class S>
[[gnu::noinline]] __device__ void sum_tile(const RasterGradients& all, const Memory& memory) {
  const RasterInput& p = all.input;
  const InputTile tile(p, static_cast<int>(blockIdx.x) - all.weight_blocks);
  const RasterClass& c = p.classes[tile.own];
  const SummedTile summed{tile.m,   c.split.tiles_m, tile.n * S::C,
                          all.c_in, c.first_entry,   tile.n * p.sums.folded + c.first_folded};
  TileOfCotangents<RasterTile<S::C>, float, 2>(p.sums, summed, memory, blockIdx.z)
      .sum(resolve(p.grad_x, memory, blockIdx.z), [&](int m) {
        const Plane::Pixel pixel = c.to.pixel(all.raster, m);
        return RowOfSample{pixel.index, pixel.sample};
      });
}

/// The product of one stage: of all positions of a stage, for the tap of this warpgroup.
template <class S>
__device__ __forceinline__ void multiply_positions(float (&d)[S::kSums], const PositionTile& x, int position,
                                                   const PositionTile& g) {
#pragma unroll 2
  for (int k = 0; k < S::kDepth; k += 16) {
    begin_products();
    const uint64_t x_high = x.along_mn(position + k, 0), g_high = g.along_mn(k, 0);
    if constexpr (S::kParts == 2 && !S::kStacked) {
      wgmma<Along::mn, Along::mn>(d, x.along_mn(position + k, S::kChunks), g_high);
      wgmma<Along::mn, Along::mn>(d, x_high, g.along_mn(k, S::kChunks));
    }
    wgmma<Along::mn, Along::mn>(d, x_high, g_high);
    commit_products();
  }
}

template <class S>
__device__ __forceinline__ void weight_block(const RasterGradients& all, const Memory& memory, int64_t task,
                                             int block) {
  const RasterWeight& p = all.weight;
  const int tile = block / p.parts, part = block - tile * p.parts;
  const int tap_row = tile % kTaps, tile_in = tile / kTaps % p.tiles_in, tile_out = tile / kTaps / p.tiles_in;
  const int m0 = tile_in * S::C, n0 = tile_out * S::C;
  const int begin = part * p.depth, end = std::min(begin + p.depth, all.raster.positions);
  const int thread = static_cast<int>(threadIdx.x), group = thread / 128, own = thread % 128;
  const int row_shift = p.row_shift[tap_row] * all.raster.columns;
  constexpr int kCount = S::kDepth + kTaps - 1, kDistance = chunk_distance(kCount, S::kChunks);
  constexpr int kDistanceOfG = chunk_distance(S::kDepth, S::kChunks);
  constexpr int kBytesOfX = S::kParts * S::kChunks * kDistance * kChunkBytes;
  const PositionTile g{dynamic_shared(), kDistanceOfG};
  unsigned char* const planes = g.start + S::kParts * S::kChunks * kDistanceOfG * kChunkBytes;
  const int plane = p.plane[group];
  const PositionTile x{planes + plane * kBytesOfX, kDistance};

  const bool sums_rows = p.grad_b && tap_row == 0 && tile_in == 0;
  float of_channel[kChannels] = {};
  float d[S::kSums] = {};
#pragma unroll 1
  for (int term = 0; term < p.terms.count; ++term) {
    const float* const from_x = resolve(p.terms.a[term], memory, task);
    const float* const from_g = resolve(p.terms.b[term], memory, task);
    const bool sees = sums_rows && term == 0;
#pragma unroll 1
    for (int q = begin; q < end; q += S::kDepth) {
      g.fill<S::kParts, S::kChunks, kBlock>(all.raster, all.y, from_g, all.c_out, n0, q, S::kDepth,
                                            [&](const Vector<float>(&values)[2]) {
                                              if (!sees) return;
#pragma unroll
                                              for (int e = 0; e < kChannels; ++e)
                                                of_channel[e] += values[e / 4].element[e % 4];
                                            });
#pragma unroll 1
      for (int i = 0; i < p.planes; ++i) {
        Plane of_x = all.x;
        of_x.first_h = p.first_row[tap_row], of_x.first_w = p.first_column[i];
        const PositionTile to{planes + i * kBytesOfX, kDistance};
        to.fill<S::kParts, S::kChunks, kBlock>(all.raster, of_x, from_x, all.c_in, m0,
                                               q + row_shift + p.lowest[i], kCount, [](const auto&) {});
      }
      publish_shared();
      __syncthreads();
      multiply_positions<S>(d, x, p.shift[group] - p.lowest[plane], g);
      wait_products<0>(d);
      __syncthreads();
    }
  }

  // The owners of the sums: those of 32 rows, or all.
  constexpr int kOwners = S::C == 32 ? 64 : 128, kValues = S::C / 2, kElements = kTaps * S::C * S::C;
  static_assert(kValues % 4 == 0 && kValues * kOwners == S::C * S::C);
  auto* const shared = reinterpret_cast<float*>(dynamic_shared());
  float values[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = d[i];
  if constexpr (S::kStacked) {  // hi lo is in the same rows, lo hi in the other ones
    float* const exchanged = shared + group * kOwners * kValues + own % kOwners;
    if (own >= kOwners) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) exchanged[i * kOwners] = d[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] += d[i + 16] + exchanged[i * kOwners];
    __syncthreads();
  }
  const bool owner = own < kOwners;

  float of_column = 0;  // the sum of grad_y of one column
  const bool has_column = sums_rows && thread < S::C;
  if (sums_rows) {
#pragma unroll
    for (int e = 0; e < kChannels; ++e) shared[thread * kChannels + e] = of_channel[e];
    __syncthreads();
    if (has_column) {
      for (int i = 0; i < kBlock * kChannels; i += S::C) of_column += shared[i + thread];
    }
  }

  if (p.parts > 1) {
    float* const parts = resolve(p.memory, memory, task);
    float* const bias_parts = resolve(p.bias_memory, memory, task) + tile_out * p.parts * S::C;
    auto of_part = [&](int which) {
      return reinterpret_cast<Vector<float>*>(parts + (tile * p.parts + which) * kElements) +
             group * (kValues / 4) * kOwners + own;
    };
    if (owner) {
#pragma unroll
      for (int i = 0; i < kValues / 4; ++i) {
        of_part(part)[i * kOwners] = {values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]};
      }
    }
    if (has_column) bias_parts[part * S::C + thread] = of_column;
    if (!last_to_arrive(memory.counters_of(task) + tile, static_cast<unsigned>(p.parts))) return;
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = 0;
#pragma unroll 1
    for (int which = 0; owner && which < p.parts; ++which) {
#pragma unroll
      for (int i = 0; i < kValues / 4; ++i) {
        const Vector<float> v = of_part(which)[i * kOwners];
#pragma unroll
        for (int e = 0; e < 4; ++e) values[4 * i + e] += v.element[e];
      }
    }
    of_column = 0;
    for (int which = 0; has_column && which < p.parts; ++which)
      of_column += bias_parts[which * S::C + thread];
  }

  if (has_column) {
    float* const to = resolve(p.grad_b, memory, task) + n0 + thread;
    *to = p.add_b ? *to + of_column : of_column;
  }
  if (!owner) return;
  const Fragment at;
  const int tap = tap_row * kTaps + group;
  float* const to = resolve(p.grad_w, memory, task) + n0 + at.column0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* const row = to + (tap * all.c_in + m0 + at.row0 + 8 * half) * all.c_out;
#pragma unroll
    for (int j = 0; j < S::C / 8; ++j)
      put_pair(row + 8 * j, values[4 * j + 2 * half], values[4 * j + 2 * half + 1], p.add_w);
  }
}

}  // namespace maml::cuda
