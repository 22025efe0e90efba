// y = softmax(scale q k' + bias) v, for all tasks (the formulas are in layers/attention.h). Nothing as large
// as the scores is stored: a pass computes them again, tile by tile, in shared memory and registers.
//
// A launch computes one result. A block has kSide rows of it (a tile of queries for y, grad_q and their
// tangents; of keys for grad_k and grad_v; of both for grad_bias) and up to kColumns of its columns, in
// registers, and goes over the tiles of the other axis:
//
//   forward            y       += P V, with a running maximum and sum of each row (online softmax)
//   backward           grad_q  += scale dS K,   grad_k += scale dS' Q,   grad_v += P' G
//   forward_tangent    y_dot   += (P o Rs) V + P RV, and E; then - E y, because Rp = P o Rs - E P
//   backward_tangent   the tangents of the results of `backward`, each the sum of two such products
//
// P of a tile follows from the two numbers m, r that the forward pass saved for each row, Rp with E from the
// tangent. The means over a row D = <g, y> and R{D} = <Rg, y> + <g, Ry> are sums over the width.
//
// Batch: the axes of samples and heads along which the result has a stride are spread over blocks. Along the
// others, such as the heads that share one k, the block goes over all indices and sums. A result that has no
// stride along its own rows or columns is computed in scratch and summed from there.
//
// Threads and tiles: attention_block.h. The twin on the CPU is cpu/attention.cpp.
#include "cuda/attention_block.h"
#include "cuda/run/work.h"
#include "cuda/shares.h"

