// Loops over a matrix [rows, channels]: blocks of rows outside, vectors of channels inside, so that each
// block is read from memory once, however many channels there are. Sums are computed block by block and then
// added up, which rounds less than one long sum.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/run/share.h"
#include "cpu/simd.h"

namespace maml::MAML_ISA {

constexpr int64_t kRowBlock = 256;

/// Calls f(j, lanes, i0, i1): channels from j on, as many as `lanes`, and rows [i0, i1). Threads share the
/// channels, so that the order of each channel's sum does not depend on their number.
template <class T, class F>
inline void each_block(int64_t rows, int64_t channels, F f) {
  constexpr int W = kLanes<T>;
  share(channels, W, kElementWork * rows * channels, [&](int64_t first, int64_t last) {
    for (int64_t i0 = 0; i0 < rows; i0 += kRowBlock) {
      const int64_t i1 = std::min(rows, i0 + kRowBlock);
      for (int64_t j = first; j < last; j += W) {
        f(j, Lanes<T>(std::min<int64_t>(W, channels - j)), i0, i1);
      }
    }
  });
}

/// sums[q][j] = sum over rows i of the q-th term; term(at, j, lanes, sum) adds row i's terms to Vector
/// sum[Q], with at = i * channels + j.
template <class T, int Q, class F>
inline void channel_sums(int64_t rows, int64_t channels, T* const (&sums)[Q], F term) {
  for (T* s : sums) std::fill_n(s, channels, T(0));
  each_block<T>(rows, channels, [&](int64_t j, const Lanes<T>& lanes, int64_t i0, int64_t i1) {
    Vector<T> sum[Q] = {};
    for (int64_t i = i0; i < i1; ++i) term(i * channels + j, j, lanes, sum);
    for (int q = 0; q < Q; ++q) store(sums[q] + j, load(sums[q] + j, lanes) + sum[q], lanes);
  });
}

}  // namespace maml::MAML_ISA
