// How the statistics of a convolution's output stand in memory (Tensors::statistics, statistics_dot): in one
// entry for each kStatisticsRows rows. If there are more than kMostEntries, too many for every block of the
// normalisation to merge, the convolution folds each kFoldedEntries of them into the first of these
// (fold_statistics.h), and the others are not read. Both layers ask here.
#pragma once

#include <cstdint>

#include "cuda/product/statistics.h"
#include "cuda/run/address.h"

namespace maml::cuda {

inline constexpr int kMostEntries = kSmallTiles ? 4 : 256;
inline constexpr int kFoldedEntries = kSmallTiles ? 3 : 32;
/// A whole number of any tile's rows, so that a tile belongs to one entry.
inline constexpr int kFoldedRows = kFoldedEntries * kStatisticsRows;

/// The counters (last_block.h) for folding: those after the counters of split products. One for each folded
/// entry and each kStatisticsColumns columns, at most as many as a tile has.
inline constexpr int kFirstFoldCounter = 128;
inline constexpr int kStatisticsColumns = 32;

struct StatisticsEntries {
  int count, rows;  // the last entry may have fewer rows
  int step;         // an entry begins where so many unfolded ones after the one before it would
};

__host__ __device__ constexpr StatisticsEntries statistics_entries(int64_t rows, int64_t columns) {
  const int64_t count = (rows + kStatisticsRows - 1) / kStatisticsRows;
  const int64_t folded = (rows + kFoldedRows - 1) / kFoldedRows;
  const int64_t counters = folded * ((columns + kStatisticsColumns - 1) / kStatisticsColumns);
  if (count > kMostEntries && counters <= kCounters - kFirstFoldCounter)
    return {static_cast<int>(folded), kFoldedRows, kFoldedEntries};
  return {static_cast<int>(count), kStatisticsRows, 1};
}

}  // namespace maml::cuda
