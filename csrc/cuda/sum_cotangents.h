// Adds up the cotangent g that a block has just written, a tile of an input gradient, for the normalisation
// whose output it belongs to (cotangent_sums.h):
//
//   entry [2, c]   sum f' g, sum f' g xh      or of the tangents sum f' g_dot, sum (f' g_dot xh + f' g Rxh)
//
// Where there are many tiles, the last block of each kSummedTiles of a parity class adds up their entries and
// writes them over the first.
//
// Threads: `width` threads cover the columns of a tile in vectors, the others its rows, as in channels.h. g
// is read back from memory, where this block has just written it: so one loop serves every arithmetic.
// Shared memory: two vectors for each thread. Numerics: sums of T; a thread's rows ascending, then a tree
// over the threads; entries in order.
#pragma once

#include <bit>

#include "cuda/affine.h"
#include "cuda/cotangent_sums.h"
#include "cuda/product/statistics_entries.h"
#include "cuda/run/last_block.h"
#include "cuda/vectors.h"

namespace maml::cuda {

inline constexpr int kSummedTiles = kSmallTiles ? 2 : 16;
/// Tiles of all classes up to which each has an entry of its own.
inline constexpr int kMostSummedTiles = kSmallTiles ? 4 : 32;

/// What the blocks of an input gradient know of the sums.
template <class T>
struct SumOfTiles {
  Normalised<T> norm;
  T* entries;  // null: no sums
  int step;    // tiles whose entries become one; 1: each keeps its own
  int folded;  // how many entries that makes of all classes
};

/// A row of g, -1 where there is none, and the sample that it belongs to.
struct RowOfSample {
  int row, sample;
};

/// One block's tile: number `m_tile` of `tiles` along m in its class, columns [n0, n0 + kN) of c.
struct SummedTile {
  int m_tile, tiles, n0, c;
  int first_entry, first_counter;  // of the class, and of these columns
};

/// N: the elements of a vector.
template <class Tile, class T, int N = kVector<T>>
class TileOfCotangents {
  static constexpr int kWidth = Tile::kN / N;
  static constexpr int kRows = static_cast<int>(std::bit_floor(unsigned{Tile::kThreads / kWidth}));
  static constexpr int kUsed = kRows * kWidth;  // threads; any others only wait at barriers
  static constexpr bool kAllUsed = kUsed == Tile::kThreads;
  using Values = Numbers<T, N>;

 public:
  __device__ __forceinline__ TileOfCotangents(const SumOfTiles<T>& p, const SummedTile& tile,
                                              const Memory& memory, int64_t task)
      : p_(p),
        tile_(tile),
        memory_(memory),
        task_(task),
        row_(static_cast<int>(threadIdx.x) / kWidth),
        channel_(tile.n0 + static_cast<int>(threadIdx.x) % kWidth * N),
        exists_(channel_ < tile.c && (kAllUsed || row_ < kRows)),
        entries_(resolve(p.entries, memory, task)) {
    if (!exists_) channel_ = 0;
  }

  /// All threads of the block call, after they have written g. place_of(m): a RowOfSample.
  template <class PlaceOf>
  __device__ __forceinline__ void sum(const T* g, PlaceOf place_of) {
    __syncthreads();  // g is written
    Values sums[2] = {T(0), T(0)};
    if (exists_) add_rows(g, place_of, sums);
    add_threads(sums);
    const int entry = tile_.first_entry + tile_.m_tile;
    if (p_.step == 1) return write(entry, sums);
    write(entry, sums);
    const int own = tile_.m_tile / p_.step, first = own * p_.step;
    const int count = tile_.tiles - first < p_.step ? tile_.tiles - first : p_.step;
    unsigned* const counter = memory_.counters_of(task_) + kFirstFoldCounter + tile_.first_counter + own;
    if (!last_to_arrive(counter, static_cast<unsigned>(count))) return;
    for (Values& sum : sums) sum = T(0);
    if (exists_) {
      for (int k = row_; k < count; k += kRows) {
        const T* const from = entries_ + static_cast<int64_t>(tile_.first_entry + first + k) * 2 * tile_.c;
        for (int q = 0; q < 2; ++q) sums[q] += load<N>(from + q * tile_.c + channel_, lanes(entries_));
      }
    }
    add_threads(sums);
    write(tile_.first_entry + first, sums);
  }

