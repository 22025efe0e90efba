// Windows that slide over the images of one task, in both directions: the pixels that an output reads, and
// the outputs that read a pixel. Pixels and outputs are numbered within their sample, row by row.
//
// The second direction iterates over cells. A cell is stride_h x stride_w pixels; cell (a, b) starts where
// window (a, b) does. Which windows contain a pixel then follows from its position within the cell, without a
// division: row o of a cell lies in the windows a, a - 1, ... a - (kernel_h - 1 - o) / stride_h. Pixels
// before the first window or after the last belong to cells whose windows do not exist.
#pragma once

#include <algorithm>

#include "cuda/channels.h"

namespace maml::cuda {

/// A layer's window, with its sizes in 32 bits.
struct Windows {
  int in_h, in_w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left;

  __device__ __forceinline__ explicit Windows(const Layer& l)
      : in_h(static_cast<int>(l.in.h)),
        in_w(static_cast<int>(l.in.w)),
        out_h(static_cast<int>(l.out.h)),
        out_w(static_cast<int>(l.out.w)),
        kernel_h(static_cast<int>(l.window.kernel_h)),
        kernel_w(static_cast<int>(l.window.kernel_w)),
        stride_h(static_cast<int>(l.window.stride_h)),
        stride_w(static_cast<int>(l.window.stride_w)),
        pad_top(static_cast<int>(l.window.pad_top)),
        pad_left(static_cast<int>(l.window.pad_left)) {}

  __device__ __forceinline__ int pixels() const { return in_h * in_w; }
  __device__ __forceinline__ int outputs() const { return out_h * out_w; }
};

/// The number of cells of one sample.
constexpr int64_t cells_of(const Layer& l) {
  return blocks_for(l.in.h + l.window.pad_top, l.window.stride_h) *
         blocks_for(l.in.w + l.window.pad_left, l.window.stride_w);
}

/// Calls f(pixel) for the pixels that `output` reads, in ascending order, without the padding.
template <class F>
__device__ __forceinline__ void each_pixel_of(const Windows& w, int output, F f) {
  const int i = output / w.out_w, j = output - i * w.out_w;
  const int r0 = i * w.stride_h - w.pad_top, q0 = j * w.stride_w - w.pad_left;
  const int r1 = std::min(w.in_h, r0 + w.kernel_h), q1 = std::min(w.in_w, q0 + w.kernel_w);
  for (int r = std::max(0, r0); r < r1; ++r) {
    for (int q = std::max(0, q0); q < q1; ++q) f(r * w.in_w + q);
  }
}

/// The largest values that `output` reads in N channels, and their pixels.
template <class T, int N>
struct Largest {
  Numbers<T, N> value;
  Numbers<int32_t, N> place;
};

/// The largest of value(pixel), a vector of channels: the first of equal ones; a NaN wins, as in torch.
template <class T, int N, class F>
__device__ __forceinline__ Largest<T, N> largest_of(const Windows& w, int output, F value) {
  Largest<T, N> best{T(0), -1};
  each_pixel_of(w, output, [&](int pixel) {
    const Numbers<T, N> v = value(pixel);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (best.place.at[i] >= 0 && !(v.at[i] > best.value.at[i] || v.at[i] != v.at[i])) continue;
      best.value.at[i] = v.at[i], best.place.at[i] = pixel;
    }
  });
  return best;
}

/// The outputs [i0, i1) x [j0, j1) that read a pixel.
struct Readers {
  int i0, i1, j0, j1;
};

/// Calls f(pixel, its readers) for the pixels of a cell.
template <class F>
__device__ __forceinline__ void each_pixel_in(const Windows& w, int cell, F f) {
  const int cells_w = (w.in_w + w.pad_left + w.stride_w - 1) / w.stride_w;
  const int reach_h = (w.kernel_h - 1) / w.stride_h, rest_h = (w.kernel_h - 1) % w.stride_h;
  const int reach_w = (w.kernel_w - 1) / w.stride_w, rest_w = (w.kernel_w - 1) % w.stride_w;
  const int a = cell / cells_w, b = cell - a * cells_w;
  for (int o = 0; o < w.stride_h; ++o) {
    const int r = a * w.stride_h - w.pad_top + o;
    if (r < 0 || r >= w.in_h) continue;
    const int i0 = std::max(0, a - (o <= rest_h ? reach_h : reach_h - 1)), i1 = std::min(w.out_h, a + 1);
    for (int p = 0; p < w.stride_w; ++p) {
      const int q = b * w.stride_w - w.pad_left + p;
      if (q < 0 || q >= w.in_w) continue;
      f(r * w.in_w + q,
        Readers{i0, i1, std::max(0, b - (p <= rest_w ? reach_w : reach_w - 1)), std::min(w.out_w, b + 1)});
    }
  }
}

/// Calls f(output) for every output that reads a pixel, in ascending order.
template <class F>
__device__ __forceinline__ void each_output(const Windows& w, const Readers& readers, F f) {
  for (int i = readers.i0; i < readers.i1; ++i) {
    for (int j = readers.j0; j < readers.j1; ++j) f(i * w.out_w + j);
  }
}

/// Calls store(row, load(row)) for this thread's share of `count` rows, `kAtOnce` rows at a time: all loads
/// of these come before the first store, so that they are in flight together (vectors.h).
template <int kAtOnce, class Load, class Store>
__device__ __forceinline__ void each_row(Team team, const ChannelThreads& threads, int count, Load load,
                                         Store store) {
  if (!threads.active) return;
  const int step = team.blocks * threads.rows;
  for (int first = team.block * threads.rows + threads.row; first < count; first += kAtOnce * step) {
    decltype(load(0)) loaded[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k * step < count) loaded[k] = load(first + k * step);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k * step < count) store(first + k * step, loaded[k]);
    }
  }
}

/// Calls f(sample, item) for this thread's share of the items of all n samples.
template <class F>
__device__ __forceinline__ void each_item(Team team, const ChannelThreads& threads, int n, int items, F f) {
  if (!threads.active) return;
  const int step = team.blocks * threads.rows;
  for (int row = team.block * threads.rows + threads.row; row < n * items; row += step) {
    const int sample = row / items;
    f(sample, row - sample * items);
  }
}

/// Calls f(at, chosen) for the input elements of this thread's channels in its share of the cells;
/// chosen(each) calls each(output element, in which channels this pixel was chosen) for every output that
/// reads the pixel, in ascending order. `places` [n, out_h, out_w, c] starts at this thread's channels, and
/// elements are counted from there.
template <int N, class F>
__device__ __forceinline__ void each_place(const Windows& w, Team team, const ChannelThreads& threads, int n,
                                           int cells, int64_t c, const int32_t* places, F f) {
  each_item(team, threads, n, cells, [&](int sample, int cell) {
    each_pixel_in(w, cell, [&](int pixel, const Readers& readers) {
      f((sample * w.pixels() + pixel) * c, [&](auto each) {
        each_output(w, readers, [&](int output) {
          const int64_t at = (sample * w.outputs() + output) * c;
          const Numbers<int32_t, N> chosen = load<N>(places + at, threads.lanes);
          each(at, lanewise(chosen, [&](int32_t place) { return place == pixel; }));
        });
      });
    });
  });
}

/// v where `wanted`, and zero elsewhere.
template <class T, int N>
__device__ __forceinline__ Numbers<T, N> where(const Numbers<bool, N>& wanted, const Numbers<T, N>& v) {
  Numbers<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.at[i] = wanted.at[i] ? v.at[i] : T(0);
  return result;
}

}  // namespace maml::cuda
