// The factors of the transform of a parameter's inner gradient (FactorForm), on packed vectors:
//
//   transform         y = P_f x, or its transpose; y = x of a parameter without a factor f
//   factor_gradients  result -= the gradient of P_f: out x of each element, or the outer product of out and x
//
// Grid: row y of blocks takes slice y, blockIdx.z is the task. Numerics: an element of a product, or of the
// gradient of a matrix, is one thread's sum, in order. The second is in double.
//
// The products are of [n, n] matrices with gradients of a parameter, once for all samples, so that they cost
// less than a pass of a layer; they read their operands through the caches.
#pragma once

#include "cuda/run/program.h"
#include "cuda/run/updates.h"
#include "optimizers.h"

namespace maml::cuda {

/// Where an element of a parameter stands along the axis of a matrix: element (a, i, c) of the core is
/// start + place * inner, and index(place) is the row or column of the matrix.
struct AlongAxis {
  int64_t n, inner, taps;
  __device__ explicit AlongAxis(const FactorForm& form) : n(form.n), inner(form.inner), taps(form.taps) {}
  __device__ int64_t place(int64_t element) const { return element / inner % n; }
  __device__ int64_t start(int64_t element) const { return element - place(element) * inner; }
  __device__ int64_t index(int64_t place) const {
    const int64_t columns = n / taps;
    return place % columns * taps + place / columns;
  }
};

template <class T>
__device__ void transform(Team team, const UpdateSlice& s, int f, bool transposed, const T* rates, const T* x,
                          T* y) {
  x += s.at, y += s.at;
  if (f >= s.factors) return copy(team, s.size, x, y);
  const FactorForm& form = s.factor_form[f];
  const T* factor = rates + s.factor[f].at;
  if (form.n == 0) {
    for (int64_t i = team.first(); i < s.size; i += team.step())
      y[i] = through(form.through, factor[i]) * x[i];
    return;
  }
  const AlongAxis axis(form);
  const int64_t along_row = transposed ? axis.n : 1, along_column = transposed ? 1 : axis.n;
  for (int64_t e = team.first(); e < s.size; e += team.step()) {
    const int64_t i = axis.index(axis.place(e));
    const T *row = factor + i * along_column, *from = x + axis.start(e);
    T sum = T(0);
    for (int64_t j = 0; j < axis.n; ++j) sum += row[j * along_row] * from[form.place(j) * axis.inner];
    y[e] = sum;
  }
}

template <class T>
__device__ void factor_gradients(Team team, const UpdateSlice& s, int f, const T* x, const T* out,
                                 T* result) {
  if (f >= s.factors || s.factor[f].grad_at == kNowhere) return;
  x += s.at, out += s.at, result += s.factor[f].grad_at;
  const FactorForm& form = s.factor_form[f];
  if (form.n == 0) {
    for (int64_t i = team.first(); i < s.size; i += team.step()) result[i] -= out[i] * x[i];
    return;
  }
  const int64_t n = form.n, inner = form.inner, outer = s.size / (n * inner);
  for (int64_t e = team.first(); e < n * n; e += team.step()) {
    const T *of_row = out + form.place(e / n) * inner, *of_column = x + form.place(e % n) * inner;
    double sum = 0;
    for (int64_t a = 0; a < outer; ++a) {
      for (int64_t c = 0; c < inner; ++c) {
        sum += static_cast<double>(of_row[a * n * inner + c]) *
               static_cast<double>(of_column[a * n * inner + c]);
      }
    }
    result[e] -= static_cast<T>(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kVectorThreads)
    transform_kernel(const UpdateSlice* slices, int f, bool transposed, const T* rates, const T* x, T* y,
                     Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  transform(grid_team(), slices[blockIdx.y], f, transposed, resolve(rates, memory, task),
            resolve(x, memory, task), resolve(y, memory, task));
}

template <class T>
__global__ void __launch_bounds__(kVectorThreads)
    factor_gradients_kernel(const UpdateSlice* slices, int f, const T* x, const T* out, T* result,
                            Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  factor_gradients(grid_team(), slices[blockIdx.y], f, resolve(x, memory, task), resolve(out, memory, task),
                   resolve(result, memory, task));
}

/// Whether an instruction is one of those here.
constexpr bool is_of_transform(Op op) { return op == Op::transform || op == Op::factor_gradients; }

/// Launches it, for parameters of at most `largest` elements.
template <class T>
void launch_transform(const Launcher& launch, const Instruction<T>& i, const DevicePlan& plan, const T* rates,
                      int64_t largest) {
  const UpdateSlice* slices = plan.updates + i.slices;
  const Grid grid{vector_blocks(largest), plan.slices_a_step};
  const int f = static_cast<int>(i.size);
  const Tensors<T>& t = i.tensors;
  if (i.op == Op::transform) {
    launch("transform of the gradient", transform_kernel<T>, grid, kVectorThreads, 0, slices, f,
           i.layer.pooled, rates, t.x[0], t.y, launch.memory);
  } else {
    launch("gradients of the transform", factor_gradients_kernel<T>, grid, kVectorThreads, 0, slices, f,
           t.x[0], t.grad_y, t.y, launch.memory);
  }
}

}  // namespace maml::cuda
