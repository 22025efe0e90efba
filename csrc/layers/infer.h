// Helpers of the declarations: shape inference, and the errors for shapes that do not fit.
#pragma once

#include <span>
#include <stdexcept>
#include <string>

#include "layers/node.h"

namespace maml {

/// The shape of the output of `node`: like its input, with the layout and the channels that the node sets.
/// Throws, naming the module, where the input's layout, channels or shape do not fit.
Shape output_like_input(const Node& node, const Shape& x);

/// The image that results from a window over x. `name`: the module; `padding_end`: padding below and to the
/// right.
Image slide(const std::string& name, const Window& window, const std::array<int64_t, 2>& padding_end,
            const Shape& x);

/// Throws where batch statistics would be computed from one value.
void check_batch_statistics(const std::string& name, const Shape& x, int64_t n);

/// The shape of the output of a layer on tensors of any shape. Throws where its loops leave an operand.
Shape output_of_loops(const Node& node, std::span<const Shape> x);

/// Throws where the loops of a recurrence are not those of sequences and states (recurrence.h), or where the
/// offsets of its rows would not be int32.
void check_recurrence(const Node& node, int64_t n);

/// Throws where the loops of a depthwise convolution are not those of positions, taps and channels
/// (depthwise.h).
void check_depthwise(const Node& node);

/// Throws where the loops of an attention are not those of queries, keys and values (attention.h).
void check_attention(const Node& node);

/// Throws where two values cannot be added.
void check_sum(const std::string& name, const Shape& a, const Shape& b);

/// Approximate multiply-adds of a layer that does a few operations for each element of its output.
inline int64_t elementwise_work(const Layer& l) { return 4 * l.n * size(l.out); }

/// The same for a layer on tensors of any shape, with this many operations a step of its loops.
inline int64_t work_of_loops(const Layer& l, int64_t operations) {
  return operations * iterations(l.loops[0], l.n);
}

/// Multiply-adds of a convolution with `pixels` output pixels a sample.
inline int64_t convolution_work(const Layer& l, const Image& pixels) {
  return l.n * pixels.h * pixels.w * l.window.kernel_h * l.window.kernel_w * l.in.c * l.out.c;
}

/// Whether channels-first and channels-last order are the same.
inline bool has_one_order(const Image& image) { return image.c == 1 || image.h * image.w == 1; }

}  // namespace maml
