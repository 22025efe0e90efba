// Sums over nested loops (strided.h) by several threads. Each step of the outer nest is shared by some
// threads of one block, which take the inner steps in turns and then combine what they have in a fixed tree.
//
// There are two orders of a block's threads, and the one in which a warp reads consecutive elements is taken:
//
//   along    consecutive threads share an outer step, and read consecutive inner steps: a row
//   across   consecutive threads take consecutive outer steps: a column
//
// The number of sharers depends on the shape of one task alone, and so do the bits of a sum.
#pragma once

#include "cuda/strided.h"

namespace maml::cuda {

/// How the threads of a block share outer steps.
struct Shares {
  int sharers = 1;  // of an outer step: a power of two
  bool along = false;
  int threads = kElementThreads;  // of a block

  __host__ __device__ constexpr int steps() const { return threads / sharers; }  // of a block
};

/// A sharer takes at least so many inner steps, so that four loads are in flight and the tree costs little.
inline constexpr int kFewestShared = kSmallTiles ? 1 : 8;
/// Outer steps are shared until a task has so many threads: 128 blocks, about one for each multiprocessor.
inline constexpr int64_t kEnoughThreads = kSmallTiles ? 64 : 32768;
/// Threads that read consecutive elements: a warp reads 128 bytes of float at once.
inline constexpr int kConsecutive = kSmallTiles ? 4 : 32;

/// The shares of `outer` steps with `inner` steps each. `along`: the inner steps are consecutive elements.
inline Shares shares_of(int64_t outer, int64_t inner, bool along, int threads = kElementThreads) {
  Shares shares{1, along, threads};
  const int most = along ? threads : threads / kConsecutive;
  const auto are_few = [&] {
    return outer * shares.sharers < kEnoughThreads || (along && shares.sharers < kConsecutive);
  };
  while (shares.sharers < most && 2 * shares.sharers * kFewestShared <= inner && are_few())
    shares.sharers *= 2;
  return shares;
}
/// The same of loops in which it is the operand `read` that takes the time.
template <int M>
Shares shares_of(const Split<M>& loops, int read, int threads = kElementThreads) {
  const auto is_contiguous = [&](const Nest<M>& nest) {
    return nest.steps > 1 && std::abs(nest.stride[nest.axes - 1][read]) == 1;
  };
  return shares_of(loops.outer.steps, loops.inner.steps,
                   is_contiguous(loops.inner) && !is_contiguous(loops.outer), threads);
}

inline Grid shared_grid(const Shares& shares, int64_t steps) { return {blocks_for(steps, shares.steps())}; }

/// A thread's place among those of its block.
class Sharer {
 public:
  __device__ __forceinline__ explicit Sharer(const Shares& shares)
      : sharers_(shares.sharers), distance_(shares.along ? 1 : shares.steps()) {
    const int thread = static_cast<int>(threadIdx.x);
    share_ = shares.along ? thread % sharers_ : thread / distance_;
    step_ = shares.along ? thread / sharers_ : thread % distance_;
  }

  /// Calls f(step) for this thread's outer steps, for all threads of the block equally often. Beyond the last
  /// step, threads get the last one once more, and is_first() is false.
  template <class F>
  __device__ __forceinline__ void each(Team team, int64_t steps, F f) {
    const int64_t of_block = static_cast<int64_t>(blockDim.x) / sharers_;
    for (int64_t first = team.block * of_block; first < steps; first += team.blocks * of_block) {
      const int64_t step = first + step_;
      exists_ = step < steps;
      f(exists_ ? step : steps - 1);
    }
  }
  /// The thread that writes the result of a step.
  __device__ __forceinline__ bool is_first() const { return exists_ && share_ == 0; }
  __device__ __forceinline__ bool exists() const { return exists_; }
  __device__ __forceinline__ int share() const { return share_; }
  __device__ __forceinline__ int sharers() const { return sharers_; }

