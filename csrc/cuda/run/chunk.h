// One pass of an MLP over a set of samples: a block computes all layers, the loss and the gradient for one
// chunk of the samples of one task, as in the fully fused MLPs of tiny-cuda-nn (Mueller et al. 2021). With W,
// b a layer's weight [in, out] and bias, V, v their direction, f its function, and R{.} the tangent:
//
//   forward    z_l = a_{l-1} W_l + b_l,    a_l = f(z_l),    a_0 = x
//              R{z_l} = R{a_{l-1}} W_l + a_{l-1} V_l + v_l,    R{a_l} = f' R{z_l}
//   loss       its value, and d_L, the cotangent of z_L, with its tangent (loss.h)
//   backward   grad W_l = a_{l-1}^T d_l,    grad b_l = sum d_l,    d_{l-1} = f' (d_l W_l^T)
//              R{grad W_l} = R{a_{l-1}}^T d_l + a_{l-1}^T R{d_l},    R{grad b_l} = sum R{d_l}
//              R{d_{l-1}} = f' (R{d_l} W_l^T + d_l V_l^T) + f'' R{z_{l-1}} (d_l W_l^T)
//
// A product pass computes the forward and backward pass again rather than reading stored values: for a policy
// 2-100-100-2 with 2000 samples and 20 tasks those are 65 MB, and computing them adds 17 % of FLOP to a
// meta-step.
//
// Work: a chunk is at most kChunkSamples samples, so their number depends on the set alone, and the bits of a
// result neither on the number of tasks nor of multiprocessors. A block goes through its chunk in tiles of
// kTile samples. Each of the kChunkWarps warps computes units of 16 x 32 outputs (product/shared_matrix.h):
// 32 samples by 128 features are 8 units, one a warp. The weights' gradients are cut into units in the same
// way, unit u of all layers being slot u / kChunkWarps of warp u % kChunkWarps; their sums stay in registers
// over all tiles. At the end a block writes its sums as a part; the last block of a task to arrive adds up
// the parts in ascending order.
//
// Registers: kSlots units of 16 sums a thread, beside the unit that is being computed.
// Shared memory, for 2-100-100-2 in float32, in KB:
//
//                                                               gradient   product
//   weights, and their direction: 100 x 128 + 2 x 128 + 100 x 4     53       105
//   z_1, z_2 (later f', then d) and a; the same of tangents         48        96
//   x, d_L, the prediction, its cotangent and so on                  4         6
//
// z_l stands in memory until a_l is computed for the last time; then f'(z_l) takes its place, and d_l that of
// f'. R{z_l} is followed by f''(z_l) R{z_l} and R{d_l}. There is one matrix for a_l, so the backward pass
// computes a_l again, from z_l.
//
// Numerics: products as in the batched executor (product/arithmetic.h), biases and the rest in T. A sum over
// samples runs over those of a tile, then over tiles, then over chunks. Samples beyond the end of a chunk are
// rows of zeros with the cotangent 0.
//
// Limits: widths up to kMostChainWidth, kMostChainLayers layers, kSlots * kChunkWarps units, the shared
// memory of a block.
#pragma once

#include "cuda/loss.h"
#include "cuda/pointwise.h"
#include "cuda/run/chain.h"

namespace maml::cuda {

/// One block's work on the chunk `team.block` of one task; the tensors are real addresses.
template <class Unit, Pass kPass>
class Chunk {
  using T = typename Unit::T;
  using Sums = typename Unit::Sums;
  using Matrix = SharedMatrix<T>;
  static constexpr bool kTangent = kPass != Pass::gradient, kProduct = kPass == Pass::product;
  static constexpr int V = kVector<T>, kSlots = cuda::kSlots<T>;

 public:
  __device__ __forceinline__ Chunk(const Chain& chain, const Places& places, const LossPart& loss,
                                   const ChunkTensors<T>& tensors, double* sums)
      : chain_(chain),
        at_(places),
        loss_(loss),
        t_(tensors),
        sums_(sums),
        shared_(reinterpret_cast<T*>(dynamic_shared())),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % kWarp),
        warp_(thread_ / kWarp) {}

