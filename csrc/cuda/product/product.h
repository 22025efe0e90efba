// The matrix product of one block. All passes of a convolution are instances of this template:
//
//   C[m, n] = sum_{term} sum_k A_term[m, k] B_term[k, n]        one or two terms, into one accumulator
//
// A block computes one tile of C. The operands (gather.h) say where elements are. k is processed in stages of
// kDepth: first all stages of the first term, then all of the second.
//
// Threads: Tile::kSlices groups of warps share a stage. Each group fills and multiplies one slab (kSlab of k)
// of every stage; at the end the first group adds up the sums of all groups, in order. Within a group,
// kWarpsM x kWarpsN warps cover the tile, and each computes a part of kWarpM x kWarpN (arithmetic.h).
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
  static constexpr int kSums = WarpM * WarpN / 32;  // of a thread
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

/// Fills one operand's slab, by the threads of one slice. Each thread copies vectors of 16 bytes:
///
///   AlongK      vector q = thread % 4 of every (threads / 4)-th row: one k for all its vectors
///   AlongIndex  vector thread % 8 of every group of indices, for every (threads / 8)-th k
///
/// What does not depend on k is computed once: the outer parts of the elements, and the place of a thread's
/// first vector in the slab, from which the others are at constant distances.
template <class T, class Operand, int Indices, int Threads>
class Filler {
 public:
  using Layout = std::conditional_t<Operand::kAlongK, AlongK<T, Indices>, AlongIndex<T, Indices>>;

  /// `first`: the tile's first index; `thread`: within the slice.
  __device__ __forceinline__ Filler(const Operand& operand, int first, bool vectors, int thread)
      : operand_(operand),
        first_(first),
        thread_(thread),
        k_(Operand::kAlongK ? thread % 4 * V : thread / 8 % kSlab<T>),
        place_(Operand::kAlongK
                   ? Layout::vector(0, thread / 4 % 8, 0, thread % 4) + thread / 32 * (8 * kSlab<T>)
                   : Layout::vector(0, thread % 8, k_ % V, k_ / V) + thread / (8 * kSlab<T>)*(8 * V)),
        vectors_(vectors) {
#pragma unroll
    for (int i = 0; i < kOuters; ++i) outer_[i] = operand_.outer(index(i));
  }

  __device__ __forceinline__ void fill(const T* source, int k0, T* slab) const {
    if (vectors_) {
      fill_vectors(source, k0, slab);
    } else {
      fill_elements(source, k0, slab);
    }
  }

 private:
  static constexpr int V = kVector<T>;
  static constexpr int kOfGroup = 8 * kSlab<T>;  // vectors of 8 V indices, where they are AlongIndex
  static constexpr int kPasses = Operand::kAlongK || Threads >= kOfGroup ? 1 : kOfGroup / Threads;
  static constexpr int kStep = Operand::kAlongK ? Threads / 4 : Threads / 8;  // of rows, or of k
  static constexpr int kVectors = Indices * 4 / Threads, kOuters = kVectors / kPasses;
  static_assert(kOuters > 0 && kVectors * Threads == Indices * 4 && kStep % (Operand::kAlongK ? 8 : V) == 0);

  /// The i-th outer index of this thread. The rows of an AlongK slab are in another order than the indices.
  __device__ __forceinline__ int index(int i) const {
    if constexpr (Operand::kAlongK) {
      const int r = thread_ / 4 + kStep * i;
      return first_ + r / (8 * V) * (8 * V) + r % 8 * V + r / 8 % V;
    } else {
      return first_ + (thread_ / kOfGroup + i * (Threads / kOfGroup + (Threads < kOfGroup))) * (8 * V) +
             thread_ % 8 * V;
    }
  }
  /// The place of vector i of a pass. Each pass adds a multiple of 2 to q and its double to the vector's
  /// number by exclusive or (tile_layout.h), in bits in which the first pass has zeros.
  __device__ __forceinline__ int place(int i, int pass) const {
    if constexpr (Operand::kAlongK) return place_ + kSlab<T> * kStep * i;
    const int bases = Threads / kOfGroup + (Threads < kOfGroup);
    return (place_ ^ (2 * kStep * pass)) + Indices * kStep * pass + 8 * V * bases * i;
  }

