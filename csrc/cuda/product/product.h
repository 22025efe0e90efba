// The matrix product of one block. All passes of a convolution are instances of this template:
//
//   C[m, n] = sum_{term} sum_k A_term[m, k] B_term[k, n]        one or two terms, into one accumulator
//
// A block computes one tile of C. The operands (gather.h) say where elements are. k is processed in stages of
// kDepth: first all stages of the first term, then all of the second.
//
// Threads: Tile::kSlices groups of warps share a stage. Each group multiplies one slab (kSlab of k) of every
// stage; at the end the first group adds up the sums of all groups, in order. Within a group, kWarpsM x
// kWarpsN warps cover the tile, and each computes a part of kWarpM x kWarpN (arithmetic.h).
//
// Shared memory: a ring of kStages stages; each holds, for every slice, a slab of A and a slab of B
// (tile_layout.h). While one stage is multiplied, the next kStages - 1 are being copied (copy_async.h): 16
// bytes a copy where channel counts and addresses allow, else single elements. A stage may be overwritten
// once every thread has passed the next barrier.
//
// Numerics: elements outside an operand are zeros that take part in the sums, so a NaN or an infinity
// opposite them yields NaN. The order of sums depends on the tile alone.
#pragma once

#include "cuda/product/arithmetic.h"
#include "cuda/product/copy_async.h"
#include "cuda/product/gather.h"
#include "cuda/run/address.h"

namespace maml::cuda {

template <int WarpM, int WarpN, int WarpsM, int WarpsN, int Slices, int Stages>
struct Tile {
  static constexpr int kWarpM = WarpM, kWarpN = WarpN, kWarpsM = WarpsM, kWarpsN = WarpsN;
  static constexpr int kM = WarpM * WarpsM, kN = WarpN * WarpsN;
  static constexpr int kSlices = Slices, kStages = Stages, kGroup = 32 * WarpsM * WarpsN,
                       kThreads = kGroup * Slices;
};

/// The operands in memory, as symbolic addresses (run/address.h).
template <class T>
struct Terms {
  const T *a[2] = {}, *b[2] = {};
  int count = 0;
  bool vectors_a = false, vectors_b = false;  // copies of 16 bytes are allowed

  void add(const T* a_, const T* b_) { a[count] = a_, b[count] = b_, ++count; }
};

/// Fills one operand's slabs of a stage. AlongK: four threads a row; each fills some rows of every slab.
/// AlongIndex: eight threads a k; each fills every eighth vector of some k.
template <class T, class Operand, int Indices, int Slices, int Threads>
class Filler {
 public:
  using Layout = std::conditional_t<Operand::kAlongK, AlongK<T, Indices>, AlongIndex<T, Indices>>;

  __device__ __forceinline__ Filler(const Operand& operand, int first, bool vectors)
      : operand_(operand), first_(first), vectors_(vectors) {
#pragma unroll
    for (int i = 0; i < kOuters; ++i) outer_[i] = operand_.outer(index(i));
  }

  __device__ __forceinline__ void fill(const T* source, int k0, T* slabs) const {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (Operand::kAlongK) {
      const int q = thread % 4;
#pragma unroll
      for (int slice = 0; slice < Slices; ++slice) {
        fill_k(source, k0 + slice * kSlab<T> + V * q, q, 0, slabs + slice * Layout::kSize);
      }
    } else {
#pragma unroll
      for (int k = thread / 8; k < Slices * kSlab<T>; k += Threads / 8) {
        const int slice = k / kSlab<T>, rest = k % kSlab<T>;
        fill_k(source, k0 + k, rest / V, rest % V, slabs + slice * Layout::kSize);
      }
    }
  }

 private:
  static constexpr int V = kVector<T>;
  static constexpr int kOuters = Operand::kAlongK ? 4 * Indices / Threads : Indices / (8 * V);
  static_assert(kOuters > 0 && (!Operand::kAlongK || 4 * Indices % Threads == 0));

  /// Block (base, lane) and vector x of this thread's i-th outer index. AlongK determines x; AlongIndex
  /// covers all x.
  struct Row {
    int base, lane, x;
  };
  static __device__ __forceinline__ Row row(int i) {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (Operand::kAlongK) {
      const int r = thread / 4 + Threads / 4 * i;  // in the order of the tile's rows in memory
      return {r / (8 * V) * (8 * V), r % 8, r / 8 % V};
    } else {
      return {8 * V * i, thread % 8, 0};
    }
  }
  __device__ __forceinline__ int index(int i) const {
    const Row r = row(i);
    return first_ + r.base + V * r.lane + r.x;
  }