 private:
  template <class... P>
  __device__ __forceinline__ Lanes lanes(const P*... addresses) const {
    const int left = tile_.c - channel_;
    return {left < N ? left : N, aligned(addresses...) && tile_.c % N == 0};
  }

  template <class PlaceOf>
  __device__ __forceinline__ void add_rows(const T* g, PlaceOf place_of, Values (&sums)[2]) const {
    const int c = tile_.c;
    const Normalised<T>& norm = p_.norm;
    const T* const x = resolve(norm.x, memory_, task_);
    const T* const x_dot = resolve(norm.x_dot, memory_, task_);
    const T* const primal = resolve(norm.g, memory_, task_);
    const T* const gamma = resolve(norm.gamma, memory_, task_);
    const T* const beta = resolve(norm.beta, memory_, task_);
    const Saved<T> saved(const_cast<T*>(resolve(norm.saved, memory_, task_)), c);
    const Lanes all = lanes(g, x, x_dot, primal, gamma, beta, saved.mu);
    auto of_channels = [&](const T* p, T absent) { return p ? load<N>(p + channel_, all) : Values(absent); };
    Affine<Values> map(of_channels(gamma, 1), of_channels(beta, 0), of_channels(saved.mu, 0),
                       of_channels(saved.s, 0));
    map.Rmu = of_channels(x_dot ? saved.Rmu : nullptr, 0), map.c = of_channels(x_dot ? saved.c : nullptr, 0);
#pragma unroll 2
    for (int r = row_; r < Tile::kM; r += kRows) {
      const RowOfSample place = place_of(tile_.m_tile * Tile::kM + r);
      if (place.row < 0) continue;
      const int64_t at = static_cast<int64_t>(place.row) * c + channel_;
      Numbers<int64_t, N> from;
      if (norm.pooled) {
        const Numbers<int32_t, N> chosen = load<N>(saved.places + at, all);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const int64_t pixel = static_cast<int64_t>(place.sample) * norm.pixels + chosen.at[i];
          from.at[i] = pixel * c + channel_ + (i < all.count ? i : all.count - 1);
        }
      }
      auto source = [&](const T* p) {
        if (!norm.pooled) return load<N>(p + at, all);
        Values values;
#pragma unroll
        for (int i = 0; i < N; ++i) values.at[i] = p[from.at[i]];
        return values;
      };
      const Values value = source(x);
      const Values slope = lanewise(map.u(value), [&](T u) { return u > 0 ? T(1) : norm.below; });
      const Values own = slope * load<N>(g + at, all);
      sums[0] += own;
      sums[1] += own * map.xh(value);
      if (x_dot && primal) {
        sums[1] += slope * load<N>(primal + at, all) * map.xh_dot(value, source(x_dot));
      }
    }
  }

  /// Leaves in the first row of threads the sums over all rows of them.
  __device__ __forceinline__ void add_threads(Values (&sums)[2]) const {
    auto* const shared = reinterpret_cast<Values(*)[kUsed]>(dynamic_shared());
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();  // the shared memory is free
    if (kAllUsed || row_ < kRows) {
      for (int q = 0; q < 2; ++q) shared[q][thread] = sums[q];
    }
    __syncthreads();
    for (int half = kRows / 2 * kWidth; half >= kWidth; half /= 2) {
      if (thread < half) {
        for (int q = 0; q < 2; ++q) shared[q][thread] += shared[q][thread + half];
      }
      __syncthreads();
    }
    for (int q = 0; q < 2; ++q) sums[q] = shared[q][thread % kWidth];
  }

  __device__ __forceinline__ void write(int entry, const Values (&sums)[2]) const {
    if (!exists_ || row_ != 0) return;
    T* const to = entries_ + static_cast<int64_t>(entry) * 2 * tile_.c + channel_;
    for (int q = 0; q < 2; ++q) store(to + q * tile_.c, sums[q], lanes(entries_));
  }

  const SumOfTiles<T>& p_;
  const SummedTile tile_;
  const Memory& memory_;
  const int64_t task_;
  const int row_;
  int channel_;
  const bool exists_;
  T* const entries_;
};

}  // namespace maml::cuda
