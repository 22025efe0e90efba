// The meta-step of a small multilayer perceptron: one block computes a task, with all its state in shared
// memory. The algorithm is that of meta_gradient.h. Here its sequence of phases is code and each phase does
// all that needs no barrier in between; megakernel.cu, which serves any small network, has a phase for each
// pass of each layer.
//
// With x the input of a linear layer, z = x w + b its output, y = f(z) the next input, and d the cotangent of
// z, the phases of a layer are
//
//   forward           y = f(x w + b), f'(z), f''(z). A function that bends has a phase of its own, which all
//                     threads share; the others are part of the product. After the last layer: the loss
//   backward          grad w = x^T d, grad b, with the descent phi_{k+1} = phi_k - rate grad; and for the
//                     layer before e = d w^T, d' = f'(z') e, curve = f''(z') e
//   forward tangent   y_dot = f'(z) z_dot, z_dot = x_dot w + x w_dot + b_dot; curve z_dot
//   backward tangent  H w_dot = x^T d_dot + x_dot^T d, with v -= H w_dot and the next direction rate v; and
//                     d_dot' = f'(z') (d_dot w^T + d w_dot^T) + curve z_dot'
//
// so L layers take 2 L barriers for a gradient and 2 L for a Hessian-vector product, and one more for each
// function that bends, for a cross entropy and for its tangent.
//
// Memory: padded matrices (product/padded.h); the layout is SmallMlp's. A descent writes phi_{k+1} beside
// phi_k, which the input gradient of the same phase still reads. The first direction has a place of its own;
// the product at phi_k writes the next one over phi_{k+1}, which nothing reads any more.
//
// Threads: a thread computes tiles of two rows by a vector of columns (products with samples as rows) or of a
// vector by a vector (weight gradients), so that a value read from shared memory serves several
// multiply-adds; a last layer of one or two outputs has one output a thread. Shared memory gives 32 values of
// 4 bytes a cycle, which bounds a phase of a wide layer. With ten samples there are fewer tiles than threads;
// so the two halves of a warp compute the same tiles with samples as rows, each a part of the sums.
//
// Numerics: T throughout. A product with samples as rows is the sum of two parts: of a gradient the two
// halves of the inner index, of a tangent the two terms. Within a part, and in weight gradients, sums run in
// ascending order, the bias last. The order depends on the widths alone. Loss values are summed in double, in
// a fixed tree.
//
// Why `add up` is a kernel of its own. The last block to finish could sum the results of all tasks instead.
// For 25 tasks of 1,761 elements it would read 176 KB through one multiprocessor, 1.6 us at the 64 bytes a
// cycle of its port to the L2 cache and about twice that as measured elsewhere, after a fence and a counter
// of 1 us: as long as another node of the graph (2.8 us), whose blocks share the sums. Beyond 25 tasks, which
// is the smallest case here, one block would be slower.
#pragma once

#include <algorithm>

#include "cuda/run/small_mlp_tiles.h"
#include "layers/functions.h"

namespace maml::cuda {

/// A gradient pass, or a Hessian-vector product, over one set at phi. Offsets into shared memory.
template <class T>
struct Pass {
  const MlpSet& set;
  bool is_product;
  int region, tangents, phi, direction;
  Update<T> update;
  T *loss, *logits;  // in device memory; null: not wanted

  /// Of a value of the set's samples, by its offset in the region.
  __device__ __forceinline__ int value(int offset) const { return region + set.n * offset; }
  __device__ __forceinline__ int tangent(int offset) const { return tangents + set.n * offset; }
  /// What the pass computes of a layer: the cotangent of z, or its tangent.
  __device__ __forceinline__ int cotangent(const MlpLayer& l) const {
    return is_product ? tangent(l.grad_dot) : value(l.grad);
  }
};

/// The outputs of a task, in device memory: support_losses [steps], query_loss [1] and logits [n, out] may be
/// null; the result is packed and not padded.
template <class T>
struct MlpOutputs {
  T *support_losses, *query_loss, *logits, *result;
};

/// The meta-step of one task in the shared memory of a block. All threads of the block call.
template <class T>
class MlpStep {
 public:
  __device__ MlpStep(const SmallMlp& net, T* memory)
      : net_(net), memory_(memory), thread_(static_cast<int>(threadIdx.x)) {}