  __device__ __forceinline__ void fill_k(const T* source, int k, int q, int x, T* slab) const {
    if (vectors_) {
      const auto inner = operand_.inner(k);
#pragma unroll
      for (int i = 0; i < kOuters; ++i)
        copy<16>(source, operand_.element(outer_[i], inner), to(slab, i, q, x));
      return;
    }
    // Not unrolled: else everything that does not depend on k would be kept in registers.
#pragma unroll 1
    for (int e = 0; e < V; ++e) {
      if constexpr (Operand::kAlongK) {
        const auto inner = operand_.inner(k + e);
#pragma unroll
        for (int i = 0; i < kOuters; ++i) {
          copy<sizeof(T)>(source, operand_.element(outer_[i], inner), to(slab, i, q, x) + e);
        }
      } else {
        const auto inner = operand_.inner(k);
#pragma unroll 1
        for (int i = 0; i < kOuters; ++i) {
          copy<sizeof(T)>(source, operand_.element(operand_.outer(index(i) + e), inner),
                          to(slab, i, q, x) + e);
        }
      }
    }
  }
  static __device__ __forceinline__ T* to(T* slab, int i, int q, int x) {
    const Row r = row(i);
    return slab + Layout::vector(r.base, r.lane, Operand::kAlongK ? r.x : x, q);
  }
  template <int Bytes>
  static __device__ __forceinline__ void copy(const T* source, const Element& from, T* to) {
    copy_async<Bytes>(to, source + from.offset, from.inside);
  }

  const Operand& operand_;
  int first_;
  bool vectors_;
  typename Operand::Outer outer_[kOuters];
};

template <class Arithmetic, class Tile, class A, class B>
class Product {
 public:
  using T = typename Arithmetic::T;
  using Accumulators = typename Arithmetic::template Accumulators<Tile::kWarpM, Tile::kWarpN>;
  static constexpr int kDepth = Tile::kSlices * kSlab<T>;

 private:
  using FillerA = Filler<T, A, Tile::kM, Tile::kSlices, Tile::kThreads>;
  using FillerB = Filler<T, B, Tile::kN, Tile::kSlices, Tile::kThreads>;
  using LayoutA = typename FillerA::Layout;
  using LayoutB = typename FillerB::Layout;
  static constexpr int kStage = Tile::kSlices * (LayoutA::kSize + LayoutB::kSize);
  static constexpr int kAccumulators = Accumulators::kRows * Accumulators::kColumns;

  static constexpr int most(int a, int b) { return a > b ? a : b; }

 public:
  static constexpr int kSharedBytes =
      most(Tile::kStages * kStage, (Tile::kSlices - 1) * Tile::kGroup * kAccumulators) *
      static_cast<int>(sizeof(T));

  /// Where this thread's sums stand in C. `owner`: the thread belongs to the first slice, which holds the
  /// totals.
  struct Position {
    int lane, m, n;  // of the warp's tile
    bool owner;
    __device__ __forceinline__ int row(int r) const { return m + Accumulators::row(lane, r); }
    __device__ __forceinline__ int column(int c) const { return n + Accumulators::column(lane, c); }
  };
  static __device__ __forceinline__ Position position(int m0, int n0) {
    const int warp = static_cast<int>(threadIdx.x) / 32, w = warp % (Tile::kWarpsM * Tile::kWarpsN);
    return {static_cast<int>(threadIdx.x) % 32, m0 + w / Tile::kWarpsN * Tile::kWarpM,
            n0 + w % Tile::kWarpsN * Tile::kWarpN, warp < Tile::kWarpsM * Tile::kWarpsN};
  }

