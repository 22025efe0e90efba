// recurrence: a layer of an LSTM, GRU or RNN over time (layers/recurrence.h; the formulas of a step are in
// layers/cells.h), for all tasks. Plain kernels: a block takes one sample through all steps, because samples
// do not depend on each other, and a thread takes some of its units; a barrier ends a step. So a pass over
// time is one launch, however long the sequence is. The products with the weights are plain sums, in the
// order of inputs and units.
//
//   over time        y and what is saved; backwards, the cotangents of both sides of each cell, a and u,
//                    and those of the states, which are carried from step to step
//   then             grad_x, a thread an element; the gradients of the parameters, a thread an element, which
//                    sums over all steps and samples; those of the initial states
//
// Saved are [row, saved, hidden] from the forward pass, row = step n + sample, then the cotangents of the
// states [row, states, hidden] from the backward pass; saved_dot has the tangents of the first. The twin on
// the CPU is cpu/recurrence.cpp.
#include "cuda/implement.h"
#include "cuda/strided.h"
#include "layers/recurrence.h"

namespace maml::cuda {
namespace {

/// A recurrence as kernels see it.
struct Sequence {
  RecurrenceSizes sizes;
  int64_t x_offset, x_size, x_stride;
  int64_t start_offset[2] = {}, start_stride[2] = {};  // of the initial states
  /// `states`: the number of initial states that are given.
  Sequence(const Layer& l, int states) : sizes(l.loops[0], l.n) {
    const View& x = l.loops[0].x[0];
    x_offset = x.offset, x_size = x.size, x_stride = x.stride[1];
    for (int k = 0; k < states; ++k) {
      const View& state = l.loops[1 + k].x[0];
      start_offset[k] = state.offset, start_stride[k] = state.stride[0];
    }
  }
};

/// One sample at one step.
struct Row {
  int64_t step, sample, index;  // step n + sample
  __device__ Row(int64_t t, int64_t s, int64_t n) : step(t), sample(s), index(t * n + s) {}
};

/// The tensors of one task, with the places of everything that a row has.
template <class T, Cell C>
struct Rows {
  using Declared = CellDeclaration<C>;
  static constexpr int kGates = Declared::gates, kStates = Declared::states, kSaved = Declared::saved;
  static constexpr int kSides = Declared::sided ? 2 : 1;

  const Sequence& s;
  const Tensors<T> t;
  const int64_t n, hidden, width, rows;
  __device__ Rows(const Sequence& sequence, const Tensors<T>& symbolic, const Memory& memory)
      : s(sequence),
        t(resolved(symbolic, memory)),
        n(s.sizes.n),
        hidden(s.sizes.hidden),
        width(kGates * hidden),
        rows(n * s.sizes.length) {}

  /// resolve() has the first two inputs only.
  static __device__ Tensors<T> resolved(const Tensors<T>& symbolic, const Memory& memory) {
    Tensors<T> t = resolve(symbolic, memory, blockIdx.z);
    t.x[2] = resolve(symbolic.x[2], memory, blockIdx.z);
    t.x_dot[2] = resolve(symbolic.x_dot[2], memory, blockIdx.z);
    return t;
  }

  __device__ Row row_at(int64_t step, int64_t sample) const { return {step, sample, n}; }
  __device__ int64_t x_at(const Row& row) const {
    return s.x_offset + row.sample * s.x_size + row.step * s.x_stride;
  }
  __device__ int64_t y_at(const Row& row) const { return row.sample * s.sizes.of_sample + row.step * hidden; }
  __device__ int64_t saved_at(const Row& row) const { return row.index * kSaved * hidden; }
  __device__ T* cotangents(const Row& row) const {
    return t.saved + (rows * kSaved + row.index * kStates) * hidden;
  }
  /// The cotangent of a (side 0) or u (side 1): of the pass, or (`second`) the primal one beside it.
  __device__ T* side(bool second, int side, const Row& row) const {
    const int index = second * kSides + (Declared::sided ? side : 0);
    return t.scratch + index * rows * width + row.index * width;
  }
  __device__ T* carry(int k, const Row& row) const {
    return t.scratch + 2 * kSides * rows * width + (k * n + row.sample) * hidden;
  }