  /// Writes the chunk's part; that is the result where there is one chunk only.
  __device__ __forceinline__ void run(Team team, int64_t part_size) {
    const int samples = static_cast<int>(loss_.samples);
    const int first = samples_before(team.block, team.blocks, samples);
    const int end = samples_before(team.block + 1, team.blocks, samples);
    clear();
    __syncthreads();
    for (int l = 0; l < chain_.count; ++l) load_layer(l);
    Sums gradient[kSlots];
#pragma unroll 1
    for (first_ = first; first_ < end; first_ += kTile) {
      samples_ = end - first_ < kTile ? end - first_ : kTile;
      load_x();
      __syncthreads();
      walk(gradient, first_ > first);
    }
    T* const to = team.blocks > 1 ? t_.parts + team.block * part_size : t_.gradient;
    if (t_.gradient) write_gradient(gradient, to);
    T* const value = team.blocks > 1 ? to + t_.limit : t_.value;
    if (t_.value && thread_ == 0) *value = shared_[at_.value];
  }

 private:
  static __device__ __forceinline__ int samples_before(int chunk, int chunks, int samples) {
    return static_cast<int>(static_cast<int64_t>(chunk) * samples / chunks);
  }

  /// One tile: up the layers, the loss, down the layers. A layer's function is evaluated after its z, and on
  /// the way down again before its cotangent. `add`: the loss has earlier tiles.
  __device__ __forceinline__ void walk(Sums (&gradient)[kSlots], bool add) {
    const int count = chain_.count, steps = t_.gradient ? 2 * count : count;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const bool up = step < count;
      const int l = up ? step : 2 * count - 1 - step;
      if (up) {
        forward(l);
      } else {
        backward(l, gradient);
      }
      __syncthreads();
      if (step + 1 == count) cotangent(add);
      const int next = up ? l : l - 2;
      if (next < 0 || last(next)) continue;
      activate(next, !up || last(next + 1));
      __syncthreads();
    }
  }

  __device__ __forceinline__ Matrix weight(int l) const { return weight(at_.weight, l); }
  __device__ __forceinline__ Matrix direction(int l) const { return weight(at_.direction, l); }
  __device__ __forceinline__ Matrix weight(const int (&places)[kMostChainLayers], int l) const {
    return {shared_ + places[l], chain_.layers[l].in, chain_.layers[l].out};
  }
  __device__ __forceinline__ const T* bias(const int (&places)[kMostChainLayers], int l) const {
    return shared_ + places[l] + Matrix::size(chain_.layers[l].in, chain_.layers[l].out);
  }
  __device__ __forceinline__ Matrix samples(int place, int columns) const {
    return {shared_ + place, kTile, columns};
  }
  /// What layer l reads, and its tangent (which the input of the net does not have).
  __device__ __forceinline__ Matrix input(int l) const {
    return samples(l == 0 ? at_.x : at_.a, chain_.layers[l].in);
  }
  __device__ __forceinline__ Matrix input_dot(int l) const { return samples(at_.a_dot, chain_.layers[l].in); }
  /// The cotangent of layer l's z, and its tangent.
  __device__ __forceinline__ Matrix d(int l) const {
    return samples(last(l) ? at_.d : at_.z[l], chain_.layers[l].out);
  }
  __device__ __forceinline__ Matrix d_dot(int l) const {
    return samples(last(l) ? at_.d_dot : at_.z_dot[l], chain_.layers[l].out);
  }
  __device__ __forceinline__ bool last(int l) const { return l + 1 == chain_.count; }
  __device__ __forceinline__ const T* parameter(int64_t at) const {
    return (at < chain_.adapted ? t_.phi : t_.theta) + at;
  }

  /// Zeros everywhere: what fills up a row stays zero.
  __device__ __forceinline__ void clear() {
    for (int i = thread_; i < at_.total / V; i += kChunkThreads)
      reinterpret_cast<Vector<T>*>(shared_)[i] = Vector<T>{};
  }

  __device__ __forceinline__ void load_layer(int l) {
    const ChainLayer& layer = chain_.layers[l];
    load_parameter(weight(l), parameter(layer.weight), layer);
    load_bias(at_.weight, l, layer.bias < 0 ? nullptr : parameter(layer.bias));
    if constexpr (kTangent) {  // parameters that are not adapted have the direction zero
      if (layer.weight < chain_.adapted) load_parameter(direction(l), t_.direction + layer.weight, layer);
      const bool moves = layer.bias >= 0 && layer.bias < chain_.adapted;
      load_bias(at_.direction, l, moves ? t_.direction + layer.bias : nullptr);
    }
  }
  __device__ __forceinline__ void load_parameter(Matrix to, const T* from, const ChainLayer& layer) {
    if (layer.out % V == 0) {  // packed parameters start on cache lines
      const int vectors = layer.out / V;
      for (int i = thread_; i < layer.in * vectors; i += kChunkThreads) {
        const int row = i / vectors;
        to.vector(row, i - row * vectors) = reinterpret_cast<const Vector<T>*>(from)[i];
      }
      return;
    }
    for (int i = thread_; i < layer.in * layer.out; i += kChunkThreads) {
      const int row = i / layer.out;
      to.at(row, i - row * layer.out) = from[i];
    }
  }
  __device__ __forceinline__ void load_bias(const int (&places)[kMostChainLayers], int l, const T* from) {
    T* to = const_cast<T*>(bias(places, l));
    if (from && thread_ < chain_.layers[l].out) to[thread_] = from[thread_];
  }

  __device__ __forceinline__ void load_x() {
    const int columns = chain_.layers[0].in;
    const Matrix x = input(0);
    for (int i = thread_; i < kTile * columns; i += kChunkThreads) {
      const int row = i / columns;
      x.at(row, i - row * columns) = row < samples_ ? t_.x[first_ * columns + i] : T(0);
    }
  }

  /// Calls f(row, column, sums, sums of the tangent) for the vectors of this warp's unit of [kTile, columns],
  /// after compute(i, j, sums, tangent sums). The sums beyond the last column are zeros.
  template <class Compute, class F>
  __device__ __forceinline__ void each_output(int columns, Compute compute, F f) const {
    const int i = warp_ % (kTile / 16) * 16, j = warp_ / (kTile / 16) * 32;
    if (j >= columns) return;
    Sums sums, dots;
    compute(i, j, sums, dots);
#pragma unroll
    for (int r = 0; r < Sums::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Sums::kColumns; c += V) {
        const int row = i + Sums::row(lane_, r), column = j + Sums::column(lane_, c);
        Vector<T> values, tangents;
#pragma unroll
        for (int e = 0; e < V; ++e)
          values.element[e] = sums.at(r, c + e), tangents.element[e] = dots.at(r, c + e);
        if (column < columns) f(row, column, values, tangents);
      }
    }
  }

  __device__ __forceinline__ void forward(int l) {
    const ChainLayer& layer = chain_.layers[l];
    const T *b = bias(at_.weight, l), *b_dot = bias(at_.direction, l);
    const bool is_last = last(l);
    const int width = chain_.width();
    const Matrix z = samples(at_.z[l], layer.out), z_dot = samples(at_.z_dot[l], layer.out);
    T *const y = shared_ + at_.prediction, *const y_dot = shared_ + at_.prediction_dot;
    each_output(
        layer.out,
        [&](int i, int j, Sums& sums, Sums& dots) {
          Unit::template multiply<true, false>(input(l), weight(l), i, j, layer.in, lane_, sums);
          if constexpr (kTangent) {
            if (l > 0)
              Unit::template multiply<true, false>(input_dot(l), weight(l), i, j, layer.in, lane_, dots);
            Unit::template multiply<true, false>(input(l), direction(l), i, j, layer.in, lane_, dots);
          }
        },
        [&](int row, int column, Vector<T> sums, Vector<T> dots) {
#pragma unroll
          for (int e = 0; e < V; ++e) {
            sums.element[e] += b[column + e];
            if constexpr (kTangent) dots.element[e] += b_dot[column + e];
            if (!is_last || column + e >= layer.out) continue;
            y[row * width + column + e] = sums.element[e];
            if constexpr (kTangent) y_dot[row * width + column + e] = dots.element[e];
          }
          if (is_last) return;
          z.vector(row, column / V) = sums;
          if constexpr (kTangent) z_dot.vector(row, column / V) = dots;
        });
    if (is_last) append(layer.out, width);
  }

  __device__ __forceinline__ void append(int from, int width) {
    for (int i = thread_; i < kTile * chain_.appended; i += kChunkThreads) {
      const int row = i / chain_.appended, j = i - row * chain_.appended;
      const T floor = static_cast<T>(chain_.floor), w = *parameter(chain_.append + j);
      shared_[at_.prediction + row * width + from + j] = w < floor ? floor : w;
      if constexpr (kTangent) {
        const bool moves = chain_.append < chain_.adapted && w >= floor;
        shared_[at_.prediction_dot + row * width + from + j] = moves ? t_.direction[chain_.append + j] : T(0);
      }
    }
  }

  /// a = f(z) and its tangent, of layer l. `for_last_time`: f' takes the place of z, f'' R{z} that of R{z}.
  __device__ __forceinline__ void activate(int l, bool for_last_time) {
    const ChainLayer& layer = chain_.layers[l];
    const Matrix z = samples(at_.z[l], layer.out), z_dot = samples(at_.z_dot[l], layer.out);
    const Matrix a = input(l + 1), a_dot = input_dot(l + 1);
    auto each = [&](auto derivatives) {
      for (int i = thread_; i < kTile * a.vectors; i += kChunkThreads) {
        const int row = i / a.vectors, v = i - row * a.vectors;
        if (v * V >= layer.out) {  // another layer's row in the same memory may be longer
          a.vector(row, v) = Vector<T>{};
          if constexpr (kTangent) a_dot.vector(row, v) = Vector<T>{};
          continue;
        }
        Vector<T> x = z.vector(row, v), x_dot{}, y, y_dot;
        if constexpr (kTangent) x_dot = z_dot.vector(row, v);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const Derivatives<T> f = derivatives(x.element[e]);
          y.element[e] = f.f, y_dot.element[e] = f.df * x_dot.element[e];
          x.element[e] = f.df, x_dot.element[e] *= f.ddf;
        }
        a.vector(row, v) = y;
        if (for_last_time) z.vector(row, v) = x;
        if constexpr (kTangent) {
          a_dot.vector(row, v) = y_dot;
          if (for_last_time) z_dot.vector(row, v) = x_dot;
        }
      }
    };
    if (!layer.has_function) return each([](T x) { return Derivatives<T>{x, T(1), T(0)}; });
    with_megakernel_function(
        layer.function, [&]<Function F>() { each([&](T x) { return evaluate<F, T>(layer.constants, x); }); });
  }

  /// The prediction, the loss, and d of the last layer with its tangent.
  __device__ __forceinline__ void cotangent(bool add) {
    const int width = chain_.width();
    T *const y = shared_ + at_.prediction, *const g = shared_ + at_.cotangent,
             *const saved = shared_ + at_.saved;
    const T* const y_dot = shared_ + at_.prediction_dot;
    T* const g_dot = shared_ + at_.cotangent_dot;
    LossPart part = loss_;
    part.n = samples_, part.first = first_, part.add = add;
    const Team team = block_team();
    if (t_.logits) {
      for (int i = thread_; i < samples_ * width; i += kChunkThreads) t_.logits[first_ * width + i] = y[i];
    }
    if (t_.cotangent) {
      for (int i = thread_; i < samples_ * width; i += kChunkThreads) g[i] = t_.cotangent[first_ * width + i];
    } else if (kPass == Pass::metric || t_.target.y) {  // the metric has no actions
      const Target<T> target = t_.target.from(part.kind, width, first_);
      if constexpr (kPass == Pass::metric) {
        loss_metric(team, part, y, target, y_dot, g);
      } else {
        T* const value = t_.value ? shared_ + at_.value : nullptr;
        const bool differentiates = t_.gradient != nullptr;
        loss_value(team, part, y, target, value, differentiates ? g : nullptr,
                   differentiates ? saved : nullptr, sums_);
      }
      if constexpr (kProduct) {
        __syncthreads();
        loss_tangent(team, part, y, target, y_dot, static_cast<const T*>(saved), g_dot);
      }
    }
    __syncthreads();
    if (!t_.gradient) return;
    add_appended();
    const int columns = chain_.layers[chain_.count - 1].out;
    const Matrix to = samples(at_.d, columns), to_dot = samples(at_.d_dot, columns);
    for (int i = thread_; i < kTile * columns; i += kChunkThreads) {
      const int row = i / columns, column = i - row * columns;
      const bool exists = row < samples_;
      to.at(row, column) = exists ? g[row * width + column] : T(0);
      if constexpr (kProduct) to_dot.at(row, column) = exists ? g_dot[row * width + column] : T(0);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void backward(int l, Sums (&gradient)[kSlots]) {
    const ChainLayer& layer = chain_.layers[l];
    add_biases(l);
    add_weights(l, gradient);
    if (l == 0) return;
    const Matrix below = d(l - 1), below_dot = samples(at_.z_dot[l - 1], layer.in);  // hold f', f'' R{z}
    each_output(
        layer.in,
        [&](int i, int j, Sums& sums, Sums& dots) {
          Unit::template multiply<true, true>(d(l), weight(l), i, j, layer.out, lane_, sums);
          if constexpr (kProduct) {
            Unit::template multiply<true, true>(d_dot(l), weight(l), i, j, layer.out, lane_, dots);
            Unit::template multiply<true, true>(d(l), direction(l), i, j, layer.out, lane_, dots);
          }
        },
        [&](int row, int column, const Vector<T>& sums, const Vector<T>& dots) {
          const Vector<T> df = below.vector(row, column / V);
          Vector<T> to;
#pragma unroll
          for (int e = 0; e < V; ++e) to.element[e] = df.element[e] * sums.element[e];
          below.vector(row, column / V) = to;
          if constexpr (kProduct) {
            to = below_dot.vector(row, column / V);
#pragma unroll
            for (int e = 0; e < V; ++e) {
              to.element[e] = df.element[e] * dots.element[e] + to.element[e] * sums.element[e];
            }
            below_dot.vector(row, column / V) = to;
          }
        });
  }

  /// The sum of column `column` of a [kTile, ...] matrix.
  __device__ __forceinline__ T sum_of(const Matrix& m, int column) const {
    T sum = 0;
#pragma unroll 4
    for (int row = 0; row < kTile; ++row) sum += m.at(row, column);
    return sum;
  }
  __device__ __forceinline__ void add_biases(int l) {
    if (thread_ < chain_.layers[l].out)
      shared_[at_.bias_sums[l] + thread_] += sum_of(kProduct ? d_dot(l) : d(l), thread_);
  }
  __device__ __forceinline__ void add_appended() {
    if (thread_ >= chain_.appended) return;
    const int width = chain_.width(), column = width - chain_.appended + thread_;
    const T* const g = shared_ + (kProduct ? at_.cotangent_dot : at_.cotangent) + column;
    T sum = 0;
    for (int row = 0; row < samples_; ++row) sum += g[row * width];
    if (*parameter(chain_.append + thread_) >= static_cast<T>(chain_.floor))
      shared_[at_.append_sums + thread_] += sum;
  }

  /// Calls f(slot, i, j) for the units of layer l's weight gradient that this warp holds.
  template <class F>
  __device__ __forceinline__ void each_unit(int l, F f) const {
    const ChainLayer& layer = chain_.layers[l];
    const int across = (layer.out + 31) / 32;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int unit = slot * kChunkWarps + warp_ - layer.first_unit;
      if (unit >= 0 && unit < layer.units) f(slot, unit / across * 16, unit % across * 32);
    }
  }
  __device__ __forceinline__ void add_weights(int l, Sums (&gradient)[kSlots]) {
    const Matrix moved = kProduct ? d_dot(l) : d(l);
    each_unit(l, [&](int slot, int i, int j) {
      Unit::template multiply<false, false>(input(l), moved, i, j, kTile, lane_, gradient[slot]);
      if constexpr (kProduct) {
        if (l > 0)
          Unit::template multiply<false, false>(input_dot(l), d(l), i, j, kTile, lane_, gradient[slot]);
      }
    });
  }

  __device__ __forceinline__ void write_gradient(Sums (&gradient)[kSlots], T* to) const {
    for (int l = 0; l < chain_.count; ++l) {
      const ChainLayer& layer = chain_.layers[l];
      if (layer.weight < t_.limit) {
        each_unit(l, [&](int slot, int i, int j) {
#pragma unroll
          for (int r = 0; r < Sums::kRows; ++r) {
#pragma unroll
            for (int c = 0; c < Sums::kColumns; ++c) {
              const int row = i + Sums::row(lane_, r), column = j + Sums::column(lane_, c);
              if (row < layer.in && column < layer.out)
                to[layer.weight + row * layer.out + column] = gradient[slot].at(r, c);
            }
          }
        });
      }
      if (layer.bias >= 0 && layer.bias < t_.limit && thread_ < layer.out) {
        to[layer.bias + thread_] = shared_[at_.bias_sums[l] + thread_];
      }
    }
    if (chain_.append < t_.limit && thread_ < chain_.appended)
      to[chain_.append + thread_] = shared_[at_.append_sums + thread_];
  }

  const Chain& chain_;
  const Places& at_;
  const LossPart& loss_;
  const ChunkTensors<T>& t_;
  double* const sums_;
  T* const shared_;
  const int thread_, lane_, warp_;
  int first_ = 0, samples_ = 0;  // the tile's first sample, and their number
};

}  // namespace maml::cuda