  /// Sums over k of [begin, end) in each term; `begin` is a multiple of kDepth. `look(term, slabs of B,
  /// LayoutB)` is called for each stage while it stands in shared memory. Afterwards, and after a barrier,
  /// the caller may use the shared memory.
  template <class Look>
  static __device__ __forceinline__ void compute(const A& a, const B& b, const Terms<T>& terms,
                                                 const Memory& memory, int64_t task, int m0, int n0,
                                                 int begin, int end, Accumulators& sums, Look look) {
    T* const shared = reinterpret_cast<T*>(dynamic_shared());
    const FillerA filler_a(a, m0, terms.vectors_a);
    const FillerB filler_b(b, n0, terms.vectors_b);
    const int of_term = (end - begin + kDepth - 1) / kDepth, stages = terms.count * of_term;
    const Position own = position(0, 0);
    const int slice = static_cast<int>(threadIdx.x) / Tile::kGroup;

    const T *from_a = nullptr, *from_b = nullptr;  // the term whose stages are being filled
    auto fill = [&](int stage) {
      if (stage < stages) {
        const int term = stage >= of_term, in_term = term ? stage - of_term : stage;
        if (in_term == 0) {
          from_a = resolve(terms.a[term], memory, task);
          from_b = resolve(terms.b[term], memory, task);
        }
        T* const to = shared + stage % Tile::kStages * kStage;
        filler_a.fill(from_a, begin + in_term * kDepth, to);
        filler_b.fill(from_b, begin + in_term * kDepth, to + Tile::kSlices * LayoutA::kSize);
      }
      commit_copies();
    };

#pragma unroll 1
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) fill(stage);
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      wait_copies<Tile::kStages - 2>();
      __syncthreads();
      fill(stage + Tile::kStages - 1);
      const T* const slabs_a = shared + stage % Tile::kStages * kStage;
      const T* const slabs_b = slabs_a + Tile::kSlices * LayoutA::kSize;
      Arithmetic::template multiply<LayoutA, LayoutB>(
          slabs_a + slice * LayoutA::kSize, slabs_b + slice * LayoutB::kSize, own.m, own.n, own.lane, sums);
      look(stage >= of_term, slabs_b, LayoutB());
    }
    wait_copies<0>();
    add_slices(shared, slice, sums);
  }

 private:
  /// Adds the sums of all slices, in order, to those of the first.
  static __device__ __forceinline__ void add_slices(T* shared, int slice, Accumulators& sums) {
    if constexpr (Tile::kSlices > 1) {
      const int thread = static_cast<int>(threadIdx.x) % Tile::kGroup;
      __syncthreads();
      if (slice > 0) {
        T* const mine = shared + (slice - 1) * kAccumulators * Tile::kGroup + thread;
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i)
          mine[i * Tile::kGroup] = sums.at(i / Accumulators::kColumns, i % Accumulators::kColumns);
      }
      __syncthreads();
      if (slice == 0) {
        for (int other = 0; other < Tile::kSlices - 1; ++other) {
          const T* const theirs = shared + other * kAccumulators * Tile::kGroup + thread;
#pragma unroll
          for (int i = 0; i < kAccumulators; ++i) {
            sums.at(i / Accumulators::kColumns, i % Accumulators::kColumns) += theirs[i * Tile::kGroup];
          }
        }
      }
    }
  }
};

/// Writes (or adds) V sums to V elements of a row that has `left` elements from here on.
template <class T>
__device__ __forceinline__ void put(T* to, const T (&values)[kVector<T>], int left, bool vectors, bool add) {
  if (vectors) {
    if (left <= 0) return;
    Vector<T> v;
    if (add) v = *reinterpret_cast<const Vector<T>*>(to);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) v.element[e] = add ? v.element[e] + values[e] : values[e];
    *reinterpret_cast<Vector<T>*>(to) = v;
    return;
  }
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    if (e < left) to[e] = add ? to[e] + values[e] : values[e];
  }
}

/// Writes a thread's sums. Row r of C starts at place(row), or is not written where that is null; `n`
/// columns.
template <class Product, class Place>
__device__ __forceinline__ void write(const typename Product::Position& at,
                                      typename Product::Accumulators& sums, int n, bool vectors, bool add,
                                      Place place) {
  using T = typename Product::T;
#pragma unroll
  for (int r = 0; r < Product::Accumulators::kRows; ++r) {
    T* const row = place(at.row(r));
    if (!row) continue;
#pragma unroll
    for (int c = 0; c < Product::Accumulators::kColumns; c += kVector<T>) {
      T values[kVector<T>];
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) values[e] = sums.at(r, c + e);
      const int column = at.column(c);
      put(row + column, values, n - column, vectors, add);
    }
  }
}

}  // namespace maml::cuda
