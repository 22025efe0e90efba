// The passes of a recurrence over time, for all tasks: a block takes one sample through all steps in one
// launch, because samples do not depend on each other. W_hh, and RW_hh in a tangent, stay in its shared
// memory where they fit, else in the caches. In a step its threads share the product with W_hh: a thread
// takes one column, or a part of one where there are fewer columns than threads; then a thread takes some
// units of the cell.
//
// Shared memory: two factors; the parts of sums; the resident weights [hidden, gates hidden], with rows of an
// odd length, so that a warp reads columns and rows without bank conflicts. Numerics: the product with W_hh
// is in T whatever the precision; parts of a sum are added in order. Saved are [row, saved, hidden] from the
// forward pass, row = step n + sample, then the cotangents of the states [row, states, hidden] from the
// backward pass; saved_dot has the tangents of the first.
#pragma once

#include "cuda/strided.h"
#include "layers/recurrence.h"

namespace maml::cuda::recurrence {

/// A recurrence as kernels see it.
struct Sequence {
  RecurrenceSizes sizes;
  int64_t start_offset[2] = {}, start_stride[2] = {};  // of the initial states
  int resident = 0;                                    // weights in shared memory: W_hh, then RW_hh
  /// `states`: the number of initial states that are given.
  Sequence(const Layer& l, int states) : sizes(l.loops[0], l.n) {
    for (int k = 0; k < states; ++k) {
      const View& state = l.loops[1 + k].x[0];
      start_offset[k] = state.offset, start_stride[k] = state.stride[0];
    }
  }
};

/// The length of a row of weights in shared memory.
__host__ __device__ constexpr int64_t padded(int64_t width) { return width | 1; }

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
  /// The initial state of this block's sample, as a factor; nothing where there is none.
  __device__ void fill(T* to, const T* state) const {
    if (!state) return;
    state += s.start_offset[0] + blockIdx.x * s.start_stride[0];
    for (int64_t j = threadIdx.x; j < hidden; j += blockDim.x) to[j] = state[j];
  }
  template <int Count>
  __device__ void read(const T* row, int64_t j, T (&to)[Count]) const {
    for (int i = 0; i < Count; ++i) to[i] = row[i * hidden + j];
  }
  template <int Count>
  __device__ void write(const T (&from)[Count], T* row, int64_t j) const {
    for (int i = 0; i < Count; ++i) row[i * hidden + j] = from[i];
  }
  /// The gates of unit j in a row of [rows, width], with the bias; absent where null.
  __device__ void gates(const T* bias, const T* row, int64_t j, T (&to)[kGates]) const {
    for (int g = 0; g < kGates; ++g) {
      to[g] = (bias ? bias[g * hidden + j] : T(0)) + (row ? row[g * hidden + j] : T(0));
    }
  }
  __device__ void write_sides(const T (&a)[kGates], const T (&u)[kGates], bool second, const Row& row,
                              int64_t j) const {
    write(a, side(second, 0, row), j);
    if constexpr (Declared::sided) write(u, side(second, 1, row), j);
  }
  /// Of the cotangents of both sides, that of u.
  static __device__ const T (&of_h(const T (&a)[kGates], const T (&u)[kGates])) [kGates] {
    if constexpr (Declared::sided) return u;
    return a;
  }
  /// The cotangents of the states after a row's step.
  __device__ void read_cotangents(const Row& row, int64_t j, const T* grad_y, T (&g)[kStates]) const {
    const T* of_y = grad_y + y_at(row);
    const bool last = row.step == s.sizes.length - 1;
    g[0] = last ? of_y[j] : of_y[j] + carry(0, row)[j];
    if constexpr (kStates == 2) g[1] = last ? of_y[hidden + j] : carry(1, row)[j];
  }
};

/// A factor in shared memory and a matrix: element (i, output) is at i row + output column.
template <class T>
struct Factor {
  const T *vector, *matrix;
  int64_t row, column;
};

/// The products of a block with the recurrent weights, and its shared memory.
template <class T>
class Recurrent {
 public:
  /// The elements of shared memory beside the weights.
  static __host__ __device__ int64_t elements(int64_t width) {
    return 2 * width + (width > kElementThreads ? width : kElementThreads);
  }

