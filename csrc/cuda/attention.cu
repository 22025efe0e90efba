// y = softmax(scale q k' + bias) v, for all tasks (the formulas are in layers/attention.h). Nothing as large
// as the scores is stored: a pass computes them again, tile by tile, in shared memory and registers.
//
// A launch computes one result, or the cotangents of q, k and v in blocks of their own. A block has kSide
// rows of a result (a tile of queries for y, grad_q and their tangents; of keys for grad_k and grad_v; of
// both for grad_bias) and up to kColumns of its columns, in registers, and goes over the tiles of the other
// axis:
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
// Cotangents that are computed together must have no element in common. Where q, k and v are parts of one
// value, as of a projection to all three, it is tested that their parts are (disjoint).
//
// Threads and tiles: attention_block.h. The twin on the CPU is cpu/attention.cpp.
#include <algorithm>
#include <vector>

#include "cuda/attention_block.h"
#include "cuda/run/work.h"
#include "cuda/shares.h"

namespace maml::cuda {
namespace attention {
namespace {

/// Block `index` of one result, counted as [index of the batch, tile of rows, block of columns]; the bias has
/// tiles of columns. `result`: kQ, kK, kV or kBias of a backward pass, or kY.
template <Pass pass, Operand result, class T>
__device__ __forceinline__ void attend(const Attend<T>& p, int index, const Memory& memory,
                                       Shared<T>& shared) {
  Block<T> block(p, memory, blockIdx.z, shared);
  const bool by_keys = result == kK || result == kV;
  const int rows = by_keys ? p.keys : p.queries, tiles = (rows + kSide - 1) / kSide;
  const int place = index / p.column_blocks;
  const int tile = place % tiles * kSide;
  const int first_column = (index - place * p.column_blocks) * (result == kBias ? kSide : kColumns);
  const Offsets<kOperands> start = outer_step(p.batch, place / tiles);
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

/// blockIdx: x block, z task.
template <class T, Pass pass, Operand result>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    attention_kernel(const __grid_constant__ Attend<T> p, Deferred deferred) {
  const Memory memory = deferred.ready();
  __shared__ Shared<T> shared;
  attend<pass, result>(p, static_cast<int>(blockIdx.x), memory, shared);
}

/// The cotangents of q, k and v, or some of them.
template <class T>
struct Cotangents {
  Attend<T> of[3];
  int keys, values;  // the first blocks of the cotangents of k and v
};
static_assert(sizeof(Cotangents<double>) + sizeof(Deferred) <= 4096);  // of arguments

template <class T, Pass pass>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    attention_cotangents_kernel(const __grid_constant__ Cotangents<T> p, Deferred deferred) {
  const Memory memory = deferred.ready();
  __shared__ Shared<T> shared;
  const int index = static_cast<int>(blockIdx.x);
  if (index < p.keys) {
    attend<pass, kQ>(p.of[kQ], index, memory, shared);
  } else if (index < p.values) {
    attend<pass, kK>(p.of[kK], index - p.keys, memory, shared);
  } else {
    attend<pass, kV>(p.of[kV], index - p.values, memory, shared);
  }
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

/// A result: what its kernel takes, and where it goes.
template <class T>
struct Computed {
  Attend<T> p{};
  int64_t blocks = 0, reached = 0;  // reached: elements of the operand
  View scratch;                     // of a result that is computed there
  bool spread = false;
  Work work;
};

template <class T, Pass pass, Operand result>
Computed<T> prepare(const Layer& l, const Tensors<T>& t, bool add, T* out) {
  const Loops& loops = *l.loops;
  const AttentionSizes sizes(loops);
  const View& view = result == kY ? loops.y : loops.x[result];
  const Own own(loops, result);
  const bool bends = pass != Pass::backward_tangent || (t.grad_y && t.y_dot);
  Computed<T> c;
  c.spread = own.spread();
  View saved;
  View all_axes;
  std::fill_n(all_axes.stride, kMostAxes, 1);
  matrices(loops, l.n, all_axes, sizes.queries, saved);
  matrices(loops, l.n, view, own.rows * own.columns, c.scratch);
  const View& to = c.spread ? c.scratch : view;

  Loops batch = loops;
  batch.axes -= 4;
  Attend<T>& p = c.p;
  p.batch = split<kOperands>(
      batch, l.n, view, {&loops.x[kQ], &loops.x[kK], &loops.x[kV], &loops.x[kBias], &loops.y, &saved, &to});
  for (int o = 0; o < kSaved; ++o) {
    const Own of(loops, o);
    p.row[o] = of.row, p.column[o] = of.column;
  }
  p.row[kOut] = c.spread ? own.columns : own.row, p.column[kOut] = c.spread ? 1 : own.column;
  p.queries = static_cast<int>(sizes.queries), p.keys = static_cast<int>(sizes.keys);
  p.depth = static_cast<int>(sizes.depth), p.width = static_cast<int>(sizes.width);
  p.scale = static_cast<T>(l.a), p.empty_is_zero = l.b != 0;
  for (int j = 0; j < 4; ++j) p.x[j] = t.x[j], p.x_dot[j] = bends ? t.x_dot[j] : nullptr;
  p.y = t.y, p.y_dot = bends ? t.y_dot : nullptr;
  p.g = bends ? t.grad_y : nullptr, p.g_dot = pass == Pass::backward_tangent ? t.grad_y_dot : nullptr;
  p.saved = t.saved, p.saved_dot = t.saved_dot;
  p.out = c.spread ? t.scratch : out, p.add = add && !c.spread;
  p.column_blocks = static_cast<int>(blocks_for(own.columns, result == kBias ? kSide : kColumns));
  c.blocks = p.batch.outer.steps * blocks_for(own.rows, kSide) * p.column_blocks;
  c.reached = p.batch.outer.steps * own.rows * own.columns;
  c.work =
      traffic<T>(attention_batch(loops, l.n) * (sizes.queries + sizes.keys) * (sizes.depth + sizes.width), 1);
  c.work.flop = 2.0 * static_cast<double>(attention_batch(loops, l.n) * sizes.queries * sizes.keys *
                                          work_of_pair(pass, result, sizes));
  return c;
}

/// Launches the kernel of one result; nothing where it is not wanted.
template <class T, Pass pass, Operand result>
void compute(const Launcher& launch, const char* name, const Layer& l, const Tensors<T>& t, bool add,
             T* out) {
  if (!out) return;
  const Loops& loops = *l.loops;
  const View& view = result == kY ? loops.y : loops.x[result];
  Computed<T> c = prepare<T, pass, result>(l, t, add, out);
  if (!c.spread) clear_unless_reached(launch, view, l.n, c.reached, add, out);
  note([&] { return c.work; });
  if constexpr (result == kY || result == kBias) {
    launch(name, attention_kernel<T, pass, result>, {c.blocks}, kThreads, 0, c.p, launch.memory);
  } else {
    Cotangents<T> alone{};
    alone.of[result] = c.p;
    alone.keys = result == kQ ? static_cast<int>(c.blocks) : 0;
    alone.values = result == kV ? 0 : static_cast<int>(c.blocks);
    launch(name, attention_cotangents_kernel<T, pass>, {c.blocks}, kThreads, 0, alone, launch.memory);
  }
  if (!c.spread) return;
  const Own own(loops, result);
  Loops rest = loops;
  for (int a = 0; a < loops.axes; ++a) {
    const int i = a - (loops.axes - 4);
    const bool has =
        i < 0 ? view.stride[a] != 0 : i == kAttentionAxes[result][0] || i == kAttentionAxes[result][1];
    if (!has) rest.size[a] = 1;
    if (has && i >= 0) c.scratch.stride[a] = i == kAttentionAxes[result][0] ? own.columns : 1;
  }
  sum(launch, "attention spread", rest, l.n, c.scratch, view, T(1), t.scratch, add, out);
}

/// An axis of an operand.
struct Steps {
  int64_t stride, size;
  friend bool operator==(const Steps&, const Steps&) = default;
};
/// The axes that an operand has, by their strides; and, if `count` is not 1, one with `count` places at this
/// distance.
std::vector<Steps> steps_of(const Loops& loops, int64_t n, const View& view, int64_t distance = 0,
                            int64_t count = 1) {
  std::vector<Steps> steps;
  for (int a = 0; a < loops.axes; ++a) {
    if (view.stride[a] != 0 && extent(loops, a, n) > 1)
      steps.push_back({view.stride[a], extent(loops, a, n)});
  }
  if (count > 1) steps.push_back({distance, count});
  std::sort(steps.begin(), steps.end(), [](const Steps& a, const Steps& b) { return a.stride < b.stride; });
  return steps;
}

/// Whether these operands are parts of one value without an element in common: they have the same axes, and
/// are at equal distances; and all of it is a nest of axes, of which each step is longer than all steps of
/// the axes inside it together.
bool disjoint(const Loops& loops, int64_t n, std::vector<const View*> parts) {
  std::sort(parts.begin(), parts.end(), [](const View* a, const View* b) { return a->offset < b->offset; });
  const int64_t distance = parts[1]->offset - parts[0]->offset;
  for (size_t i = 1; i < parts.size(); ++i) {
    if (parts[i]->offset - parts[i - 1]->offset != distance) return false;
    if (steps_of(loops, n, *parts[i]) != steps_of(loops, n, *parts[0])) return false;
  }
  int64_t reach = 0;
  for (const Steps& s : steps_of(loops, n, *parts[0], distance, static_cast<int64_t>(parts.size()))) {
    if (s.stride <= reach) return false;
    reach += s.stride * (s.size - 1);
  }
  return true;
}

/// The cotangents of q, k and v in one launch; false if they need several.
template <class T, Pass pass>
bool compute_together(const Launcher& launch, const Layer& l, const Tensors<T>& t, T* const* grad) {
  if (!grad[kQ] || !grad[kK] || !grad[kV]) return false;
  const Loops& loops = *l.loops;
  Computed<T> of[] = {prepare<T, pass, kQ>(l, t, t.add_x[kQ], grad[kQ]),
                      prepare<T, pass, kK>(l, t, t.add_x[kK], grad[kK]),
                      prepare<T, pass, kV>(l, t, t.add_x[kV], grad[kV])};
  for (int o : {kQ, kK, kV}) {
    if (of[o].spread) return false;
    std::vector<const View*> parts;
    int first = o;  // of the same value
    for (int other : {kV, kK, kQ}) {
      if (grad[other] != grad[o]) continue;
      parts.push_back(&loops.x[other]);
      first = other;
    }
    if (parts.size() > 1 && !disjoint(loops, l.n, parts)) return false;
    of[o].p.add = t.add_x[first];  // the others would add to what the first has written
  }
  for (int o : {kQ, kK, kV}) {
    int64_t reached = 0;
    bool is_first = true;
    for (int other : {kQ, kK, kV}) {
      if (grad[other] != grad[o]) continue;
      reached += of[other].reached;
      is_first &= other >= o;
    }
    if (is_first) clear_unless_reached(launch, loops.x[o], l.n, reached, of[o].p.add, grad[o]);
  }
  Cotangents<T> all{};
  for (int o : {kQ, kK, kV}) all.of[o] = of[o].p;
  all.keys = static_cast<int>(of[kQ].blocks), all.values = all.keys + static_cast<int>(of[kK].blocks);
  note([&] { return of[kQ].work + of[kK].work + of[kV].work; });
  launch("attention cotangents", attention_cotangents_kernel<T, pass>, {all.values + of[kV].blocks}, kThreads,
         0, all, launch.memory);
  return true;
}

template <class T, Pass pass>
void compute_cotangents(const Launcher& launch, const Layer& l, const Tensors<T>& t, T* const* grad) {
  if (!compute_together<T, pass>(launch, l, t, grad)) {
    compute<T, pass, kQ>(launch, "attention queries", l, t, t.add_x[kQ], grad[kQ]);
    compute<T, pass, kK>(launch, "attention keys", l, t, t.add_x[kK], grad[kK]);
    compute<T, pass, kV>(launch, "attention values", l, t, t.add_x[kV], grad[kV]);
  }
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