  /// Before anything else: zeros everywhere; and then, beside the loads of the sets and of phi_0, ones behind
  /// the inputs of the layers that have a bias.
  __device__ void clear() const { fill_zeros(0, net_.size); }
  __device__ void put_ones() const {
    ones(net_.layer[0], net_.support.n, net_.support.x);
    ones(net_.layer[0], net_.query.n, net_.query.x);
    for (int l = 1; l < net_.layers; ++l) {
      const int value = net_.layer[l - 1].value;
      for (int k = 0; k < (net_.second_order ? net_.steps : 1); ++k) {
        ones(net_.layer[l], net_.support.n, region(k) + net_.support.n * value);
      }
      ones(net_.layer[l], net_.query.n, net_.shared + net_.query.n * value);
    }
  }

  /// The gradient passes at phi_0 .. phi_K, the last one over the query set, and the products at phi_{K-1} ..
  /// phi_0.
  __device__ void run(const MlpOutputs<T>& to) const {
    const int steps = net_.steps, passes = net_.second_order ? 2 * steps + 1 : steps + 1;
    int direction = net_.direction;
#pragma unroll 1
    for (int i = 0; i < passes; ++i) {
      const bool is_query = i == steps, is_product = i > steps, goes_on = net_.second_order && i + 1 < passes;
      const int k = is_product ? 2 * steps - i : i;
      Pass<T> pass{is_query ? net_.query : net_.support,
                   is_product,
                   is_query ? net_.shared : region(k),
                   net_.shared,
                   phi(k),
                   direction,
                   {},
                   nullptr,
                   nullptr};
      if (i < steps) {
        pass.update = {phi(k), true, phi(k + 1), kNone, nullptr};
        if (to.support_losses) pass.loss = to.support_losses + k;
      } else {
        if (is_query) pass.loss = to.query_loss, pass.logits = to.logits;
        if (is_product) direction = phi(k + 1);
        pass.update = {is_product ? net_.v : kNone, false, goes_on ? net_.v : kNone,
                       goes_on ? direction : kNone, to.result};
      }
      run(pass);
      if (!is_query || !goes_on) continue;
      fill_zeros(net_.shared, net_.shared_size);  // the padding of the tangents
      __syncthreads();
    }
  }

 private:
  static constexpr int V = kVector<T>;

  __device__ __forceinline__ int phi(int k) const {
    return net_.phi + (net_.second_order ? k : k % 2) * net_.phi_size;
  }
  __device__ __forceinline__ int region(int k) const {
    return net_.regions + (net_.second_order ? k * net_.support.n * net_.region_row : 0);
  }
  __device__ __forceinline__ const MlpLayer& last() const { return net_.layer[net_.layers - 1]; }
  /// The factor of a cotangent: of squares 2 / (n c), of a cross entropy 1 / n.
  __device__ __forceinline__ T scale(const MlpSet& set) const {
    return net_.loss == Loss::mse ? 2 / static_cast<T>(set.n * last().out) : 1 / static_cast<T>(set.n);
  }
  __device__ __forceinline__ int input(const Pass<T>& pass, int l) const {
    return l == 0 ? pass.set.x : pass.value(net_.layer[l - 1].value);
  }

  __device__ void fill_zeros(int from, int size) const {
    const T zeros[V] = {};
#pragma unroll 4
    for (int i = thread_ * V; i < size; i += kMlpThreads * V) store(memory_ + from + i, zeros);
  }
  __device__ void ones(const MlpLayer& l, int rows, int x) const {
    if (l.bias_parameter < 0) return;
#pragma unroll 1
    for (int i = thread_; i < rows; i += kMlpThreads) memory_[x + i * l.in_stride + l.in] = T(1);
  }

