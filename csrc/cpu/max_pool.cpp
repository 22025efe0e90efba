// y[i, j, c] = the largest x in the window of (i, j), for one task, channels last. The forward pass saves the
// position of the maximum (a pixel numbered within its sample; the first of equal values; a NaN wins, as in
// torch). The tangents read the same positions. The backward passes add the cotangents to them, output by
// output in ascending order. The twin on the GPU is cuda/max_pool.cu.
#include <algorithm>
#include <limits>

#include "cpu/implement.h"
#include "cpu/run/share.h"

namespace maml::MAML_ISA {
namespace {

template <class T>
int32_t* places(const Tensors<T>& t) {
  return reinterpret_cast<int32_t*>(t.saved);
}

/// Computes samples [first_sample, last_sample).
template <class T>
void choose(const Layer& l, const T* all_x, T* all_y, int32_t* places, int64_t first_sample,
            int64_t last_sample) {
  const Window& k = l.window;
  const int64_t c = l.in.c;
  T* y = all_y + first_sample * size(l.out);
  int32_t* place = places + first_sample * size(l.out);
  for (int64_t s = first_sample; s < last_sample; ++s) {
    const T* x = all_x + s * size(l.in);
    for (int64_t i = 0; i < l.out.h; ++i) {
      const int64_t r0 = i * k.stride_h - k.pad_top;
      for (int64_t j = 0; j < l.out.w; ++j, y += c, place += c) {
        const int64_t q0 = j * k.stride_w - k.pad_left;
        bool first = true;
        for (int64_t r = std::max<int64_t>(0, r0); r < std::min(l.in.h, r0 + k.kernel_h); ++r) {
          for (int64_t q = std::max<int64_t>(0, q0); q < std::min(l.in.w, q0 + k.kernel_w); ++q) {
            const int32_t pixel = static_cast<int32_t>(r * l.in.w + q);
            const T* __restrict from = x + pixel * c;
            T* __restrict to = y;
            int32_t* __restrict at = place;
            if (first) {
              for (int64_t ch = 0; ch < c; ++ch) to[ch] = from[ch], at[ch] = pixel;
              first = false;
              continue;
            }
            for (int64_t ch = 0; ch < c; ++ch) {
              const bool larger = from[ch] > to[ch] || from[ch] != from[ch];
              at[ch] = larger ? pixel : at[ch];
              to[ch] = larger ? from[ch] : to[ch];
            }
          }
        }
      }
    }
  }
}

template <class T>
void gather(const Layer& l, const int32_t* place, const T* x, T* y) {
  const int64_t c = l.in.c, pixels = l.out.h * l.out.w;
  share_samples(l.n, size(l.out), [=](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const T* from = x + s * size(l.in);
      for (int64_t m = s * pixels * c; m < (s + 1) * pixels * c; m += c) {
        for (int64_t ch = 0; ch < c; ++ch) y[m + ch] = from[place[m + ch] * c + ch];
      }
    }
  });
}

template <class T>
void scatter(const Layer& l, const int32_t* place, const T* g, bool add, T* grad_x) {
  const int64_t c = l.in.c, pixels = l.out.h * l.out.w;
  share_samples(l.n, size(l.in), [=](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      T* to = grad_x + s * size(l.in);
      if (!add) std::fill_n(to, size(l.in), T(0));
      for (int64_t m = s * pixels * c; m < (s + 1) * pixels * c; m += c) {
        for (int64_t ch = 0; ch < c; ++ch) to[place[m + ch] * c + ch] += g[m + ch];
      }
    }
  });
}

}  // namespace

template <>
struct OnCpu<Kind::max_pool> {
  static int64_t choices(const Layer& l) { return l.n * size(l.out); }
  template <class T>
  static void choose(const Layer& l, const T* x, T* y, int32_t* places) {
    share_samples(l.n, size(l.in),
                  [&](int64_t first, int64_t last) { MAML_ISA::choose(l, x, y, places, first, last); });
  }
  template <class T>
  static void apply(const Layer& l, const int32_t* places, const T* x, T* y) {
    gather(l, places, x, y);
  }
  template <class T>
  static void adjoint(const Layer& l, const int32_t* places, const T* g, bool add, T* grad_x) {
    scatter(l, places, g, add, grad_x);
  }
};
template struct Implementation<Kind::max_pool>;

}  // namespace maml::MAML_ISA
