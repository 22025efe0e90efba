// How the products of one launch are cut into blocks: which tiles, and into how many parts k is split. The
// rule looks at the shapes of one task only, so that the bits do not depend on the number of tasks.
//
// The sums over k of one tile of C can be split over several blocks (split.h adds up their parts). Where
// tiles are few, this is what occupies the GPU; where products of different depths share a launch, it makes
// their blocks alike.
#pragma once

#include <algorithm>
#include <span>

#include "cuda/product/product.h"
#include "cuda/run/launch.h"

namespace maml::cuda {

/// Tile shapes: Wide; Narrow for n <= 32; Small for few outputs, with warps that share k, so that there are
/// enough blocks and each is done soon. All have 128 threads. A warp's part of the tile decides how often an
/// operand is read from shared memory and rounded (docs/gpu.md derives the rates); it is limited by
/// registers: 128 sums a thread with matrix instructions, 64 (8 x 8) in float32. The sizes of the tiles do
/// not depend on the type. With small tiles (a test build) a tile has one warp, or two that share k.
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

enum class TileClass { wide, narrow, small };

/// One product of a launch: C [m, n], with sums over k.
struct Extent {
  int64_t m, n, k;
};

struct TileSize {
  int64_t m, n;
  int64_t tiles(const Extent& p) const { return blocks_for(p.m, m) * blocks_for(p.n, n); }
  int64_t elements() const { return m * n; }
};

/// Calls f.operator()<Tile>().
template <class Arithmetic, class F>
void with_tile(TileClass tile, F f) {
  using Choice = Tiles<Arithmetic>;
  switch (tile) {
    case TileClass::wide:
      return f.template operator()<typename Choice::Wide>();
    case TileClass::narrow:
      return f.template operator()<typename Choice::Narrow>();
    default:
      return f.template operator()<typename Choice::Small>();
  }
}

inline TileSize size_of(TileClass tile, bool matrix) {
  TileSize size{};
  auto take = [&]<class Tile>() { size = {Tile::kM, Tile::kN}; };
  matrix ? with_tile<Tf32>(tile, take) : with_tile<Simt<float>>(tile, take);
  return size;
}

// Estimates for an H100 (132 multiprocessors, three or four resident blocks each) at 4 tasks, the fewest that
// are usual. With more tasks there are more blocks than needed, which costs little.

/// A task's blocks for which a larger tile is chosen: together one for each multiprocessor.
constexpr int64_t kEnoughBlocks = kSmallTiles ? 4 : 32;
/// A task's blocks up to which k is split: together as many as are resident at once.
constexpr int64_t kMostBlocksOfTask = kSmallTiles ? 16 : 96;
static_assert(kMostBlocksOfTask <= kCounters);  // no launch splits more tiles than these (Cut::depth)
/// The fewest k of a part: below, the copies of the operands are no longer hidden, and adding up the parts,
/// some 2 us, takes longer than what is saved.
constexpr int64_t kFewestDepth = kSmallTiles ? 32 : 192;
/// The most parts: one block reads them all.
constexpr int64_t kMostPartsOfK = 32;
/// A part has a multiple of so many k, for any tile's stages.
constexpr int64_t kDepthGrain = kSmallTiles ? 32 : 64;

/// The tile of all blocks of a launch, and the fewest k of a part.
struct Cut {
  TileClass tile;
  TileSize size;
  int64_t depth;

  /// Cuts the products of a launch: the largest tile that still gives enough blocks, and then parts of equal
  /// depth.
  Cut(bool matrix, std::span<const Extent> products) {
    const bool narrow =
        std::any_of(products.begin(), products.end(), [](const Extent& p) { return p.n <= 32; });
    for (const TileClass candidate : {TileClass::wide, TileClass::narrow, TileClass::small}) {
      if (candidate == TileClass::wide && narrow) continue;
      tile = candidate, size = size_of(candidate, matrix), depth = kFewestDepth;
      int64_t blocks = 0, work = 0;
      for (const Extent& p : products) blocks += size.tiles(p) * parts(p), work += size.tiles(p) * p.k;
      depth = std::max(kFewestDepth, work / kMostBlocksOfTask);
      if (blocks >= kEnoughBlocks) break;
    }
  }

  int64_t parts(const Extent& p) const { return std::clamp<int64_t>(p.k / depth, 1, kMostPartsOfK); }
  int64_t blocks(const Extent& p) const { return size.tiles(p) * parts(p); }
  /// Elements of memory for the parts of a product.
  int64_t parts_size(const Extent& p) const { return parts(p) > 1 ? blocks(p) * size.elements() : 0; }
  int64_t parts_size(std::span<const Extent> products) const {
    int64_t sum = 0;
    for (const Extent& p : products) sum += parts_size(p);
    return sum;
  }
};

}  // namespace maml::cuda