  __device__ __forceinline__ void run(const Pass<T>& pass) const {
#pragma unroll 1
    for (int l = 0; l < net_.layers; ++l) {
      forward(pass, l);
      __syncthreads();
      const MlpLayer& layer = net_.layer[l];
      if (!layer.bends || pass.is_product) continue;
      activate(layer, pass);
      __syncthreads();
    }
    if (net_.loss == Loss::cross_entropy) {
      if (pass.is_product) {
        cross_entropy_tangent(pass);
      } else {
        cross_entropy(pass);
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int l = net_.layers - 1; l >= 0; --l) {
      if (l == net_.layers - 1 && pass.loss) loss_value(pass);
      backward(pass, l);
      __syncthreads();
    }
  }

  __device__ __forceinline__ void forward(const Pass<T>& pass, int l) const {
    const MlpLayer& layer = net_.layer[l];
    const bool has_two = pass.is_product && l > 0;  // the input moves too
    const int x = input(pass, l), w = pass.phi + layer.weight, w_dot = pass.direction + layer.weight;
    const Terms terms{has_two ? pass.tangent(net_.layer[l - 1].dot) : x,
                      pass.is_product && !has_two ? w_dot : w, has_two ? x : kNone, w_dot};
    const bool is_last = l == net_.layers - 1;
    auto put = [&]<int C>(int row, int j, T(&z)[C]) {
      if (is_last) {
        put_last<C>(pass, row, j, z);
      } else if constexpr (C == V) {
        put_hidden(pass, layer, row * layer.out_stride, j, z);
      }
    };
    if (is_last && 2 * layer.out <= V) {  // vectors of columns would be padding for the most part
      forward_tiles<1, 1>(memory_, layer, pass.set.n, terms, put);
    } else {
      forward_tiles<kTileRows, V>(memory_, layer, pass.set.n, terms, put);
    }
  }

  /// The cotangent of squares; of a cross entropy, z itself in its place.
  template <int C>
  __device__ __forceinline__ void put_last(const Pass<T>& pass, int row, int j, T (&z)[C]) const {
    const MlpLayer& l = last();
    const bool squares = net_.loss == Loss::mse;
    const T factor = squares ? scale(pass.set) : T(1);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const bool there = j + c < l.out;
      const int at = row * l.out + j + c;
      if (pass.logits && there) pass.logits[at] = z[c];
      if (squares && !pass.is_product && there) z[c] -= memory_[pass.set.y + at];
      z[c] *= factor;
    }
    put_columns<C>(memory_ + pass.cotangent(l) + row * l.out_stride, j, l.out, z);
  }

  /// f(z) and f'(z), or z where f bends; in a product f'(z) z_dot and curve z_dot.
  __device__ __forceinline__ void put_hidden(const Pass<T>& pass, const MlpLayer& l, int row, int j,
                                             T (&z)[V]) const {
    if (pass.is_product) {
      auto times = [&](int offset, int to) {
        const Vector<T> factor = load(memory_ + pass.value(offset) + row + j);
        T values[V];
#pragma unroll
        for (int c = 0; c < V; ++c) values[c] = factor.element[c] * z[c];
        put_columns<V>(memory_ + pass.tangent(to) + row, j, l.out, values);
      };
      times(l.slope, l.dot);
      if (l.bends) times(l.curve, l.grad_dot);
      return;
    }
    T slope[V] = {};
    with_activation(l.function, [&]<Function F>() {
      if constexpr (!FunctionDeclaration<F>::bends) {
#pragma unroll
        for (int c = 0; c < V; ++c) {
          const Derivatives<T> d = evaluate<F, T>(l, z[c]);
          z[c] = d.f, slope[c] = d.df;
        }
      }
    });
    put_columns<V>(memory_ + pass.value(l.value) + row, j, l.out, z);
    if (!l.bends) put_columns<V>(memory_ + pass.value(l.slope) + row, j, l.out, slope);
  }

  /// f, f' and f'' of the z that stands in the place of the output.
  __device__ void activate(const MlpLayer& l, const Pass<T>& pass) const {
    T *value = memory_ + pass.value(l.value), *slope = memory_ + pass.value(l.slope),
      *curve = memory_ + pass.value(l.curve);
    with_activation(l.function, [&]<Function F>() {
      if constexpr (FunctionDeclaration<F>::bends && FunctionDeclaration<F>::in_megakernel) {
#pragma unroll 1
        for (int i = thread_; i < pass.set.n * l.out; i += kMlpThreads) {
          const int row = l.by_out(i), at = row * l.out_stride + i - row * l.out;
          const Derivatives<T> d = evaluate<F, T>(l, value[at]);
          value[at] = d.f, slope[at] = d.df, curve[at] = d.ddf;
        }
      }
    });
  }

