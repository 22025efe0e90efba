// An MLP as a chain of layers, and where a block of its kernel (chunk.h) keeps what it needs.
#pragma once

#include <algorithm>

#include "cuda/product/shared_matrix.h"
#include "cuda/run/launch.h"
#include "layers/functions.h"
#include "plan/problem.h"

namespace maml::cuda {

inline constexpr int kMostChainLayers = 6, kMostChainWidth = 128;

/// A linear layer and the function after it.
struct ChainLayer {
  int in, out;
  int64_t weight, bias;  // offsets in packed parameters; bias: -1 if absent
  bool has_function;
  Function function;
  Constants constants;
  int first_unit, units;  // of its weight's gradient, among those of all layers (chunk.h)
};

struct Chain {
  int count = 0, appended = 0;  // layers; elements of the parameter that is appended
  int64_t append = -1;          // its offset
  double floor = 0;             // what is appended is at least this
  int64_t adapted = 0;          // elements of packed parameters that are read from phi
  Precision precision{};
  ChainLayer layers[kMostChainLayers];

  /// Appends a layer without a function.
  void add(int in, int out, int64_t weight, int64_t bias) {
    const int first = units();
    layers[count++] = {in, out, weight, bias, false, {}, {}, first, (in + 15) / 16 * ((out + 31) / 32)};
  }
  int units() const { return count ? layers[count - 1].first_unit + layers[count - 1].units : 0; }
  MAML_HOST_DEVICE int width() const { return layers[count - 1].out + appended; }  // of the prediction
};

/// gradient: the loss, and the gradient of all parameters. product: a Hessian-vector product. metric: the
/// gradient of the prediction along the cotangent F z_dot, with F the policy's Fisher matrix and z_dot the
/// prediction's tangent.
enum class Pass { gradient, product, metric };

/// The tensors of a pass, as symbolic addresses. Null: absent, or not wanted.
template <class T>
struct ChunkTensors {
  const T *x, *theta, *phi;
  Target<T> target;    // without y: there is no loss
  const T* direction;  // product, metric: on the adapted parameters
  const T* cotangent;  // of the prediction, in place of that of a loss
  T *value, *logits;   // the loss; the prediction
  T* gradient;         // of the parameters before `limit`; or the product
  int64_t limit;
  T* parts;  // [chunks, part_size], where there are several chunks
};

/// Samples of a tile, and the threads of a block.
inline constexpr int kTile = 32, kChunkWarps = 8, kChunkThreads = 32 * kChunkWarps;

// A block takes most of a multiprocessor's shared memory, so a call should have about as many blocks as there
// are multiprocessors: 2000 samples are 6 chunks of at most 11 tiles, and 20 tasks 120 blocks for the 132 of
// an H100. More chunks would suit fewer tasks, but write more parts: each as large as the parameters. Not
// tuned on a GPU.
inline constexpr int kChunkSamples = kSmallTiles ? 2 * kTile : 384;

/// Units of weight gradients in a thread's registers; 16 sums each.
template <class T>
inline constexpr int kSlots = sizeof(T) == 4 ? 6 : 2;

inline int64_t chunks_of(int64_t samples) { return blocks_for(samples, kChunkSamples); }

/// Elements of a part: the gradient, then the loss.
inline int64_t part_size(int64_t limit) { return whole_lines(limit + 1); }

/// Offsets in shared memory, in elements.
struct Places {
  int weight[kMostChainLayers], direction[kMostChainLayers];  // of matrices; the bias follows its matrix
  int z[kMostChainLayers], z_dot[kMostChainLayers];
  int x, a, a_dot, d, d_dot;  // matrices [kTile, ...]; d: of the last layer
  int prediction, cotangent, saved, prediction_dot, cotangent_dot;  // [kTile, width], without a swizzle
  int bias_sums[kMostChainLayers], append_sums, value;
  int total = 0;
};

template <class T>
Places places_of(const Chain& chain, Pass pass) {
  Places p{};
  auto take = [&](int elements) {
    const int at = p.total;
    p.total += static_cast<int>(whole_lines(elements));
    return at;
  };
  auto matrix = [&](int rows, int columns) { return take(SharedMatrix<T>::size(rows, columns)); };
  const bool tangent = pass != Pass::gradient;
  int widest = 0;
  for (int l = 0; l < chain.count; ++l) {
    const ChainLayer& layer = chain.layers[l];
    const int weight = SharedMatrix<T>::size(layer.in, layer.out) + layer.out;
    p.weight[l] = take(weight);
    if (tangent) p.direction[l] = take(weight);
    p.bias_sums[l] = take(layer.out);
    if (l + 1 == chain.count) break;
    p.z[l] = matrix(kTile, layer.out);
    if (tangent) p.z_dot[l] = matrix(kTile, layer.out);
    widest = std::max(widest, layer.out);
  }
  const int last = chain.layers[chain.count - 1].out, predictions = kTile * chain.width();
  p.x = matrix(kTile, chain.layers[0].in);
  if (widest) p.a = matrix(kTile, widest);
  if (widest && tangent) p.a_dot = matrix(kTile, widest);
  p.d = matrix(kTile, last);
  if (tangent) p.d_dot = matrix(kTile, last);
  for (int* place : {&p.prediction, &p.cotangent, &p.saved}) *place = take(predictions);
  if (tangent) p.prediction_dot = take(predictions), p.cotangent_dot = take(predictions);
  p.append_sums = take(chain.appended);
  p.value = take(1);
  return p;
}

}  // namespace maml::cuda
