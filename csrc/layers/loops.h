// Layers on tensors of any shape. What they compute does not depend on what their axes mean, so they are
// given as nested loops in which every operand has a stride for each axis:
//
//   move      y[.] = x_j[.]                    for each input j, loops of its own
//   windows   y[.] = x[.] at positions + taps  along some axes of x (Slide), 0 outside of x
//   map       y[.] = f(x_0[.], x_1[.], ...)    f: an Expression
//   reduce    y[.] = the sum, mean or extreme of x[.] over the axes along which y has stride 0
//   contract  y[.] = the sum of x_0[.] x_1[.] over the axes along which y has stride 0
//   depthwise y[.] = the sum over taps of x[.] w[.], x at positions + taps (Slide), w that of a channel
//   softmax, log_softmax                       over the last axis
//   stop      y = x, with cotangent and tangent 0
//   recurrence                                 over time (recurrence.h); for each input, loops of its own
//   attention                                  softmax(scale q k' + bias) v (attention.h)
//   gather    y[.] = x_0[., x_1[.]]            x_1: places along one more axis of x_0 (Axis)
//   scatter   y[., x_1[.]] = the sum of x_0[.] x_1: places along one more axis of y
//   sort      y[.] = the places of x[.]        in order, over the last axis
//   dropout   y[.] = a x[.] where a random mask is 1 (Mask), otherwise 0
//
// A permutation, an expansion or a part of a value is a view: strides and an offset, no layer. A broadcast
// operand has stride 0. Its cotangent is the sum over that axis.
#pragma once

#include "layers/combinations.h"

namespace maml {

constexpr int kMostAxes = 8;
constexpr int64_t kSamples = -1;  // the size of the axis of samples, Layer::n

/// The elements of one operand: (i_0, i_1, ...) is at offset + the sum of i_a stride[a].
struct View {
  int64_t size = 0;      // elements of the operand, of one sample if it has samples
  bool samples = false;  // whether it has a part for each sample: that axis has the stride `size`
  bool whole = false;    // whether the loops come to each of its elements, to each once
  int64_t offset = 0;
  int64_t stride[kMostAxes] = {};
};

constexpr int kMostSlides = 3;

/// Of `windows` and `depthwise`: an axis of x over which a window slides. The loops have two axes in its
/// place, that of the window's positions and that of its taps; at (p, t) they are at element p stride + t
/// dilation - padding of the axis. x has the stride 0 along both.
struct Slide {
  int position = 0, tap = 0;       // axes of the loops
  int64_t size = 0, x_stride = 0;  // of the axis of x
  int64_t stride = 1, dilation = 1, padding = 0;
};

/// Of `gather` and `scatter`: an axis of an operand that the loops do not go along. Another operand, the
/// index, has the place along it.
struct Axis {
  int64_t size = 0, stride = 0;
};

/// The place along an axis of this size that a value of the index is; -1 if it is outside, or NaN.
template <class T>
MAML_HOST_DEVICE inline int64_t place_along(int64_t size, T index) {
  return index >= T(0) && index < static_cast<T>(size) ? static_cast<int64_t>(index) : -1;
}

struct Loops {
  int axes = 0;
  int64_t size[kMostAxes] = {};  // kSamples for at most one axis
  View x[kMostInputs], y;        // of move and recurrence: x[0] is the input that these loops are of
  int slides = 0;
  Slide slide[kMostSlides];
  Axis axis;  // of x[0] in gather, of y in scatter
};

/// Of `dropout`: a random mask of zeros and ones (dropout.h). Its elements are numbered in torch's order,
/// those of all samples of the set. The loops come to number i_0 stride[0] + i_1 stride[1] + ..., where the
/// strides of axes outside of that of the samples are times the number of samples.
struct Mask {
  uint32_t number = 0;  // of the masks of one forward pass
  uint64_t keep = 0;    // an element is 1 if its random number is less: with probability keep / 2^32
  int64_t stride[kMostAxes] = {};
  bool times_samples[kMostAxes] = {};
};

/// The number of steps along an axis.
MAML_HOST_DEVICE inline int64_t extent(const Loops& loops, int axis, int64_t n) {
  return loops.size[axis] == kSamples ? n : loops.size[axis];
}
/// How often the loops' body runs.
MAML_HOST_DEVICE inline int64_t iterations(const Loops& loops, int64_t n) {
  int64_t count = 1;
  for (int a = 0; a < loops.axes; ++a) count *= extent(loops, a, n);
  return count;
}
/// The elements of an operand for n samples.
MAML_HOST_DEVICE inline int64_t elements(const View& view, int64_t n) {
  return view.samples ? n * view.size : view.size;
}

/// How a reduce layer combines the elements. amax and amin share the derivative among equal extremes, as
/// torch.amax does; max and min give it to the first of them, as torch.max over one axis does.
enum class Reduction : int { sum, mean, amax, amin, max, min, count };

inline const char* name_of(Reduction reduction) {
  static const char* const kNames[] = {"sum", "mean", "amax", "amin", "max", "min"};
  return kNames[static_cast<int>(reduction)];
}

constexpr int kMostInstructions = 20;

/// One operation of an expression: `function` of one argument, or else `combination` of two or three.
/// Arguments are numbers of operands x_0 ... x_m-1, or m + i for the result of instruction i.
struct ExpressionStep {
  bool unary = true;
  Function function{};
  Combination combination{};
  int argument[3] = {};
  Constants constants;  // of the function
};

/// Whether the first argument of an instruction has no derivative: the condition of `where`.
MAML_HOST_DEVICE inline int first_argument(const ExpressionStep& s) {
  return !s.unary && s.combination == Combination::where ? 1 : 0;
}
/// The number of its arguments from there on.
MAML_HOST_DEVICE inline int arguments(const ExpressionStep& s) { return s.unary ? 1 : 2; }

MAML_HOST_DEVICE constexpr bool is_comparison(Combination c) {
  return c >= Combination::eq && c <= Combination::ge;
}
/// Whether the derivatives of an instruction are zero everywhere.
MAML_HOST_DEVICE inline bool is_flat(const ExpressionStep& s) {
  return s.unary ? s.function == Function::sign : is_comparison(s.combination);
}

/// Whether a derivative of an instruction chooses between 0 and the cotangent, so that 0 times infinity is 0,
/// as in torch.
MAML_HOST_DEVICE constexpr bool selects(Function f) {
  return f == Function::relu || f == Function::hardtanh || f == Function::clamp;
}
MAML_HOST_DEVICE constexpr bool selects(Combination c) {
  return c == Combination::maximum || c == Combination::minimum || c == Combination::where;
}
MAML_HOST_DEVICE inline bool selects(const ExpressionStep& s) {
  return s.unary ? selects(s.function) : selects(s.combination);
}
/// slope x
template <bool Selects, class T>
MAML_HOST_DEVICE static inline T times(T slope, T x) {
  return Selects && slope == 0 ? T(0) : slope * x;
}

/// A function of `operands` arguments; the result of the last instruction is its value.
struct Expression {
  int operands = 0, count = 0;
  ExpressionStep step[kMostInstructions];
};

}  // namespace maml
