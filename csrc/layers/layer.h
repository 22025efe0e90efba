// The contract between the plan and a backend: what a layer is, and the four passes that every backend writes
// for it. Everything here is plain data, so that a kernel can take it by value.
//
// Shapes. A value is [n, h, w, c], channels last, dense; features are [n, 1, 1, c]. The input of the plan and
// the target of a loss stand as the user gave them, [n, c, h, w]; `channels_last` and `flatten` turn one
// order into the other. A weight of a linear layer or a convolution is [tap, c_in, c_out], taps in row-major
// order; all other parameters are [c].
#pragma once

#include <cstdint>

#include "layers/shape.h"

namespace maml {

enum class Kind : int;      // layers/kinds.h
enum class Function : int;  // layers/functions.h

/// How products of float32 are computed: as such, or on matrix units from operands of three bf16 products
/// (bf16x3), of 19 bits (tf32) or of 16 bits (bfloat16), always with float32 sums. Backends without them know
/// float32 alone.
enum class Precision { float32, bf16x3, tf32, bfloat16 };

/// A sliding window: output (i, j) reads input rows i * stride_h - pad_top + [0, kernel_h), columns alike.
struct Window {
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0;
};

constexpr int64_t kMostKernelRows = 64;

/// One layer with its shapes. A linear layer is a convolution with one tap on a 1 x 1 image.
struct Layer {
  Kind kind;
  int64_t n;  // samples at hand, of one task
  Image in, out;
  Window window;
  Function function{};
  // Constants of `function`; append: the floor a; conv_block and stem: f(u) = u > 0 ? u : a u, 1 for none.
  double a = 0, b = 0, c = 1;
  double eps = 0;             // of every normalisation
  int64_t groups = 1;         // group_norm; of a Node 0: every channel is one
  bool count_padding = true;  // avg_pool: padding counts in the divisor
  bool pooled =
      false;        // a max-pool comes last: norm_block: over `window`; others: of 2 x 2 pixels, each in one
  Image between{};  // patch_gram, stem and conv_block: the convolution's output
  Precision precision = Precision::float32;  // conv2d and stem
};

constexpr int kMostInputs = 4, kMostParameters = 4;

/// One node's tensors for one task. A null pointer says "zero" for what is read, "not wanted" for what is
/// written.
///   grad_*      cotangents of the primal pass
///   *_dot       tangents: derivatives along the direction w_dot on the parameters
///   grad_*_dot  tangents of the cotangents: what a Hessian-vector product is made of
/// `add_x[i]`, `add_w[i]`: add to what grad_x[i], grad_w[i] (and their tangents) hold, for a value read twice
/// or a shared parameter.
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

  // Statistics that a convolution takes of its output on the way out, for the normalisation that alone reads
  // it, one entry for each tile of rows (a backend's own number of them), per channel: the mean of y and the
  // sum of squares about it [tiles, 2, c]; and from the tangent pass the means of y and y_dot and the sum of
  // products about them [tiles, 3, c]. Both layers see the same addresses.
  T* statistics = nullptr;
  T* statistics_dot = nullptr;

  T* saved = nullptr;      // what a pass keeps for the later ones: Footprint::saved elements
  T* saved_dot = nullptr;  // what the forward tangent keeps for the backward one
  T* scratch = nullptr;    // Footprint::scratch elements, dead after the pass

  bool add_x[kMostInputs] = {}, add_w[kMostParameters] = {};  // behind all addresses
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

/// How many elements of T a layer keeps between its passes, and how many it needs within one.
struct Footprint {
  int64_t saved = 0, scratch = 0, saved_dot = 0;
};

/// What the planner must know of a backend's layers.
struct LayerTraits {
  Footprint (*footprint)(const Layer&);  // no smaller for more samples
  Kind chain;                            // norm_block or conv_block: which of the two it has
  /// Rows of y in one tile of the statistics that a convolution takes; null: it takes none.
  int64_t (*statistics_rows)(const Layer&) = nullptr;
  /// Samples that go through the layers together, at most, where no layer makes one depend on another.
  int64_t tile = INT64_MAX;
  /// Bytes of a task's tiles up to which the states of all of them are kept for its Hessian-vector products:
  /// even from memory they are sooner read than computed again.
  int64_t kept_bytes = 0;
  /// Whether a pointwise pass may write where it reads.
  bool in_place = false;
};

/// A Gaussian policy's prediction [n, c] is mean and log_std beside each other, of c / 2 dimensions.
enum class Loss { cross_entropy, mse, gaussian_policy, categorical_policy };

inline bool is_policy(Loss loss) { return loss == Loss::gaussian_policy || loss == Loss::categorical_policy; }
/// Whether a target is one of c classes.
inline bool takes_classes(Loss loss) {
  return loss == Loss::cross_entropy || loss == Loss::categorical_policy;
}

/// What a loss compares the predictions [n, c] of one task with.
template <class T>
struct Target {
  const void* y = nullptr;           // labels or actions, int64 [n]; values [n, c]; actions [n, c / 2]
  const T* scale = nullptr;          // policies: what each sample counts [n]
  const T* old_log_probs = nullptr;  // policies: of the likelihood ratio [n]; null: the score form

  /// Elements of y a sample.
  static int64_t width(Loss loss, int64_t c) {
    return takes_classes(loss) ? 1 : loss == Loss::gaussian_policy ? c / 2 : c;
  }
  Target from(Loss loss, int64_t c, int64_t sample) const {
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

/// The part of n samples in the loss of one task, which is a mean over `samples`, of predictions z [n, c].
struct LossPart {
  Loss kind;
  int64_t n, c, samples;
  bool add;  // to the value that the parts before have given
};

/// `saved` keeps n * c elements from value() for tangent().
///   value    the loss, grad_z where it is wanted
///   tangent  R{grad_z} from z_dot
///   metric   F z_dot, where the Fisher matrix of the policies is the sum of scale times that of each sample
template <class T>
struct LossPasses {
  T (*value)(const LossPart&, const T* z, const Target<T>&, T* grad_z, T* saved);
  void (*tangent)(const LossPart&, const T* z, const Target<T>&, const T* z_dot, const T* saved,
                  T* grad_z_dot);
  void (*metric)(const LossPart&, const T* z, const Target<T>&, const T* z_dot, T* grad_z) = nullptr;
};

}  // namespace maml