  __device__ __forceinline__ void fill_vectors(const T* source, int k0, T* slab) const {
    if constexpr (kPasses == 1) {
      copy_pass(source, operand_.inner(k0 + k_), 0, slab);
    } else {  // a lane computes the part of one k, and passes it to the lanes that copy for this k
      const auto mine = operand_.inner(k0 + thread_ % kSlab<T>);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        copy_pass(source, from_lane(mine, k_ + kStep * pass), pass, slab);
      }
    }
  }
  __device__ __forceinline__ void copy_pass(const T* source, const typename Operand::Inner& inner, int pass,
                                            T* slab) const {
#pragma unroll
    for (int i = 0; i < kOuters; ++i)
      copy<16>(source, operand_.element(outer_[i], inner), slab + place(i, pass));
  }

  /// Not unrolled: else everything that does not depend on k would be kept in registers.
  __device__ __forceinline__ void fill_elements(const T* source, int k0, T* slab) const {
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll 1
      for (int e = 0; e < V; ++e) {
        if constexpr (Operand::kAlongK) {
          const auto inner = operand_.inner(k0 + k_ + e);
#pragma unroll
          for (int i = 0; i < kOuters; ++i)
            copy<sizeof(T)>(source, operand_.element(outer_[i], inner), slab + place(i, pass) + e);
        } else {
          const auto inner = operand_.inner(k0 + k_ + kStep * pass);
#pragma unroll 1
          for (int i = 0; i < kOuters; ++i) {
            copy<sizeof(T)>(source, operand_.element(operand_.outer(index(i) + e), inner),
                            slab + place(i, pass) + e);
          }
        }
      }
    }
  }
  template <int Bytes>
  static __device__ __forceinline__ void copy(const T* source, const Element& from, T* to) {
    copy_async<Bytes>(to, source + from.offset, from.inside);
  }

  const Operand& operand_;
  int first_, thread_, k_, place_;
  bool vectors_;
  typename Operand::Outer outer_[kOuters];
};

template <class Arithmetic, class Tile, class A, class B>
class Product {
 public:
  using T = typename Arithmetic::T;
  using Accumulators = typename Arithmetic::template Accumulators<Tile::kWarpM, Tile::kWarpN>;
  static constexpr int kDepth = Tile::kSlices * kSlab<T>, kSlices = Tile::kSlices, kGroup = Tile::kGroup;

 private:
  using FillerA = Filler<T, A, Tile::kM, Tile::kGroup>;
  using FillerB = Filler<T, B, Tile::kN, Tile::kGroup>;
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
    const int slice = static_cast<int>(threadIdx.x) / Tile::kGroup,
              thread = static_cast<int>(threadIdx.x) % Tile::kGroup;
    const FillerA filler_a(a, m0, terms.vectors_a, thread);
    const FillerB filler_b(b, n0, terms.vectors_b, thread);
    const int of_term = (end - begin + kDepth - 1) / kDepth, stages = terms.count * of_term;
    const Position own = position(0, 0);
    T* const slabs_a = shared + slice * LayoutA::kSize;  // of this slice, in the first stage
    T* const slabs_b = shared + Tile::kSlices * LayoutA::kSize + slice * LayoutB::kSize;

    const T *from_a = nullptr, *from_b = nullptr;  // the term whose stages are being filled
    int k = begin;                                 // of the next stage to fill
    auto fill = [&](int stage, int to) {
      if (stage < stages) {
        if (const int term = stage == of_term; term || stage == 0) {
          from_a = resolve(terms.a[term], memory, task);
          from_b = resolve(terms.b[term], memory, task);
          k = begin + slice * kSlab<T>;
        }
        filler_a.fill(from_a, k, slabs_a + to);
        filler_b.fill(from_b, k, slabs_b + to);
        k += kDepth;
      }
      commit_copies();
    };

#pragma unroll 1
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) fill(stage, stage * kStage);
    int at = 0;  // where the stage stands; the one before it in the ring is filled meanwhile
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      wait_copies<Tile::kStages - 2>();
      __syncthreads();
      constexpr int kLast = (Tile::kStages - 1) * kStage;
      fill(stage + Tile::kStages - 1, at == 0 ? kLast : at - kStage);
      Arithmetic::template multiply<LayoutA, LayoutB>(slabs_a + at, slabs_b + at, own.m, own.n, own.lane,
                                                      sums);
      look(stage >= of_term, shared + at + Tile::kSlices * LayoutA::kSize, LayoutB());
      at = at == kLast ? 0 : at + kStage;
    }
    wait_copies<0>();
    add_slices(sums);
  }

  /// Adds the sums of all slices, in order, to those of the first.
  static __device__ __forceinline__ void add_slices(Accumulators& sums) {
    if constexpr (Tile::kSlices > 1) {
      T* const shared = reinterpret_cast<T*>(dynamic_shared());
      const int slice = static_cast<int>(threadIdx.x) / Tile::kGroup;
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
