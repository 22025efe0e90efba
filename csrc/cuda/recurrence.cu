// recurrence: a layer of an LSTM, GRU or RNN over time (layers/recurrence.h; the formulas of a step are in
// layers/cells.h), for all tasks.
//
//   before        a = x W_ih of all steps at once, and its tangent: one contraction (contraction.h), in the
//                 layer's precision
//   over time     y and what is saved; backwards, the cotangents of both sides of each cell, a and u, and
//                 those of the states, which are carried from step to step (recurrence_steps.h)
//   then          grad_x and the gradients of both weights: contractions of these cotangents over all steps;
//                 sums of them for the biases and the initial states
//
// The twin on the CPU is cpu/recurrence.cpp.
#include <algorithm>

#include "cuda/contraction.h"
#include "cuda/recurrence_steps.h"
#include "cuda/run/work.h"
#include "cuda/shares.h"

namespace maml::cuda {
namespace {

using namespace recurrence;

/// The contractions of a layer, over samples, steps, the input's elements or units, and columns.
struct OverRows {
  Loops loops;
  View x, w, rows;  // an input or state, its weight, and the rows of columns

  /// Of the input and W_ih.
  static OverRows of_input(const Layer& l) {
    const RecurrenceSizes r(l.loops[0], l.n);
    OverRows o(l, r.length, r.in, 0);
    o.x = l.loops[0].x[0];
    o.x.stride[0] = o.x.size, o.x.stride[2] = 1, o.x.stride[3] = 0;
    return o;
  }
  /// Of y before all steps but the first one, and W_hh.
  static OverRows of_output(const Layer& l) {
    const RecurrenceSizes r(l.loops[0], l.n);
    OverRows o(l, r.length - 1, r.hidden, 1);
    o.x = {r.of_sample, true, false, 0, {r.of_sample, r.hidden, 1, 0}};
    return o;
  }
  /// Of the initial h, zero where it is not `given`, and W_hh.
  static OverRows of_state(const Layer& l, bool given) {
    const RecurrenceSizes r(l.loops[0], l.n);
    OverRows o(l, 1, r.hidden, 0);
    if (!given) {  // it is not read, and has no loops
      o.x = {r.hidden, true, true, 0, {r.hidden, 0, 1, 0}};
      return o;
    }
    o.x = l.loops[1].x[0];
    o.x.stride[1] = 0, o.x.stride[2] = 1, o.x.stride[3] = 0;
    return o;
  }

  Contraction to_rows(const Layer& l, const char* name) const {
    return {name, loops, l.n, rows, x, w, l.precision};
  }
  Contraction to_x(const Layer& l, const char* name) const {
    return {name, loops, l.n, x, rows, w, l.precision};
  }
  Contraction to_w(const Layer& l, const char* name) const {
    return {name, loops, l.n, w, x, rows, l.precision};
  }

 private:
  OverRows(const Layer& l, int64_t steps, int64_t depth, int64_t first_step) {
    const RecurrenceSizes r(l.loops[0], l.n);
    const int64_t width = gates_of(l.cell) * r.hidden;
    loops.axes = 4;
    loops.size[0] = kSamples, loops.size[1] = steps, loops.size[2] = depth, loops.size[3] = width;
    w = {depth * width, false, true, 0, {0, 0, width, 1}};
    rows = {r.length * width, true, true, first_step * r.n * width, {width, r.n * width, 0, 1}};
  }
};

/// The sizes of scratch: cotangents of the sides, carried states, and splits of contractions.
struct Scratch {
  int64_t sides, carried, splits;
  explicit Scratch(const Layer& l) {
    const RecurrenceSizes r(l.loops[0], l.n);
    with_cell(l.cell, [&]<Cell C> {
      sides = 2 * Rows<float, C>::kSides * r.n * r.length * CellDeclaration<C>::gates * r.hidden;
      carried = CellDeclaration<C>::states * r.n * r.hidden;
    });
    const OverRows input = OverRows::of_input(l);
    splits = std::max({contraction_scratch(input.to_rows(l, "")), contraction_scratch(input.to_x(l, "")),
                       contraction_scratch(input.to_w(l, ""))});
    if (r.length > 1) splits = std::max(splits, contraction_scratch(OverRows::of_output(l).to_w(l, "")));
  }
};

/// One factor of each of two terms: the tangent of one of them, beside the other's primal.
template <class T>
class Contracted {
 public:
  Contracted(const Launcher& launch, T* scratch) : launch_(launch), scratch_(scratch) {}