  /// A state before a row's step, from tensors that are like the inputs, the output and what is saved; null
  /// where it is 0.
  __device__ const T* before(int k, const Row& row, const T* const* x, const T* y, const T* saved) const {
    if (row.step > 0) {
      const Row last = row_at(row.step - 1, row.sample);
      return k ? saved + saved_at(last) + kCell * hidden : y + y_at(last);
    }
    return x[1 + k] ? x[1 + k] + s.start_offset[k] + row.sample * s.start_stride[k] : nullptr;
  }
  __device__ void read_before(const Row& row, int64_t j, const T* const* x, const T* y, const T* saved,
                              T (&state)[kStates]) const {
    for (int k = 0; k < kStates; ++k) {
      const T* from = before(k, row, x, y, saved);
      state[k] = from ? from[j] : T(0);
    }
  }
  template <int Count>
  __device__ void read(const T* row, int64_t j, T (&to)[Count]) const {
    for (int i = 0; i < Count; ++i) to[i] = row[i * hidden + j];
  }
  template <int Count>
  __device__ void write(const T (&from)[Count], T* row, int64_t j) const {
    for (int i = 0; i < Count; ++i) row[i * hidden + j] = from[i];
  }
  /// The gates' sums of unit j: of the bias and of a w + c v, each absent where one of its tensors is null.
  __device__ void gates(int64_t depth, const T* bias, const T* a, const T* w, const T* c, const T* v,
                        int64_t j, T (&to)[kGates]) const {
    Sum<T> sum[kGates];
    for (int g = 0; bias && g < kGates; ++g) sum[g] += bias[g * hidden + j];
    if (a && w) add_gates(depth, a, w + j, sum);
    if (c && v) add_gates(depth, c, v + j, sum);
    for (int g = 0; g < kGates; ++g) to[g] = sum[g].value();
  }
  __device__ void add_gates(int64_t depth, const T* a, const T* w, Sum<T> (&sum)[kGates]) const {
#pragma unroll 1
    for (int64_t i = 0; i < depth; ++i) {
      for (int g = 0; g < kGates; ++g) sum[g] += a[i] * w[i * width + g * hidden];
    }
  }
  __device__ void write_sides(const T (&a)[kGates], const T (&u)[kGates], bool second, const Row& row,
                              int64_t j) const {
    write(a, side(second, 0, row), j);
    if constexpr (Declared::sided) write(u, side(second, 1, row), j);
  }
  /// The cotangents of the states after a row's step.
  __device__ void read_cotangents(const Row& row, int64_t j, const T* grad_y, T (&g)[kStates]) const {
    const T* of_y = grad_y + y_at(row);
    const bool last = row.step == s.sizes.length - 1;
    g[0] = last ? of_y[j] : of_y[j] + carry(0, row)[j];
    if constexpr (kStates == 2) g[1] = last ? of_y[hidden + j] : carry(1, row)[j];
  }
  /// The sum of g w over a row of cotangents.
  __device__ void add_products(const T* g, const T* w, Sum<T>& sum) const {
    for (int64_t i = 0; i < width; ++i) sum += g[i] * w[i];
  }
  /// Carries the cotangent of h through the product with W_hh, for unit j.
  __device__ void carry_back(const Row& row, bool second, int64_t j) const {
    Sum<T> sum;
    add_products(side(false, 1, row), t.w[1] + j * width, sum);
    if (second && t.w_dot[1]) add_products(side(true, 1, row), t.w_dot[1] + j * width, sum);
    carry(0, row)[j] += sum.value();
  }
};

template <Cell C, class T>
__global__ void __launch_bounds__(kElementThreads)
    forward_kernel(const __grid_constant__ Sequence sequence, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Rows<T, C> r(sequence, symbolic, memory);
  const Tensors<T>& t = r.t;
  const int64_t length = sequence.sizes.length;
  for (int64_t step = 0; step < length; ++step, __syncthreads()) {
    const Row row = r.row_at(step, blockIdx.x);
    const T* h = r.before(0, row, t.x, t.y, t.saved);
    for (int64_t j = threadIdx.x; j < r.hidden; j += blockDim.x) {
      T a[r.kGates], u[r.kGates], state[r.kStates], saved[r.kSaved];
      r.gates(sequence.sizes.in, t.w[2], t.x[0] + r.x_at(row), t.w[0], nullptr, nullptr, j, a);
      r.gates(r.hidden, t.w[3], h, t.w[1], nullptr, nullptr, j, u);
      r.read_before(row, j, t.x, t.y, t.saved, state);
      t.y[r.y_at(row) + j] = CellDeclaration<C>::forward(a, u, state, saved);
      r.write(saved, t.saved + r.saved_at(row), j);
      if constexpr (r.kStates == 2) {
        if (step == length - 1) t.y[r.y_at(row) + r.hidden + j] = saved[kCell];
      }
    }
  }
}

template <Cell C, class T>
__global__ void __launch_bounds__(kElementThreads)
    forward_tangent_kernel(const __grid_constant__ Sequence sequence, Tensors<T> symbolic,
                           Deferred deferred) {
  const Memory memory = deferred.ready();
  const Rows<T, C> r(sequence, symbolic, memory);
  const Tensors<T>& t = r.t;
  const int64_t length = sequence.sizes.length;
  for (int64_t step = 0; step < length; ++step, __syncthreads()) {
    const Row row = r.row_at(step, blockIdx.x);
    const T* h = r.before(0, row, t.x, t.y, t.saved);
    const T* h_dot = r.before(0, row, t.x_dot, t.y_dot, t.saved_dot);
    const T* x_dot = t.x_dot[0] ? t.x_dot[0] + r.x_at(row) : nullptr;
    for (int64_t j = threadIdx.x; j < r.hidden; j += blockDim.x) {
      T a_dot[r.kGates], u_dot[r.kGates], state[r.kStates], state_dot[r.kStates], s[r.kSaved],
          s_dot[r.kSaved];
      r.gates(sequence.sizes.in, t.w_dot[2], x_dot, t.w[0], t.x[0] + r.x_at(row), t.w_dot[0], j, a_dot);
      r.gates(r.hidden, t.w_dot[3], h_dot, t.w[1], h, t.w_dot[1], j, u_dot);
      r.read_before(row, j, t.x, t.y, t.saved, state);
      r.read_before(row, j, t.x_dot, t.y_dot, t.saved_dot, state_dot);
      r.read(t.saved + r.saved_at(row), j, s);
      t.y_dot[r.y_at(row) + j] = CellDeclaration<C>::tangent(s, state, a_dot, u_dot, state_dot, s_dot);
      r.write(s_dot, t.saved_dot + r.saved_at(row), j);
      if constexpr (r.kStates == 2) {
        if (step == length - 1) t.y_dot[r.y_at(row) + r.hidden + j] = s_dot[kCell];
      }
    }
  }
}

/// Backwards in time for the cotangent of y, which is grad_y or, in a backward tangent without primal
/// cotangents or tangents, grad_y_dot. `keep`: save the cotangents of the states.
template <Cell C, class T>
__global__ void __launch_bounds__(kElementThreads)
    backward_kernel(const __grid_constant__ Sequence sequence, Tensors<T> symbolic, const T* symbolic_g,
                    bool keep, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Rows<T, C> r(sequence, symbolic, memory);
  const Tensors<T>& t = r.t;
  const T* grad_y = resolve(symbolic_g, memory, blockIdx.z);
  for (int64_t step = sequence.sizes.length - 1; step >= 0; --step) {
    const Row row = r.row_at(step, blockIdx.x);
    for (int64_t j = threadIdx.x; j < r.hidden; j += blockDim.x) {
      T s[r.kSaved], state[r.kStates], g[r.kStates], a[r.kGates], u[r.kGates], before[r.kStates];
      r.read(t.saved + r.saved_at(row), j, s);
      r.read_before(row, j, t.x, t.y, t.saved, state);
      r.read_cotangents(row, j, grad_y, g);
      CellDeclaration<C>::backward(s, state, g, a, u, before);
      r.write_sides(a, u, false, row, j);
      for (int k = 0; k < r.kStates; ++k) r.carry(k, row)[j] = before[k];
      if (keep) r.write(g, r.cotangents(row), j);
    }
    __syncthreads();
    for (int64_t j = threadIdx.x; j < r.hidden; j += blockDim.x) r.carry_back(row, false, j);
  }
}

template <Cell C, class T>
__global__ void __launch_bounds__(kElementThreads)
    backward_tangent_kernel(const __grid_constant__ Sequence sequence, Tensors<T> symbolic,
                            Deferred deferred) {
  const Memory memory = deferred.ready();
  const Rows<T, C> r(sequence, symbolic, memory);
  const Tensors<T>& t = r.t;
  for (int64_t step = sequence.sizes.length - 1; step >= 0; --step) {
    const Row row = r.row_at(step, blockIdx.x);
    for (int64_t j = threadIdx.x; j < r.hidden; j += blockDim.x) {
      T s[r.kSaved], s_dot[r.kSaved], state[r.kStates], state_dot[r.kStates], g[r.kStates], g_dot[r.kStates],
          before_dot[r.kStates], a[r.kGates], u[r.kGates], a_dot[r.kGates], u_dot[r.kGates];
      r.read(t.saved + r.saved_at(row), j, s);
      r.read(t.saved_dot + r.saved_at(row), j, s_dot);
      r.read(r.cotangents(row), j, g);
      r.read_before(row, j, t.x, t.y, t.saved, state);
      r.read_before(row, j, t.x_dot, t.y_dot, t.saved_dot, state_dot);
      r.read_cotangents(row, j, t.grad_y_dot, g_dot);
      CellDeclaration<C>::backward_tangent(s, s_dot, state, state_dot, g, g_dot, a, u, a_dot, u_dot,
                                           before_dot);
      r.write_sides(a_dot, u_dot, false, row, j), r.write_sides(a, u, true, row, j);
      for (int k = 0; k < r.kStates; ++k) r.carry(k, row)[j] = before_dot[k];
    }
    __syncthreads();
    for (int64_t j = threadIdx.x; j < r.hidden; j += blockDim.x) r.carry_back(row, true, j);
  }
}

/// grad_x (+)= da W_ih' and, with the second cotangents, + da RW_ih'.
template <Cell C, class T>
__global__ void __launch_bounds__(kElementThreads)
    input_gradient_kernel(const __grid_constant__ Sequence sequence, Tensors<T> symbolic, bool second,
                          T* symbolic_to, bool add, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Rows<T, C> r(sequence, symbolic, memory);
  T* to = resolve(symbolic_to, memory, blockIdx.z);
  const Team team = grid_team();
  const int64_t in = sequence.sizes.in;
  for (int64_t at = team.first(); at < r.rows * in; at += team.step()) {
    const int64_t index = at / in, i = at - index * in, step = index / r.n;
    const Row row = r.row_at(step, index - step * r.n);
    Sum<T> sum;
    r.add_products(r.side(false, 0, row), r.t.w[0] + i * r.width, sum);
    if (second && r.t.w_dot[0]) r.add_products(r.side(true, 0, row), r.t.w_dot[0] + i * r.width, sum);
    put(to, r.x_at(row) + i, sum.value(), add);
  }
}

/// The gradient of a parameter, a thread an element. p: 0 for W_ih, 1 for W_hh, 2 for b_ih, 3 for b_hh.
template <Cell C, class T>
__global__ void __launch_bounds__(kElementThreads)
    parameter_gradient_kernel(const __grid_constant__ Sequence sequence, Tensors<T> symbolic, bool second,
                              int p, int64_t depth, T* symbolic_to, bool add, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Rows<T, C> r(sequence, symbolic, memory);
  const Tensors<T>& t = r.t;
  T* to = resolve(symbolic_to, memory, blockIdx.z);
  const Team team = grid_team();
  for (int64_t at = team.first(); at < depth * r.width; at += team.step()) {
    const int64_t i = at / r.width, j = at - i * r.width;
    Sum<T> sum;
    for (int64_t step = 0; step < sequence.sizes.length; ++step) {
      for (int64_t sample = 0; sample < r.n; ++sample) {
        const Row row = r.row_at(step, sample);
        const T g = r.side(false, p % 2, row)[j];
        if (p >= 2) {
          sum += g;
          continue;
        }
        const T* value = p == 0 ? t.x[0] + r.x_at(row) : r.before(0, row, t.x, t.y, t.saved);
        if (value) sum += value[i] * g;
        if (!second || (p == 0 && !t.x_dot[0])) continue;
        const T* dot = p == 0 ? t.x_dot[0] + r.x_at(row) : r.before(0, row, t.x_dot, t.y_dot, t.saved_dot);
        if (dot) sum += dot[i] * r.side(true, p % 2, row)[j];
      }
    }
    put(to, at, sum.value(), add);
  }
}

/// What follows the passes backwards in time: the cotangents of inputs and parameters. `second`: there are
/// second cotangents.
template <Cell C, class T>
void finish(const Launcher& launch, const Layer& l, const Sequence& sequence, const Tensors<T>& t,
            bool second, T* const* grad_x, T* const* grad_w) {
  const RecurrenceSizes& r = sequence.sizes;
  for (int p = 0; p < 4; ++p) {
    if (!grad_w[p]) continue;
    const int64_t depth = p == 0 ? r.in : p == 1 ? r.hidden : 1;
    launch("recurrence parameter gradient", parameter_gradient_kernel<C, T>,
           step_grid(depth * CellDeclaration<C>::gates * r.hidden), kElementThreads, 0, sequence, t, second,
           p, depth, grad_w[p], t.add_w[p], launch.memory);
  }
  if (grad_x[0]) {
    const View& x = l.loops[0].x[0];
    clear_unless_reached(launch, x, l.n, r.n * r.length * r.in, t.add_x[0], grad_x[0]);
    launch("recurrence input gradient", input_gradient_kernel<C, T>, step_grid(r.n * r.length * r.in),
           kElementThreads, 0, sequence, t, second, grad_x[0], t.add_x[0], launch.memory);
  }
  const T* carried =
      t.scratch + 2 * Rows<T, C>::kSides * r.n * r.length * CellDeclaration<C>::gates * r.hidden;
  for (int k = 0; k < CellDeclaration<C>::states; ++k, carried += r.n * r.hidden) {
    if (!grad_x[1 + k]) continue;
    const View from{r.hidden, true, true, 0, {r.hidden, 1}};
    sum(launch, "recurrence state gradient", l.loops[1 + k], l.n, from, l.loops[1 + k].x[0], T(1), carried,
        t.add_x[1 + k], grad_x[1 + k]);
  }
}

/// The initial states that a layer is given; a state that is a parameter may still lack every tensor but x.
template <class T>
int given_states(const Tensors<T>& t) {
  return t.x[2] ? 2 : t.x[1] ? 1 : 0;
}

template <class T, class F>
void run(const Layer& l, const Tensors<T>& t, F f) {
  const Sequence sequence(l, given_states(t));
  with_cell(l.cell, [&]<Cell C> { f.template operator()<C>(sequence, Grid{sequence.sizes.n}); });
}

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  run(l, t, [&]<Cell C>(const Sequence& sequence, Grid grid) {
    launch("recurrence forward", forward_kernel<C, T>, grid, kElementThreads, 0, sequence, t, launch.memory);
  });
}

/// Backwards in time for a cotangent g of y.
template <class T>
void back(const Launcher& launch, const Layer& l, const Tensors<T>& t, const T* g, T* const* grad_x,
          T* const* grad_w, bool keep) {
  run(l, t, [&]<Cell C>(const Sequence& sequence, Grid grid) {
    launch("recurrence backward", backward_kernel<C, T>, grid, kElementThreads, 0, sequence, t, g, keep,
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
  run(l, t, [&]<Cell C>(const Sequence& sequence, Grid grid) {
    launch("recurrence forward tangent", forward_tangent_kernel<C, T>, grid, kElementThreads, 0, sequence, t,
           launch.memory);
  });
}

template <class T>
void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  if (!t.grad_y || !t.y_dot) return back(launch, l, t, t.grad_y_dot, t.grad_x_dot, t.grad_w_dot, false);
  run(l, t, [&]<Cell C>(const Sequence& sequence, Grid grid) {
    launch("recurrence backward tangent", backward_tangent_kernel<C, T>, grid, kElementThreads, 0, sequence,
           t, launch.memory);
    finish<C>(launch, l, sequence, t, true, t.grad_x_dot, t.grad_w_dot);
  });
}

}  // namespace

template <>
struct OnGpu<Kind::recurrence> {
  static Footprint footprint(const Layer& l) {
    const RecurrenceSizes r(l.loops[0], l.n);
    return with_cell(l.cell, [&]<Cell C> {
      using R = Rows<float, C>;
      const int64_t rows = r.n * r.length * r.hidden;
      return Footprint{rows * (R::kSaved + R::kStates),
                       2 * R::kSides * R::kGates * rows + R::kStates * r.n * r.hidden, rows * R::kSaved};
    });
  }
  template <class T>
  static LaunchPasses<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::recurrence>;

}  // namespace maml::cuda
