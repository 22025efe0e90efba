// The mean over windows, for avg_pool and mean_pool: y[i, j, c] = the mean of x over the window of (i, j);
// count_padding decides whether padding counts in the divisor. The twin on the GPU is cuda/avg_pool.cu.
#pragma once

#include <algorithm>

#include "cpu/run/share.h"
#include "layers/layer.h"

namespace maml::MAML_ISA {

struct MeanOverWindows {
  /// Calls f(output pixel, input pixel, 1 / divisor) for every input pixel of every window, outputs
  /// ascending.
  template <class F>
  static void each_pair(const Layer& l, F f) {
    const Window& k = l.window;
    for (int64_t i = 0; i < l.out.h; ++i) {
      const int64_t r0 = i * k.stride_h - k.pad_top, r1 = r0 + k.kernel_h;
      for (int64_t j = 0; j < l.out.w; ++j) {
        const int64_t q0 = j * k.stride_w - k.pad_left, q1 = q0 + k.kernel_w;
        const int64_t ra = std::max<int64_t>(0, r0), rb = std::min(l.in.h, r1);
        const int64_t qa = std::max<int64_t>(0, q0), qb = std::min(l.in.w, q1);
        const int64_t divisor = l.count_padding ? k.kernel_h * k.kernel_w : (rb - ra) * (qb - qa);
        for (int64_t r = ra; r < rb; ++r) {
          for (int64_t q = qa; q < qb; ++q)
            f(i * l.out.w + j, r * l.in.w + q, 1.0 / static_cast<double>(divisor));
        }
      }
    }
  }

  template <class T>
  static void apply(const Layer& l, const T* x, T* y) {
    const int64_t c = l.in.c;
    share_samples(l.n, size(l.in), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        std::fill_n(y + s * size(l.out), size(l.out), T(0));
        each_pair(l, [&](int64_t out, int64_t in, double weight) {
          const T w = static_cast<T>(weight);
          const T* __restrict from = x + s * size(l.in) + in * c;
          T* __restrict to = y + s * size(l.out) + out * c;
          for (int64_t ch = 0; ch < c; ++ch) to[ch] += w * from[ch];
        });
      }
    });
  }

  template <class T>
  static void adjoint(const Layer& l, const T* g, bool add, T* grad_x) {
    const int64_t c = l.in.c;
    share_samples(l.n, size(l.in), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        if (!add) std::fill_n(grad_x + s * size(l.in), size(l.in), T(0));
        each_pair(l, [&](int64_t out, int64_t in, double weight) {
          const T w = static_cast<T>(weight);
          const T* __restrict from = g + s * size(l.out) + out * c;
          T* __restrict to = grad_x + s * size(l.in) + in * c;
          for (int64_t ch = 0; ch < c; ++ch) to[ch] += w * from[ch];
        });
      }
    });
  }
};

}  // namespace maml::MAML_ISA