  /// `out` (+)= the sum of the terms that have both factors.
  void operator()(const Contraction& c, Factors<T> first, Factors<T> second, bool add, T* out) const {
    Factors<T> known[2];
    int count = 0;
    for (const Factors<T>& f : {first, second}) {
      if (f.a && f.b) known[count++] = f;
    }
    contract(launch_, c, known, count, T(1), add, out, scratch_);
  }

 private:
  const Launcher& launch_;
  T* scratch_;
};

/// What follows the passes backwards in time: the cotangents of inputs and parameters. `second`: there are
/// second cotangents.
template <Cell C, class T>
void finish(const Launcher& launch, const Layer& l, const Sequence& sequence, const Tensors<T>& t,
            bool second, T* const* grad_x, T* const* grad_w) {
  const RecurrenceSizes& r = sequence.sizes;
  const Scratch scratch(l);
  T* const carried = t.scratch + scratch.sides;
  const Contracted<T> contracted(launch, carried + scratch.carried);
  constexpr int kSides = Rows<T, C>::kSides;
  /// The cotangents of side p, or the second ones.
  const auto side = [&](int p, bool primal) -> const T* {
    if (primal && !second) return nullptr;
    return t.scratch + scratch.sides / (2 * kSides) * (primal * kSides + (kSides == 2 ? p : 0));
  };
  const OverRows input = OverRows::of_input(l);
  if (grad_w[0]) {
    contracted(input.to_w(l, "recurrence input weight gradient"), {t.x[0], side(0, false)},
               {t.x_dot[0], side(0, true)}, t.add_w[0], grad_w[0]);
  }
  if (grad_w[1]) {
    bool add = t.add_w[1];
    const char* name = "recurrence weight gradient";
    if (r.length > 1) {
      const OverRows output = OverRows::of_output(l);
      contracted(output.to_w(l, name), {t.y, side(1, false)}, {t.y_dot, side(1, true)}, add, grad_w[1]);
      add = true;
    }
    if (t.x[1] || !add) {
      const OverRows state = OverRows::of_state(l, t.x[1] != nullptr);
      contracted(state.to_w(l, name), {t.x[1], side(1, false)}, {t.x_dot[1], side(1, true)}, add, grad_w[1]);
    }
  }
  Loops rows = input.loops;
  rows.size[2] = 1;
  for (int p = 2; p < 4; ++p) {
    if (!grad_w[p]) continue;
    const View bias{rows.size[3], false, true, 0, {0, 0, 0, 1}};
    note([&] { return traffic<T>(elements(input.rows, l.n), 1); });
    sum(launch, "recurrence bias gradient", rows, l.n, input.rows, bias, T(1), side(p - 2, false), t.add_w[p],
        grad_w[p]);
  }
  if (grad_x[0]) {
    contracted(input.to_x(l, "recurrence input gradient"), {side(0, false), t.w[0]},
               {side(0, true), t.w_dot[0]}, t.add_x[0], grad_x[0]);
  }
  for (int k = 0; k < CellDeclaration<C>::states; ++k) {
    if (!grad_x[1 + k]) continue;
    const View from{r.hidden, true, true, 0, {r.hidden, 1}};
    sum(launch, "recurrence state gradient", l.loops[1 + k], l.n, from, l.loops[1 + k].x[0], T(1),
        carried + k * r.n * r.hidden, t.add_x[1 + k], grad_x[1 + k]);
  }
}

/// The work of a pass over time with one recurrent weight, or two.
template <Cell C, class T>
Work work_over_time(const RecurrenceSizes& r, bool two) {
  using Declared = CellDeclaration<C>;
  const double units = static_cast<double>(r.n * r.length * r.hidden), weights = two ? 2 : 1;
  const double width = static_cast<double>(Declared::gates * r.hidden);
  const double of_unit = 1 + Declared::gates + Declared::saved + Declared::states;
  return {.flop = 2 * units * width * weights,
          .bytes = weights * (units * of_unit + static_cast<double>(r.hidden) * width) * sizeof(T)};
}

/// The initial states that a layer is given; a state that is a parameter may still lack every tensor but x.
template <class T>
int given_states(const Tensors<T>& t) {
  return t.x[2] ? 2 : t.x[1] ? 1 : 0;
}

/// Calls f<C>(sequence, grid, shared bytes) for a pass with one recurrent weight, or two.
template <class T, class F>
void run(const Layer& l, const Tensors<T>& t, bool two, F f) {
  Sequence sequence(l, given_states(t));
  const RecurrenceSizes& r = sequence.sizes;
  const int64_t width = gates_of(l.cell) * r.hidden, size = static_cast<int64_t>(sizeof(T));
  int device = 0;
  check(cudaGetDevice(&device), "asking for the device");
  const auto most = static_cast<int64_t>(most_shared_bytes(device));
  int64_t bytes = Recurrent<T>::elements(width) * size;
  const int64_t of_weight = r.hidden * padded(width) * size;
  for (; sequence.resident < 1 + two && bytes + of_weight <= most; bytes += of_weight) ++sequence.resident;
  with_cell(l.cell, [&]<Cell C> {
    f.template operator()<C>(sequence, Grid{sequence.sizes.n}, static_cast<size_t>(bytes));
  });
}

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const Scratch scratch(l);
  const OverRows input = OverRows::of_input(l);
  Contracted<T>(launch, t.scratch + scratch.sides)(input.to_rows(l, "recurrence input"), {t.x[0], t.w[0]}, {},
                                                   false, t.scratch);
  run(l, t, false, [&]<Cell C>(const Sequence& sequence, Grid grid, size_t shared) {
    note([&] { return work_over_time<C, T>(sequence.sizes, false); });
    launch("recurrence forward", forward_kernel<C, T>, grid, kElementThreads, shared, sequence, t, t.scratch,
           launch.memory);
  });
}

/// Backwards in time for a cotangent g of y.
template <class T>
void back(const Launcher& launch, const Layer& l, const Tensors<T>& t, const T* g, T* const* grad_x,
          T* const* grad_w, bool keep) {
  run(l, t, false, [&]<Cell C>(const Sequence& sequence, Grid grid, size_t shared) {
    note([&] { return work_over_time<C, T>(sequence.sizes, false); });
    launch("recurrence backward", backward_kernel<C, T>, grid, kElementThreads, shared, sequence, t, g, keep,
           launch.memory);
    finish<C>(launch, l, sequence, t, false, grad_x, grad_w);
  });
}
template <class T>
void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  back(launch, l, t, t.grad_y, t.grad_x, t.grad_w, true);
}