  /// Brings the weights to shared memory. A barrier must follow.
  __device__ __forceinline__ Recurrent(int resident, int64_t hidden, int64_t width, const T* w,
                                       const T* w_dot)
      : hidden_(static_cast<int>(hidden)), width_(static_cast<int>(width)), weights_{w, w_dot} {
    T* shared = reinterpret_cast<T*>(dynamic_shared());
    vectors_ = shared, shared += 2 * width;
    parts_ = shared, shared += elements(width) - 2 * width;
#pragma unroll
    for (int k = 0; k < 2; ++k, shared += hidden * padded(width)) {
      stride_[k] = width;
      if (k >= resident) continue;
      for (int64_t i = 0; i < hidden; ++i) {
#pragma unroll 4
        for (int64_t c = threadIdx.x; c < width; c += blockDim.x)
          shared[i * padded(width) + c] = weights_[k][i * width + c];
      }
      weights_[k] = shared, stride_[k] = padded(width);
    }
  }

  /// Factor k of the next product.
  __device__ __forceinline__ T* vector(int k) const { return vectors_ + k * width_; }

  /// Computes sum(column) = the sum over units of vector 0 W_hh + vector 1 RW_hh; `first`, `second`: which of
  /// these terms there are. A barrier before and after.
  __device__ __forceinline__ void by_columns(bool first, bool second) {
    multiply(hidden_, width_, {first ? vector(0) : nullptr, weights_[0], stride_[0], 1},
             {second ? vector(1) : nullptr, weights_[1], stride_[1], 1});
  }
  /// Computes sum(unit) = the sum over columns, of the same.
  __device__ __forceinline__ void by_rows(bool second) {
    multiply(width_, hidden_, {vector(0), weights_[0], 1, stride_[0]},
             {second ? vector(1) : nullptr, weights_[1], 1, stride_[1]});
  }
  __device__ __forceinline__ const T* sums() const { return parts_; }

 private:
  __device__ __forceinline__ void multiply(int depth, int outputs, const Factor<T>& a, const Factor<T>& b) {
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int shares = threads > outputs ? threads / outputs : 1;
    __syncthreads();
    for (int at = thread; at < shares * outputs; at += threads) {
      const int share = at / outputs, output = at - share * outputs;
      T sum = 0;
      add(a, depth, share, shares, output, sum);
      add(b, depth, share, shares, output, sum);
      parts_[at] = sum;
    }
    __syncthreads();
    if (shares == 1) return;
    if (thread < outputs) {
      for (int share = 1; share < shares; ++share) parts_[thread] += parts_[share * outputs + thread];
    }
    __syncthreads();
  }
  static __device__ __forceinline__ void add(const Factor<T>& f, int depth, int share, int shares, int output,
                                             T& sum) {
    if (!f.vector || !f.matrix) return;
    const T* from = f.matrix + output * f.column;
#pragma unroll 4
    for (int i = share; i < depth; i += shares) sum += f.vector[i] * from[i * f.row];
  }

  int hidden_, width_;
  const T* weights_[2];
  int64_t stride_[2];
  T *vectors_, *parts_;
};

/// `symbolic_a`: x W_ih of all rows.
template <Cell C, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    forward_kernel(const __grid_constant__ Sequence sequence, const __grid_constant__ Tensors<T> symbolic,
                   const T* symbolic_a, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Rows<T, C> r(sequence, symbolic, memory);
  const Tensors<T>& t = r.t;
  const T* of_a = resolve(symbolic_a, memory, blockIdx.z);
  const int64_t length = sequence.sizes.length;
  Recurrent<T> product(sequence.resident, r.hidden, r.width, t.w[1], nullptr);
  r.fill(product.vector(0), t.x[1]);
  for (int64_t step = 0; step < length; ++step) {
    const Row row = r.row_at(step, blockIdx.x);
    product.by_columns(step > 0 || t.x[1], false);
    for (int64_t j = threadIdx.x; j < r.hidden; j += blockDim.x) {
      T a[r.kGates], u[r.kGates], state[r.kStates], saved[r.kSaved];
      r.gates(t.w[2], of_a + row.index * r.width, j, a);
      r.gates(t.w[3], product.sums(), j, u);
      r.read_before(row, j, t.x, t.y, t.saved, state);
      const T h = CellDeclaration<C>::forward(a, u, state, saved);
      product.vector(0)[j] = t.y[r.y_at(row) + j] = h;
      r.write(saved, t.saved + r.saved_at(row), j);
      if constexpr (r.kStates == 2) {
        if (step == length - 1) t.y[r.y_at(row) + r.hidden + j] = saved[kCell];
      }
    }
  }
}