  /// f(offsets) at this thread's share of the steps of a nest, for operands that start at `from`.
  template <int M, class F>
  __device__ __forceinline__ void each_step(const Nest<M>& nest, Offsets<M> from, F f) const {
    const int last = nest.axes - 1, length = nest.size[last], rows = nest.steps / length;
    const bool by_rows = distance_ != 1 && rows >= sharers_;
    if (!by_rows && length < sharers_) {  // many short rows that a warp reads together
      for (int step = share_; step < nest.steps; step += sharers_) {
        f(advance(from, nest, nest.axes, static_cast<unsigned>(step)));
      }
      return;
    }
    const int first = by_rows ? 0 : share_, stride = by_rows ? 1 : sharers_;
    for (int row = by_rows ? share_ : 0; row < rows; row += by_rows ? sharers_ : 1) {
      Offsets<M> at = advance(from, nest, last, static_cast<unsigned>(row));
      for (int m = 0; m < M; ++m) at.of[m] += first * nest.stride[last][m];
#pragma unroll 4
      for (int i = first; i < length; i += stride) {
        f(at);
        for (int m = 0; m < M; ++m) at.of[m] += stride * nest.stride[last][m];
      }
    }
  }

  /// The values of all sharers of a step combined by `op`, in a tree; all of them get it. `values`: shared
  /// memory, one for each thread. Barriers of the block where there is more than one sharer.
  template <class V, class Op>
  __device__ __forceinline__ V combined(V value, Op op, V* values) const {
    if (sharers_ == 1) return value;
    const int thread = static_cast<int>(threadIdx.x), first = thread - share_ * distance_;
    __syncthreads();
    values[thread] = value;
    for (int half = sharers_ / 2; half > 0; half /= 2) {
      __syncthreads();
      if (share_ < half) values[thread] = op(values[thread], values[thread + half * distance_]);
    }
    __syncthreads();
    value = values[first];
    __syncthreads();
    return value;
  }
  template <class V, class Op>
  __device__ __forceinline__ V combined(V value, Op op) const {
    __shared__ V values[kElementThreads];
    return combined(value, op, values);
  }
  template <class T>
  __device__ __forceinline__ T sum(const Sum<T>& own, double* values) const {
    if (sharers_ == 1) return own.value();
    return static_cast<T>(combined(own.total(), [](double a, double b) { return a + b; }, values));
  }
  template <class T>
  __device__ __forceinline__ T sum(const Sum<T>& own) const {
    __shared__ double values[kElementThreads];
    return sum(own, values);
  }

 private:
  int sharers_, distance_;  // threads of consecutive shares are so far apart
  int share_, step_;
  bool exists_ = true;
};

/// out (+)= scale times the sum of in along the axes that out does not have.
template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    sum_kernel(const __grid_constant__ Split<2> loops, Shares shares, T scale, const T* symbolic_in, bool add,
               T* symbolic_out, Deferred deferred) {
  const Memory memory = deferred.ready();
  const T* in = resolve(symbolic_in, memory, blockIdx.z);
  T* out = resolve(symbolic_out, memory, blockIdx.z);
  Sharer sharer(shares);
  sharer.each(grid_team(), loops.outer.steps, [&](int64_t step) {
    const Offsets<2> to = outer_step(loops, step);
    Sum<T> own;
    sharer.each_step(loops.inner, to, [&](const Offsets<2>& at) { own += in[at.of[0]]; });
    const T sum = sharer.sum(own);
    if (sharer.is_first()) put(out, to.of[1], scale * sum, add);
  });
}

/// out (+)= scale times the sum of in, seen as `from`, along the axes that `to` does not have: a copy where
/// it has all of them. An element of out that `to` does not reach is 0, unless it adds.
template <class T>
void sum(const Launcher& launch, const char* name, const Loops& loops, int64_t n, const View& from,
         const View& to, T scale, const T* in, bool add, T* out) {
  const Split<2> s = split<2>(loops, n, to, {&from, &to});
  const Shares shares = shares_of(s, 0);
  clear_unless_reached(launch, to, n, s.outer.steps, add, out);
  launch(name, sum_kernel<T>, shared_grid(shares, s.outer.steps), kElementThreads, 0, s, shares, scale, in,
         add, out, launch.memory);
}

}  // namespace maml::cuda
