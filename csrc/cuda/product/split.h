// Sums over k that several blocks share. Each block of a tile of C sums a part of k and writes its sums to
// memory; the last one to arrive (run/last_block.h) adds up the parts and goes on as if it had summed all of
// k. The other blocks are done.
//
//   parts [tile, part, vector, thread of the first slice]    16-byte vectors, each written and read by one
//   thread
//
// Order of sums: slice s of the block's warps adds the parts s, s + slices, ..; then the slices are added in
// order. So the bits do not depend on which block is last.
#pragma once

#include "cuda/product/cut.h"
#include "cuda/run/last_block.h"

namespace maml::cuda {

/// How the tiles of one product of a launch are split.
struct Split {
  int parts = 1, depth = 0;               // k of a part: `depth`, fewer in the last
  int tiles_m = 1;                        // tiles along m
  int first_slot = 0, first_counter = 0;  // of the first tile, among those of the launch

  Split() = default;
  Split(const Cut& cut, const Extent& p)
      : parts(static_cast<int>(cut.parts(p))), tiles_m(static_cast<int>(blocks_for(p.m, cut.size.m))) {
    depth =
        static_cast<int>(parts == 1 ? p.k : blocks_for(blocks_for(p.k, parts), kDepthGrain) * kDepthGrain);
    if (parts > 1) parts = static_cast<int>(blocks_for(p.k, depth));
  }
};

/// One block's share of a product.
struct Share {
  int tile, part, m_tile, n_tile;
  int begin, end;  // of k

  /// The parts of a tile are neighbours, so that they run at the same time.
  __device__ __forceinline__ Share(const Split& split, int block, int k)
      : tile(block / split.parts),
        part(block - tile * split.parts),
        m_tile(tile % split.tiles_m),
        n_tile(tile / split.tiles_m),
        begin(part * split.depth),
        end(begin + split.depth < k ? begin + split.depth : k) {}
};

/// Where the sums are split: true in the block that is last, with the totals in the threads that own sums;
/// false in the others, which have written their part. All threads must call. `memory`: the parts of all
/// tiles of the launch.
template <class Product, class T>
__device__ __forceinline__ bool add_parts(const Split& split, const Share& share, T* memory,
                                          unsigned* counters, typename Product::Accumulators& sums) {
  if (split.parts == 1) return true;
  using Accumulators = typename Product::Accumulators;
  constexpr int V = kVector<T>, kColumns = Accumulators::kColumns / V;
  constexpr int kVectors = Accumulators::kRows * kColumns, kGroup = Product::kGroup;
  const int slice = static_cast<int>(threadIdx.x) / kGroup, thread = static_cast<int>(threadIdx.x) % kGroup;
  auto vectors = [&](int part) {
    const int64_t slot = split.first_slot + share.tile * split.parts + part;
    return reinterpret_cast<Vector<T>*>(memory) + slot * kVectors * kGroup + thread;
  };
  if (slice == 0) {
    Vector<T>* const to = vectors(share.part);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      Vector<T> v;
#pragma unroll
      for (int e = 0; e < V; ++e) v.element[e] = sums.at(i / kColumns, i % kColumns * V + e);
      to[i * kGroup] = v;
    }
  }
  if (!last_to_arrive(counters + split.first_counter + share.tile, static_cast<unsigned>(split.parts))) {
    return false;
  }
  sums = {};
#pragma unroll 1
  for (int part = slice; part < split.parts; part += Product::kSlices) {
    const Vector<T>* const from = vectors(part);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const Vector<T> v = from[i * kGroup];
#pragma unroll
      for (int e = 0; e < V; ++e) sums.at(i / kColumns, i % kColumns * V + e) += v.element[e];
    }
  }
  Product::add_slices(sums);
  return true;
}

/// Places the parts and counters of the products of one launch.
class SplitPlacer {
 public:
  Split place(const Cut& cut, const Extent& p) {
    Split split(cut, p);
    if (split.parts == 1) return split;
    split.first_slot = slots_, split.first_counter = counters_;
    slots_ += static_cast<int>(cut.size.tiles(p)) * split.parts;
    counters_ += static_cast<int>(cut.size.tiles(p));
    return split;
  }
  int64_t slots() const { return slots_; }

 private:
  int slots_ = 0, counters_ = 0;
};

}  // namespace maml::cuda