/// `symbolic_a_dot`: the tangent of x W_ih; null where it is 0.
template <Cell C, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    forward_tangent_kernel(const __grid_constant__ Sequence sequence,
                           const __grid_constant__ Tensors<T> symbolic, const T* symbolic_a_dot,
                           Deferred deferred) {
  const Memory memory = deferred.ready();
  const Rows<T, C> r(sequence, symbolic, memory);
  const Tensors<T>& t = r.t;
  const T* of_a_dot = resolve(symbolic_a_dot, memory, blockIdx.z);
  const int64_t length = sequence.sizes.length;
  Recurrent<T> product(sequence.resident, r.hidden, r.width, t.w[1], t.w_dot[1]);
  r.fill(product.vector(0), t.x_dot[1]);
  r.fill(product.vector(1), t.x[1]);
  for (int64_t step = 0; step < length; ++step) {
    const Row row = r.row_at(step, blockIdx.x);
    product.by_columns(step > 0 || t.x_dot[1], step > 0 || t.x[1]);
    for (int64_t j = threadIdx.x; j < r.hidden; j += blockDim.x) {
      T a_dot[r.kGates], u_dot[r.kGates], state[r.kStates], state_dot[r.kStates], s[r.kSaved],
          s_dot[r.kSaved];
      r.gates(t.w_dot[2], of_a_dot ? of_a_dot + row.index * r.width : nullptr, j, a_dot);
      r.gates(t.w_dot[3], product.sums(), j, u_dot);
      r.read_before(row, j, t.x, t.y, t.saved, state);
      r.read_before(row, j, t.x_dot, t.y_dot, t.saved_dot, state_dot);
      r.read(t.saved + r.saved_at(row), j, s);
      const T h_dot = CellDeclaration<C>::tangent(s, state, a_dot, u_dot, state_dot, s_dot);
      product.vector(0)[j] = t.y_dot[r.y_at(row) + j] = h_dot;
      product.vector(1)[j] = t.y[r.y_at(row) + j];
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
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    backward_kernel(const __grid_constant__ Sequence sequence, const __grid_constant__ Tensors<T> symbolic,
                    const T* symbolic_g, bool keep, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Rows<T, C> r(sequence, symbolic, memory);
  const Tensors<T>& t = r.t;
  const T* grad_y = resolve(symbolic_g, memory, blockIdx.z);
  Recurrent<T> product(sequence.resident, r.hidden, r.width, t.w[1], nullptr);
  for (int64_t step = sequence.sizes.length - 1; step >= 0; --step) {
    const Row row = r.row_at(step, blockIdx.x);
    for (int64_t j = threadIdx.x; j < r.hidden; j += blockDim.x) {
      T s[r.kSaved], state[r.kStates], g[r.kStates], a[r.kGates], u[r.kGates], before[r.kStates];
      r.read(t.saved + r.saved_at(row), j, s);
      r.read_before(row, j, t.x, t.y, t.saved, state);
      r.read_cotangents(row, j, grad_y, g);
      CellDeclaration<C>::backward(s, state, g, a, u, before);
      r.write_sides(a, u, false, row, j), r.write(r.of_h(a, u), product.vector(0), j);
      for (int k = 0; k < r.kStates; ++k) r.carry(k, row)[j] = before[k];
      if (keep) r.write(g, r.cotangents(row), j);
    }
    product.by_rows(false);
    for (int64_t j = threadIdx.x; j < r.hidden; j += blockDim.x) r.carry(0, row)[j] += product.sums()[j];
  }
}

template <Cell C, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    backward_tangent_kernel(const __grid_constant__ Sequence sequence,
                            const __grid_constant__ Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Rows<T, C> r(sequence, symbolic, memory);
  const Tensors<T>& t = r.t;
  Recurrent<T> product(sequence.resident, r.hidden, r.width, t.w[1], t.w_dot[1]);
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
      r.write(r.of_h(a_dot, u_dot), product.vector(0), j), r.write(r.of_h(a, u), product.vector(1), j);
      for (int k = 0; k < r.kStates; ++k) r.carry(k, row)[j] = before_dot[k];
    }
    product.by_rows(true);
    for (int64_t j = threadIdx.x; j < r.hidden; j += blockDim.x) r.carry(0, row)[j] += product.sums()[j];
  }
}

}  // namespace maml::cuda::recurrence