  /// From z in the place of its cotangent: the probabilities, the cotangent, and -log p of the label behind
  /// the probabilities of its row.
  __device__ void cross_entropy(const Pass<T>& pass) const {
    const MlpLayer& l = last();
    const int* labels = reinterpret_cast<const int*>(memory_ + pass.set.y);
    const T factor = scale(pass.set);
    each_row(block_team(), pass.set.n, l.out, [&](int64_t row, int lane, int width, bool exists) {
      const int first = exists ? lane : l.out;  // a row that does not exist has no columns
      T* z = memory_ + pass.value(l.grad) + row * l.out_stride;
      T* p = memory_ + pass.value(l.slope) + row * l.out_stride;
      T largest = -INFINITY, sum = 0;
      for (int j = first; j < l.out; j += width) largest = z[j] > largest ? z[j] : largest;
      largest = row_max(largest, width);
      for (int j = first; j < l.out; j += width) sum += std::exp(z[j] - largest);
      sum = row_sum(sum, width);
      const T inverse = 1 / sum;
      for (int j = first; j < l.out; j += width) {
        const bool is_label = j == labels[row];
        const T probability = std::exp(z[j] - largest) * inverse;
        if (is_label) p[l.out] = largest - z[j] + std::log(sum);
        p[j] = probability;
        z[j] = (probability - (is_label ? T(1) : T(0))) * factor;
      }
    });
  }

  /// From z_dot in the place of the cotangent's tangent.
  __device__ void cross_entropy_tangent(const Pass<T>& pass) const {
    const MlpLayer& l = last();
    const T factor = scale(pass.set);
    each_row(block_team(), pass.set.n, l.out, [&](int64_t row, int lane, int width, bool exists) {
      const int first = exists ? lane : l.out;
      T* z_dot = memory_ + pass.tangent(l.grad_dot) + row * l.out_stride;
      const T* p = memory_ + pass.value(l.slope) + row * l.out_stride;
      T mean = 0;
      for (int j = first; j < l.out; j += width) mean += p[j] * z_dot[j];
      mean = row_sum(mean, width);
      for (int j = first; j < l.out; j += width) z_dot[j] = p[j] * (z_dot[j] - mean) * factor;
    });
  }

  /// By the last warp, while the others compute gradients. The squares follow from the cotangents: with
  /// d = 2 r / (n c), the mean of r^2 is n c / 4 times the sum of d^2.
  __device__ void loss_value(const Pass<T>& pass) const {
    const int lane = thread_ - (kMlpThreads - kWarp);
    if (lane < 0) return;
    const MlpLayer& l = last();
    double sum = 0;
    if (net_.loss == Loss::mse) {
#pragma unroll 1
      for (int i = lane; i < pass.set.n * l.out; i += kWarp) {
        const int row = l.by_out(i);
        const double d =
            static_cast<double>(memory_[pass.value(l.grad) + row * l.out_stride + i - row * l.out]);
        sum += d * d;
      }
      sum *= static_cast<double>(pass.set.n * l.out) / 4;
    } else {
#pragma unroll 1
      for (int row = lane; row < pass.set.n; row += kWarp) {
        sum += static_cast<double>(memory_[pass.value(l.slope) + row * l.out_stride + l.out]);
      }
      sum /= static_cast<double>(pass.set.n);
    }
    sum = row_sum(sum, kWarp);
    if (lane == 0) *pass.loss = static_cast<T>(sum);
  }

  /// The gradient of the weight, and of the input if another layer is before. In a product, the tangents of
  /// both.
  __device__ __forceinline__ void backward(const Pass<T>& pass, int l) const {
    const MlpLayer &layer = net_.layer[l], &before = net_.layer[l > 0 ? l - 1 : 0];
    const int cotangent = pass.cotangent(layer), d = pass.value(layer.grad);
    const int w = pass.phi + layer.weight, w_dot = pass.direction + layer.weight;
    const Terms of_weight{input(pass, l), cotangent,
                          pass.is_product && l > 0 ? pass.tangent(before.dot) : kNone, d};
    const Terms of_input{cotangent, w, pass.is_product ? d : kNone, w_dot};
    const T* slope = memory_ + pass.value(before.slope);
    T *to = memory_ + pass.cotangent(before), *curve = memory_ + pass.value(before.curve);
    const bool bends = before.bends, is_product = pass.is_product;
    auto put = [&](int at, T e) {
      const T moved = slope[at] * e;
      to[at] = bends && is_product ? moved + to[at] : moved;
      if (bends && !is_product) curve[at] *= e;
    };
    const BackwardThreads threads(layer, l > 0, pass.set.n);
#pragma unroll 1
    for (int i = thread_; i < threads.count; i += kMlpThreads) {
      if (i < threads.inputs) {
        input_tile<T>(memory_, layer, pass.set.n, i, of_input, put);
      } else {
        weight_tile(memory_, layer, pass.set.n, i - threads.inputs, of_weight, pass.update);
      }
    }
  }

  const SmallMlp& net_;
  T* memory_;
  int thread_;
};

}  // namespace maml::cuda
