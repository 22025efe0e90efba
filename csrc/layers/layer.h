// The interface between the plan and a backend: what a layer is, and the four passes that every backend
// implements. Everything here is plain data, so that a kernel can take it by value.
//
// Shapes. A value is [n, h, w, c], channels last, contiguous; features are [n, 1, 1, c]. The input of the
// plan and the target of a loss have the user's order of elements, [n, c, h, w]; `channels_last` and
// `flatten` convert between the two orders. The weight of a linear layer or a convolution is [tap, c_in,
// c_out], taps in row-major order; all other parameters are [c].
#pragma once

#include <cstdint>

#include "layers/shape.h"

namespace maml {

enum class Kind : int;       // layers/kinds.h
enum class Function : int;   // layers/functions.h
enum class Reduction : int;  // layers/loops.h
enum class Cell : int;       // layers/cells.h
struct Loops;
struct Expression;
struct Mask;

/// How products of float32 are computed: in float32, or by matrix instructions on operands that are rounded
/// to 19 bits (tf32) or 16 bits (bfloat16) or split into two bf16 (bf16x3: three products). Sums are always
/// float32. Backends without matrix instructions support float32 only.
enum class Precision { float32, bf16x3, tf32, bfloat16 };

/// A sliding window: output (i, j) reads input rows i * stride_h - pad_top + [0, kernel_h), columns alike.
struct Window {
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0;
};

constexpr int64_t kMostKernelRows = 64;

/// What all random masks of a pass have in common (philox.h).
struct Stream {
  uint64_t seed = 0;         // of the call
  uint32_t task = 0;         // its number in the call
  uint32_t pass = 0;         // 2 k: on the support set at phi_k; 2 k + 1: on the query set
  int64_t samples = 0;       // of the set
  int64_t first_sample = 0;  // of the tile
};

/// Numbers of a layer; its declaration tells what they mean (functions.h: those of a function).
struct Constants {
  double a = 0, b = 0, c = 1;
};

/// One layer with its shapes. A linear layer is a convolution with one tap on a 1 x 1 image.
struct Layer : Constants {
  Kind kind;
  int64_t n;  // samples of one task that are processed together
  Image in, out;
  Window window;
  Function function{};
  double eps = 0;             // of all normalisations
  int64_t groups = 1;         // group_norm; in a Node, 0 means that every channel is a group
  bool count_padding = true;  // avg_pool: padding counts in the divisor
  // A max-pool comes last: in norm_block over `window`, in conv_block and stem of 2 x 2 pixels, each in one
  // window.
  bool pooled = false;
  Image between{};                           // patch_gram, stem and conv_block: the convolution's output
  Precision precision = Precision::float32;  // conv2d and stem
  // Of the layers on tensors of any shape (loops.h), owned by the plan. move and recurrence: one for each
  // input.
  const Loops* loops = nullptr;
  const Expression* expression = nullptr;  // map
  Reduction reduction{};                   // reduce
  Cell cell{};                             // recurrence
  const Mask* mask = nullptr;              // dropout
  // dropout; `Walk` sets it for each pass. On a GPU, seed and task are in the table (cuda/run/address.h).
  Stream stream;
};

constexpr int kMostInputs = 4, kMostParameters = 4;

/// One node's tensors for one task. Null means zero for an input and "not wanted" for an output.
///   grad_*      cotangents of the primal pass
///   *_dot       tangents: derivatives along the direction w_dot of the parameters
///   grad_*_dot  tangents of the cotangents, from which a Hessian-vector product is built
/// `add_x[i]`, `add_w[i]`: add to the values in grad_x[i], grad_w[i] (and their tangents), for a value that
/// is read twice or a parameter that is shared.
template <class T>
struct Tensors {
  const T* x[kMostInputs] = {};
  T* y = nullptr;
  T* grad_x[kMostInputs] = {};
  const T* grad_y = nullptr;
  const T* x_dot[kMostInputs] = {};
  T* y_dot = nullptr;
  T* grad_x_dot[kMostInputs] = {};
  const T* grad_y_dot = nullptr;

  const T* w[kMostParameters] = {};  // weight and bias; gamma and beta; stem: all four;
                                     // running_norm: gamma, beta, mean and variance
  T* grad_w[kMostParameters] = {};
  const T* w_dot[kMostParameters] = {};
  T* grad_w_dot[kMostParameters] = {};

  // Statistics that a convolution computes of its output, where a normalisation is the only reader of that
  // output. One entry for each tile of rows (their number is the backend's choice), per channel: the mean of
  // y and the sum of squares about it [tiles, 2, c]; from the tangent pass, the means of y and y_dot and the
  // sum of products about them [tiles, 3, c]. Both layers have the same addresses.
  T* statistics = nullptr;
  T* statistics_dot = nullptr;

