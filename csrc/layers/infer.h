// What the declarations share to infer shapes, and to say what does not fit.
#pragma once

#include <span>
#include <stdexcept>
#include <string>

#include "plan/graph.h"

namespace maml {

/// The input of `node`, or an exception that names the module: its layout, its channels, its shape. The
/// result has the layout and the channels that the node asks of its output, and is else like the input.
Shape output_like_input(const Node& node, const Shape& x);

/// The image that a window makes of another one; `name`: the module, `padding_end`: below and to the right.
Image slide(const std::string& name, const Window& window, const std::array<int64_t, 2>& padding_end,
            const Shape& x);

/// Throws where batch statistics would be of one value.
void check_batch_statistics(const std::string& name, const Shape& x, int64_t n);

/// Throws where two values cannot be added.
void check_sum(const std::string& name, const Shape& a, const Shape& b);

/// Multiply-adds of a layer that does a few for each element of its output.
inline int64_t elementwise_work(const Layer& l) { return 4 * l.n * size(l.out); }

/// Multiply-adds of a convolution to `pixels` outputs a sample.
inline int64_t convolution_work(const Layer& l, const Image& pixels) {
  return l.n * pixels.h * pixels.w * l.window.kernel_h * l.window.kernel_w * l.in.c * l.out.c;
}

/// Whether channels first and channels last are the same order.
inline bool has_one_order(const Image& image) { return image.c == 1 || image.h * image.w == 1; }

}  // namespace maml