namespace maml::cuda {
namespace attention {
namespace {

/// blockIdx: x (index of the batch, tile of the result's rows), y columns of the result (of the bias: a
/// tile), z task. `result`: kQ, kK, kV or kBias of a backward pass, or kY.
template <class T, Pass pass, Operand result>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    attention_kernel(const __grid_constant__ Attend<T> p, Deferred deferred) {
  const Memory memory = deferred.ready();
  __shared__ Shared<T> shared;
  Block<T> block(p, memory, blockIdx.z, shared);
  const bool by_keys = result == kK || result == kV;
  const int rows = by_keys ? p.keys : p.queries, tiles = (rows + kSide - 1) / kSide;
  const int tile = static_cast<int>(blockIdx.x) % tiles * kSide;
  const int first_column = static_cast<int>(blockIdx.y) * (result == kBias ? kSide : kColumns);
  const Offsets<kOperands> start = outer_step(p.batch, static_cast<int>(blockIdx.x) / tiles);
  [[maybe_unused]] const bool tangent = pass == Pass::backward_tangent && p.g;
  each_step(p.batch.inner, start, [&](const Offsets<kOperands>& at) {
    block.at_index(at);
    if constexpr (result == kY) {
      if constexpr (pass == Pass::forward) {
        block.forward(tile, first_column);
      } else {
        block.forward_tangent(tile, first_column);
      }
    } else if constexpr (result == kBias) {
      block.load_rows(tile, tangent, true);
      const auto t = block.template cotangents_of_scores<pass>(tile, first_column);
      for (int r = 0; r < 2; ++r)
        for (int c = 0; c < 4; ++c) block.sums[0].at[r][c] += t.first.at[r][c];
    } else if constexpr (result == kQ) {
      block.load_rows(tile, tangent, true);
      for (int j0 = 0; j0 < p.keys; j0 += kSide) {
        block.accumulate(block.template cotangents_of_scores<pass>(tile, j0), true, kK, p.x[kK],
                         tangent ? p.x_dot[kK] : nullptr, j0, first_column);
      }
    } else {
      for (int i0 = 0; i0 < p.queries; i0 += kSide) {
        block.load_rows(i0, tangent, result == kK);
        if constexpr (result == kK) {
          block.accumulate(block.template cotangents_of_scores<pass>(i0, tile), false, kQ, p.x[kQ],
                           tangent ? p.x_dot[kQ] : nullptr, i0, first_column);
        } else {
          block.accumulate(block.template weights_of_values<pass>(i0, tile), false, kY,
                           pass == Pass::backward ? p.g : p.g_dot, tangent ? p.g : nullptr, i0, first_column);
        }
      }
    }
  });
  const int columns = result == kBias ? p.keys : result == kQ || result == kK ? p.depth : p.width;
  const T scale = result == kQ || result == kK ? p.scale : T(1);
  block.write(scale, tile, rows, first_column,
              result == kBias ? std::min(columns, first_column + kSide) : columns);
}

/// The matrices of an operand: their rows and columns, and the strides of both.
struct Own {
  int64_t rows, columns, row, column;
  Own(const Loops& loops, int o) {
    const View& view = o == kY ? loops.y : loops.x[o];
    const int first = loops.axes - 4, i = first + kAttentionAxes[o][0], j = first + kAttentionAxes[o][1];
    rows = loops.size[i], columns = loops.size[j], row = view.stride[i], column = view.stride[j];
  }
  /// Whether several elements of a matrix are one element of the operand.
  bool spread() const { return (rows > 1 && row == 0) || (columns > 1 && column == 0); }
};

/// The elements of all matrices of an operand, along the axes of the batch that it has; and their strides in
/// row-major order.
int64_t matrices(const Loops& loops, int64_t n, const View& view, int64_t of_one, View& row_major) {
  int64_t count = of_one;
  for (int a = loops.axes - 5; a >= 0; --a) {
    if (view.stride[a] == 0) continue;
    row_major.stride[a] = count;
    count *= extent(loops, a, n);
  }
  return count;
}

/// The multiply-adds of a launch for a query and a key.
int64_t work_of_pair(Pass pass, Operand result, const AttentionSizes& s) {
  const bool of_scores = result != kY && result != kV;
  const int64_t last = result == kBias ? 0 : result == kQ || result == kK ? s.depth : s.width;
  switch (pass) {
    case Pass::forward:
      return s.depth + last;
    case Pass::backward:
      return s.depth + last + (of_scores ? s.width : 0);
    case Pass::forward_tangent:
      return 3 * s.depth + 2 * last;
    case Pass::backward_tangent:
      return 3 * s.depth + 2 * last + (of_scores ? 3 * s.width : 0);
  }
  return 0;
}

/// Launches the kernel of one result; nothing where it is not wanted.
template <class T, Pass pass, Operand result>
void compute(const Launcher& launch, const char* name, const Layer& l, const Tensors<T>& t, bool add,
             T* out) {
  if (!out) return;
  const Loops& loops = *l.loops;
  const AttentionSizes sizes(loops);
  const View& view = result == kY ? loops.y : loops.x[result];
  const Own own(loops, result);
  const bool bends = pass != Pass::backward_tangent || (t.grad_y && t.y_dot);
  View saved, scratch;
  View all_axes;
  std::fill_n(all_axes.stride, kMostAxes, 1);
  matrices(loops, l.n, all_axes, sizes.queries, saved);
  matrices(loops, l.n, view, own.rows * own.columns, scratch);
  const View& to = own.spread() ? scratch : view;

  Loops batch = loops;
  batch.axes -= 4;
  Attend<T> p{};
  p.batch = split<kOperands>(
      batch, l.n, view, {&loops.x[kQ], &loops.x[kK], &loops.x[kV], &loops.x[kBias], &loops.y, &saved, &to});
  for (int o = 0; o < kSaved; ++o) {
    const Own of(loops, o);
    p.row[o] = of.row, p.column[o] = of.column;
  }
  p.row[kOut] = own.spread() ? own.columns : own.row, p.column[kOut] = own.spread() ? 1 : own.column;
  p.queries = static_cast<int>(sizes.queries), p.keys = static_cast<int>(sizes.keys);
  p.depth = static_cast<int>(sizes.depth), p.width = static_cast<int>(sizes.width);
  p.scale = static_cast<T>(l.a), p.empty_is_zero = l.b != 0;
  for (int j = 0; j < 4; ++j) p.x[j] = t.x[j], p.x_dot[j] = bends ? t.x_dot[j] : nullptr;
  p.y = t.y, p.y_dot = bends ? t.y_dot : nullptr;
  p.g = bends ? t.grad_y : nullptr, p.g_dot = pass == Pass::backward_tangent ? t.grad_y_dot : nullptr;
  p.saved = t.saved, p.saved_dot = t.saved_dot;
  p.out = own.spread() ? t.scratch : out, p.add = add && !own.spread();
  const int64_t reached = p.batch.outer.steps * own.rows * own.columns;
  if (!own.spread()) clear_unless_reached(launch, view, l.n, reached, add, out);
  note([&] {
    Work work = traffic<T>(
        attention_batch(loops, l.n) * (sizes.queries + sizes.keys) * (sizes.depth + sizes.width), 1);
    work.flop = 2.0 * static_cast<double>(attention_batch(loops, l.n) * sizes.queries * sizes.keys *
                                          work_of_pair(pass, result, sizes));
    return work;
  });
  launch(name, attention_kernel<T, pass, result>,
         {p.batch.outer.steps * blocks_for(own.rows, kSide),
          blocks_for(own.columns, result == kBias ? kSide : kColumns)},
         kThreads, 0, p, launch.memory);
  if (!own.spread()) return;
  Loops rest = loops;
  for (int a = 0; a < loops.axes; ++a) {
    const int i = a - (loops.axes - 4);
    const bool has =
        i < 0 ? view.stride[a] != 0 : i == kAttentionAxes[result][0] || i == kAttentionAxes[result][1];
    if (!has) rest.size[a] = 1;
    if (has && i >= 0) scratch.stride[a] = i == kAttentionAxes[result][0] ? own.columns : 1;
  }
  sum(launch, "attention spread", rest, l.n, scratch, view, T(1), t.scratch, add, out);
}

template <class T, Pass pass>
void compute_cotangents(const Launcher& launch, const Layer& l, const Tensors<T>& t, T* const* grad) {
  compute<T, pass, kQ>(launch, "attention queries", l, t, t.add_x[kQ], grad[kQ]);
  compute<T, pass, kK>(launch, "attention keys", l, t, t.add_x[kK], grad[kK]);
  compute<T, pass, kV>(launch, "attention values", l, t, t.add_x[kV], grad[kV]);
  compute<T, pass, kBias>(launch, "attention bias", l, t, t.add_x[kBias], grad[kBias]);
}

}  // namespace
}  // namespace attention

template <>
struct OnGpu<Kind::attention> {
  static Footprint footprint(const Layer& l) {
    const int64_t rows = attention_batch(*l.loops, l.n) * AttentionSizes(*l.loops).queries;
    int64_t scratch = 0;
    for (int o = 0; o < kMostInputs; ++o) {
      const attention::Own own(*l.loops, o);
      View ignored;
      if (!own.spread()) continue;
      scratch = std::max(scratch,
                         attention::matrices(*l.loops, l.n, l.loops->x[o], own.rows * own.columns, ignored));
    }
    return {2 * rows, scratch, rows};
  }
  template <class T>
  static LaunchPasses<T> passes() {
    return {
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          attention::compute<T, attention::Pass::forward, attention::kY>(launch, "attention", l, t, false,
                                                                         t.y);
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          attention::compute_cotangents<T, attention::Pass::backward>(launch, l, t, t.grad_x);
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          attention::compute<T, attention::Pass::forward_tangent, attention::kY>(launch, "attention tangent",
                                                                                 l, t, false, t.y_dot);
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          attention::compute_cotangents<T, attention::Pass::backward_tangent>(launch, l, t, t.grad_x_dot);
        },
    };
  }
};
template struct Implementation<Kind::attention>;

}  // namespace maml::cuda