  T* saved = nullptr;      // values that a pass saves for later passes: Footprint::saved elements
  T* saved_dot = nullptr;  // values that the forward tangent saves for the backward tangent
  T* scratch = nullptr;    // Footprint::scratch elements, not used after the pass

  bool add_x[kMostInputs] = {}, add_w[kMostParameters] = {};  // after all addresses (see megakernel.cu)
};

/// A layer is four passes. With L the loss and R{.} the derivative along w_dot:
///   forward            y from x, w
///   backward           grad_x, grad_w from grad_y
///   forward_tangent    y_dot = R{y} from x_dot, w_dot
///   backward_tangent   grad_x_dot = R{grad_x}, grad_w_dot = R{grad_w} from grad_y_dot, grad_y, x_dot, w_dot
template <class T>
struct Passes {
  void (*forward)(const Layer&, const Tensors<T>&);
  void (*backward)(const Layer&, const Tensors<T>&);
  void (*forward_tangent)(const Layer&, const Tensors<T>&);
  void (*backward_tangent)(const Layer&, const Tensors<T>&);
};

/// How many elements of T a layer saves between its passes, and how many it needs within one pass.
struct Footprint {
  int64_t saved = 0, scratch = 0, saved_dot = 0;
};

/// What the planner must know about a backend's layers.
struct LayerTraits {
  Footprint (*footprint)(const Layer&);  // does not decrease with the number of samples
  Kind chain;                            // the chain that the backend fuses: norm_block or conv_block
  /// Rows of y in one tile of a convolution's statistics; null: convolutions compute none.
  int64_t (*statistics_rows)(const Layer&) = nullptr;
  /// The most samples that go through the layers together, where no layer mixes samples.
  int64_t tile = INT64_MAX;
  /// Bytes of a task's tiles up to which the states of all of them are kept for its Hessian-vector products,
  /// because reading them, even from memory, is faster than computing them again.
  int64_t kept_bytes = 0;
  /// Bytes of a task, untiled, up to which the states of all its inner steps are kept. If they would be more,
  /// the gradient pass is run again for each Hessian-vector product: the bits are the same, and memory does
  /// not grow with the steps. A CPU reads so much state in the time in which it computes it.
  int64_t saved_bytes = int64_t{192} << 20;
  /// Whether a pointwise pass may overwrite its input.
  bool in_place = false;
};

/// The prediction [n, c] of a Gaussian policy is the mean followed by log_std, each of c / 2 dimensions.
/// computed: layers of the plan compute the loss, a value of one element.
enum class Loss { cross_entropy, mse, gaussian_policy, categorical_policy, computed };

constexpr bool is_policy(Loss loss) {
  return loss == Loss::gaussian_policy || loss == Loss::categorical_policy;
}
/// Whether a target is one of c classes.
constexpr bool takes_classes(Loss loss) {
  return loss == Loss::cross_entropy || loss == Loss::categorical_policy;
}

/// The targets of a loss for the predictions [n, c] of one task. A computed loss has c numbers a sample.
template <class T>
struct Target {
  const void* y = nullptr;           // labels or actions, int64 [n]; values [n, c]; actions [n, c / 2]
  const T* scale = nullptr;          // policies, samples with weights: the scale of each [n]
  const T* old_log_probs = nullptr;  // policies: for the likelihood ratio [n]; null: the score form

  /// The number of elements of y for one sample.
  static constexpr int64_t width(Loss loss, int64_t c) {
    return takes_classes(loss) ? 1 : loss == Loss::gaussian_policy ? c / 2 : c;
  }
  constexpr Target from(Loss loss, int64_t c, int64_t sample) const {
    Target t = *this;
    if (y && takes_classes(loss)) {
      t.y = static_cast<const int64_t*>(y) + sample;
    } else if (y) {
      t.y = static_cast<const T*>(y) + sample * width(loss, c);
    }
    if (scale) t.scale = scale + sample;
    if (old_log_probs) t.old_log_probs = old_log_probs + sample;
    return t;
  }
};

/// A part of the loss of one task: n samples with predictions z [n, c], of the `samples` over which the loss
/// is a mean.
struct LossPart {
  Loss kind;
  int64_t n, c, samples;
  bool add;           // add to the value of the earlier parts
  int64_t first = 0;  // the number of the first sample, for errors
};

/// The passes of a loss. `saved` holds n * c elements from value() for tangent().
///   value    the loss, and grad_z unless it is null
///   tangent  R{grad_z} from z_dot
///   metric   F z_dot; the Fisher matrix F of a policy is the sum over samples of scale times their own
template <class T>
struct LossPasses {
  T (*value)(const LossPart&, const T* z, const Target<T>&, T* grad_z, T* saved);
  void (*tangent)(const LossPart&, const T* z, const Target<T>&, const T* z_dot, const T* saved,
                  T* grad_z_dot);
  void (*metric)(const LossPart&, const T* z, const Target<T>&, const T* z_dot, T* grad_z) = nullptr;
};

}  // namespace maml
