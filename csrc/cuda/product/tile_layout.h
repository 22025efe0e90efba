// The layout of a product's tiles in shared memory.
//
// A tile is one operand's part of a slab: `Indices` of its outer index (m for A, n for B) by kSlab of k, 64
// bytes of k whatever the type. Both axes are cut into vectors of V elements, 16 bytes: the outer index into
// (group, lane, x) with index = 8 V group + V lane + x, lane < 8; k into (q, e) with k = V q + e, q < 4. All
// arithmetics read V x V blocks (group, lane, q), that is V vectors, each by one 16-byte load.
//
//   AlongK      memory is contiguous in k: the x-th vector of a block is one index, V of k
//   AlongIndex  memory is contiguous in the index: the x-th vector is one k, V of the index
//
// There is no padding. A permutation of the vectors keeps shared memory free of bank conflicts, eight lanes
// covering the 32 banks:
//   AlongK      row (group, x, lane) of 4 vectors, so that consecutive lanes are consecutive rows; vector q
//               stands at q ^ (lane / 2)
//   AlongIndex  row k of Indices / V vectors; vector `lane` of a group stands at lane ^ 2 q
// Lanes with the same q (SIMT) and lane pairs with q = 0..3 (matrix instructions) then both access eight
// different 16-byte columns, and so do the copies that fill the tile (tested by test_bank_conflicts.cpp).
#pragma once

namespace maml::cuda {

/// The number of elements in 16 bytes.
template <class T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

/// The depth in k of one slab.
template <class T>
inline constexpr int kSlab = 4 * kVector<T>;

template <class T, int Indices>
struct AlongK {
  static constexpr bool kAlongK = true;
  static constexpr int kIndices = Indices, kSize = Indices * kSlab<T>;
  static_assert(Indices % (8 * kVector<T>) == 0);

  /// The offset of vector x of the block (lane, q) in the group that starts at index `base`.
  static constexpr int vector(int base, int lane, int x, int q) {
    return kSlab<T> * (base + 8 * x + lane) + kVector<T> * (q ^ (lane >> 1));
  }
};

template <class T, int Indices>
struct AlongIndex {
  static constexpr bool kAlongK = false;
  static constexpr int kIndices = Indices, kSize = Indices * kSlab<T>;
  static_assert(Indices % (8 * kVector<T>) == 0);

  static constexpr int vector(int base, int lane, int x, int q) {
    return Indices * (kVector<T> * q + x) + base + kVector<T> * (lane ^ (2 * q));
  }
};

}  // namespace maml::cuda