template <class T>
void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const Scratch scratch(l);
  const OverRows input = OverRows::of_input(l);
  const bool moves = t.x_dot[0] || t.w_dot[0];
  if (moves) {
    Contracted<T>(launch, t.scratch + scratch.sides)(input.to_rows(l, "recurrence input tangent"),
                                                     {t.x_dot[0], t.w[0]}, {t.x[0], t.w_dot[0]}, false,
                                                     t.scratch);
  }
  run(l, t, t.w_dot[1], [&]<Cell C>(const Sequence& sequence, Grid grid, size_t shared) {
    note([&] { return work_over_time<C, T>(sequence.sizes, t.w_dot[1]); });
    launch("recurrence forward tangent", forward_tangent_kernel<C, T>, grid, kElementThreads, shared,
           sequence, t, moves ? t.scratch : nullptr, launch.memory);
  });
}

template <class T>
void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  if (!t.grad_y || !t.y_dot) return back(launch, l, t, t.grad_y_dot, t.grad_x_dot, t.grad_w_dot, false);
  run(l, t, t.w_dot[1], [&]<Cell C>(const Sequence& sequence, Grid grid, size_t shared) {
    note([&] { return work_over_time<C, T>(sequence.sizes, t.w_dot[1]); });
    launch("recurrence backward tangent", backward_tangent_kernel<C, T>, grid, kElementThreads, shared,
           sequence, t, launch.memory);
    finish<C>(launch, l, sequence, t, true, t.grad_x_dot, t.grad_w_dot);
  });
}

}  // namespace

template <>
struct OnGpu<Kind::recurrence> {
  static Footprint footprint(const Layer& l) {
    const RecurrenceSizes r(l.loops[0], l.n);
    const Scratch scratch(l);
    return with_cell(l.cell, [&]<Cell C> {
      using R = Rows<float, C>;
      const int64_t rows = r.n * r.length * r.hidden;
      return Footprint{rows * (R::kSaved + R::kStates), scratch.sides + scratch.carried + scratch.splits,
                       rows * R::kSaved};
    });
  }
  template <class T>
  static LaunchPasses<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::recurrence>;

}  // namespace maml::cuda
