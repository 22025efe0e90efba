// The convolution of one task as plain loops in double. Each function adds its result to the output.
#pragma once

#include <vector>

#include "layers/layer.h"

namespace conv2d_reference {

using maml::Layer;
using Values = std::vector<double>;

inline int64_t weights(const Layer& l) { return l.window.kernel_h * l.window.kernel_w * l.in.c * l.out.c; }

/// Calls f(y index, x index, w index) for every pair of an output pixel and a tap; the caller loops over
/// channels.
template <class F>
inline void each_tap(const Layer& l, F f) {
  for (int64_t s = 0; s < l.n; ++s) {
    for (int64_t i = 0; i < l.out.h; ++i) {
      for (int64_t j = 0; j < l.out.w; ++j) {
        for (int64_t r = 0; r < l.window.kernel_h; ++r) {
          for (int64_t q = 0; q < l.window.kernel_w; ++q) {
            const int64_t y = i * l.window.stride_h + r - l.window.pad_top;
            const int64_t x = j * l.window.stride_w + q - l.window.pad_left;
            if (y < 0 || y >= l.in.h || x < 0 || x >= l.in.w) continue;
            f(((s * l.out.h + i) * l.out.w + j) * l.out.c, ((s * l.in.h + y) * l.in.w + x) * l.in.c,
              (r * l.window.kernel_w + q) * l.in.c * l.out.c);
          }
        }
      }
    }
  }
}

inline void add_convolution(const Layer& l, const Values& x, const Values& w, Values& y) {
  each_tap(l, [&](int64_t to, int64_t from, int64_t at) {
    for (int64_t c = 0; c < l.in.c; ++c) {
      for (int64_t o = 0; o < l.out.c; ++o) y[to + o] += x[from + c] * w[at + c * l.out.c + o];
    }
  });
}
inline void add_input_gradient(const Layer& l, const Values& g, const Values& w, Values& grad_x) {
  each_tap(l, [&](int64_t from, int64_t to, int64_t at) {
    for (int64_t c = 0; c < l.in.c; ++c) {
      for (int64_t o = 0; o < l.out.c; ++o) grad_x[to + c] += g[from + o] * w[at + c * l.out.c + o];
    }
  });
}
inline void add_weight_gradient(const Layer& l, const Values& x, const Values& g, Values& grad_w) {
  each_tap(l, [&](int64_t gy, int64_t from, int64_t at) {
    for (int64_t c = 0; c < l.in.c; ++c) {
      for (int64_t o = 0; o < l.out.c; ++o) grad_w[at + c * l.out.c + o] += x[from + c] * g[gy + o];
    }
  });
}
inline void fill_rows(Values& y, const Values& row) {
  for (size_t i = 0; i < y.size(); ++i) y[i] = row[i % row.size()];
}
inline void add_columns(const Values& g, Values& sums) {
  for (size_t i = 0; i < g.size(); ++i) sums[i % sums.size()] += g[i];
}

}  // namespace conv2d_reference
