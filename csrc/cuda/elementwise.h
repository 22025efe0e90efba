// Loops over all elements of tensors of one shape, in vectors of 16 bytes with several loads in flight
// (vectors.h).
#pragma once

#include <utility>

#include "cuda/vectors.h"

namespace maml::cuda {

inline constexpr int kElementThreads = kSmallTiles ? 32 : 256;

/// The blocks of a loop over `elements`: one vector of float a thread, up to a number that fills the largest
/// GPU with four tasks (132 multiprocessors with 8 blocks each); beyond that more vectors a thread.
inline int64_t element_blocks(int64_t elements) {
  return std::clamp<int64_t>(blocks_for(elements, int64_t{4} * kElementThreads), 1, kSmallTiles ? 3 : 256);
}

/// The loads that a thread issues before it uses the first of them.
inline constexpr int kLoadsInFlight = 4;

/// The tensors that a loop writes; a null one is not wanted.
template <class T, int K>
struct Outputs {
  T* of[K];
};

template <int N, class T, int K, class F, size_t... J, class... In>
__device__ __forceinline__ void map_vectors(std::index_sequence<J...>, Team team, int64_t start,
                                            int64_t count, F f, const Outputs<T, K>& out, const In*... in) {
  constexpr int inputs = static_cast<int>(sizeof...(In));
  // Half as many of float64, whose functions need the registers.
  constexpr int in_flight = sizeof(T) == 8 ? kLoadsInFlight / 2 : kLoadsInFlight;
  constexpr int at_once = std::max(1, in_flight / std::max(1, inputs));
  constexpr Lanes lanes{N, N > 1};
  const int64_t step = team.step();
  for (int64_t first = team.first(); first < count; first += at_once * step) {
    Numbers<T, N> x[at_once][std::max(1, inputs)];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const int64_t i = first + k * step;
      if (i < count) ((x[k][J] = in ? load<N>(in + start + i * N, lanes) : Numbers<T, N>(T(0))), ...);
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const int64_t i = first + k * step;
      if (i >= count) continue;
      Numbers<T, N> y[K];
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const Numbers<T, K> values = f(x[k][J].at[e]...);
#pragma unroll
        for (int j = 0; j < K; ++j) y[j].at[e] = values.at[j];
      }
#pragma unroll
      for (int j = 0; j < K; ++j) {
        if (out.of[j]) store(out.of[j] + start + i * N, y[j], lanes);
      }
    }
  }
}

/// out[i] = f(in[i]...) for the team's share of `count` elements. A null input is zero. With several outputs,
/// f returns a vector of one value for each. An output may also be an input.
template <class T, int K, class F, class... In>
__device__ __forceinline__ void map_elements(AnyTeam auto team, int64_t count, F f, const Outputs<T, K>& out,
                                             const In*... in) {
  const auto inputs = std::index_sequence_for<In...>();
  if constexpr (std::is_same_v<decltype(team), BlockTeam>) {
    map_vectors<1>(inputs, team, 0, count, f, out, in...);
  } else {
    bool whole = aligned(in...);
    for (int j = 0; j < K; ++j) whole &= aligned(out.of[j]);
    const int64_t vectors = whole ? count / kVector<T> : 0, done = vectors * kVector<T>;
    if (vectors) map_vectors<kVector<T>>(inputs, team, 0, vectors, f, out, in...);
    map_vectors<1>(inputs, team, done, count - done, f, out, in...);
  }
}
template <class T, class F, class... In>
__device__ __forceinline__ void map_elements(AnyTeam auto team, int64_t count, F f, T* out, const In*... in) {
  map_elements(team, count, f, Outputs<T, 1>{{out}}, in...);
}

inline Grid element_grid(int64_t elements) { return {element_blocks(elements)}; }

/// The number of elements of the layer's input, for one task.
__device__ __forceinline__ int64_t input_elements(const Layer& l) { return l.n * l.in.c * l.in.h * l.in.w; }

template <class T>
__device__ __forceinline__ void put(T* to, int64_t i, T value, bool add) {
  to[i] = add ? to[i] + value : value;
}

}  // namespace maml::cuda
