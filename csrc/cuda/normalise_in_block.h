// y = pool(f(BatchNorm(x))) for the interpreter (run/interpreter.h): the passes of normalise.h, one group of
// channels after the other. The moments of x come from the statistics of the convolution before it; where
// there are none, the block computes them tile by tile, as the kernels do. The sums of cotangents run over
// all rows at once. One block computes a pass, or several blocks the first pass of a run (run/small_run.h): a
// forward pass whose statistics are there.
#pragma once

#include "cuda/normalise.h"
#include "cuda/run/program.h"
#include "layers/kinds.h"

namespace maml::cuda {

/// f of the layer, found at run time among those that one block has: the identity of a batch_norm, ReLU and
/// leaky ReLU. Others would be most of the interpreter's code.
struct BlockActivation {
  static constexpr bool has(Function f) { return f == Function::relu || f == Function::leaky_relu; }

  template <class T, int N>
  static __device__ __forceinline__ Derivatives<Numbers<T, N>> at(const Layer& l, const Numbers<T, N>& u) {
    if (l.kind == Kind::batch_norm) return Identity::at(l, u);
    if (l.function == Function::relu) return Activation<Function::relu>::at(l, u);
    return Activation<Function::leaky_relu>::at(l, u);
  }
};

struct NormaliseInBlock {
  template <class T>
  static __device__ void run(Op op, const Layer& l, const Tensors<T>& t) {
    if (op == Op::forward || op == Op::forward_tangent) return run_forward(op, block_team(), l, t);
    const int cells = static_cast<int>(input_cells(l));
    for (int group = 0; group < groups_of<T>(l); ++group) {
      if (op == Op::backward) {
        normalise_backward<BlockActivation>(block_team(), group, l, t, Partials<T>{}, cells);
      } else {
        normalise_backward_tangent<BlockActivation>(block_team(), group, l, t, Partials<T>{}, cells);
      }
    }
  }

  /// forward, or forward_tangent, by a team of several blocks if it has the statistics that it needs.
  template <class T>
  static __device__ void run_forward(Op op, Team team, const Layer& l, const Tensors<T>& t) {
    for (int group = 0; group < groups_of<T>(l); ++group) {
      if (op == Op::forward) {
        const Partials<T> p = moments_of<1>(group, l, t.x[0], t.x[0], t.x[1], t.statistics, t.scratch);
        normalise_forward<BlockActivation>(team, group, l, t, p);
      } else {
        Partials<T> p{};
        if (t.x_dot[0]) p = moments_of<2>(group, l, t.x[0], t.x_dot[0], t.x[1], t.statistics_dot, t.scratch);
        normalise_forward_tangent<BlockActivation>(team, group, l, t, p);
      }
    }
  }

 private:
  template <class T>
  static __device__ int groups_of(const Layer& l) {
    return static_cast<int>(channel_groups<kVector<T>>(l.in.c));
  }
  /// The moments of a [rows, c], or of a and b, of a group of channels: taken before, or computed into
  /// scratch.
  template <int kMeans, class T>
  static __device__ __forceinline__ Partials<T> moments_of(int group, const Layer& l, const T* a, const T* b,
                                                           const T* shares, T* taken, T* scratch) {
    if (taken) return taken_partials(l.n * l.in.h * l.in.w, l.in.c, taken);
    const int samples = counted_samples(shares, static_cast<int>(l.n));
    const int rows = samples * static_cast<int>(l.in.h * l.in.w);
    const int count = (rows + kTileRows - 1) / kTileRows;
    for (int tile = 0; tile < count; ++tile) {
      tile_moments<kMeans>(Team{tile, count}, group, rows, l.in.c, a, b, scratch);
    }
    __syncthreads();  // the entries are read by other threads
    return {scratch, count, kTileRows, rows};
  }
};

}  // namespace maml::cuda
