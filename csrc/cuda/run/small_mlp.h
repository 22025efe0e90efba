// The description of a small multilayer perceptron, for the kernel that computes its whole meta-step in one
// block a task (small_mlp.cu), and the layout of that block's shared memory.
#pragma once

#include <optional>

#include "cuda/product/padded.h"
#include "cuda/run/layout.h"

namespace maml::cuda {

inline constexpr int kMostMlpLayers = 4;

/// Spans of a call: the regions, and the parameters.
inline constexpr int kMlpSpans = static_cast<int>(Region::count) + 2 * kMostMlpLayers;

/// A linear layer with the function after it; the last layer has none. Offsets count elements; those of
/// values are for one sample: a value of n samples stands at n times the offset.
struct MlpLayer : Constants {
  int in, out;                           // features
  int in_stride, out_stride;             // of a padded row (cuda/product/padded.h)
  int depth, in_vectors, out_vectors;    // vectors of in + 1, in and out elements
  int weight;                            // in padded parameters
  int weight_result, bias_result;        // in the packed result
  int weight_parameter, bias_parameter;  // -1: there is no bias
  double weight_rate, bias_rate;
  // In the region of a pass: the output f(z), the slope f'(z), the curvature f''(z) times the cotangent of
  // the output, and the cotangent of z. Of the last layer the cotangent, and the probabilities (`slope`).
  int value, slope, curve, grad;
  int dot, grad_dot;  // in the region of tangents: those of the output and of the cotangent of z
  Function function;
  bool bends;  // whether f'' is not zero
  Divider by_in, by_out, by_in_vectors, by_out_vectors;

  /// The rows of the weight that are not padding.
  __device__ __forceinline__ int rows() const { return in + (bias_parameter >= 0); }
};

/// The samples of a set, in padded rows at `x`; targets [n, out], or labels as int32 [n], at `y`.
struct MlpSet {
  int n, x, y;
};

/// The network, and the layout of shared memory in elements: both sets; phi_0 .. phi_K, or in a first-order
/// step two of them in turns; v and the first direction; the region of each inner step, or one for all; one
/// region for the query pass and then the tangents.
struct SmallMlp {
  int layers, steps;
  bool second_order;
  Loss loss;
  MlpSet support, query;
  int phi, phi_size, v, direction;
  int regions, region_row, shared, shared_size;
  int size;
  MlpLayer layer[kMostMlpLayers];
};

/// The problem as such a network: linear layers with functions between them, all of whose parameters are
/// adapted, at constant rates. Nothing if it is another one, or does not fit the shared memory of a block.
template <class T>
std::optional<SmallMlp> small_mlp_of(const Problem& problem, int device);

/// Computes the meta-gradient of every task of `launch`. Spans, table and results as in launch_megakernel.
template <class T>
void launch_small_mlp(const Launcher& launch, const SmallMlp& net, const Span* spans, const SpanOrder& order,
                      Span* table);

}  // namespace maml::cuda
