// Windows that slide over axes of x (layers/loops.h, Slide), as kernels see them: operands of their loops are
// x, y, and the place along each of these axes.
#pragma once

#include "cuda/strided.h"

namespace maml::cuda {

/// One such axis, with the strides of y and of a weight.
struct Taps {
  int64_t taps = 1, positions = 1, stride = 1, dilation = 1, padding = 0;
  int64_t y_position = 0, y_tap = 0, w_tap = 0;
};

struct Slides {
  int64_t size[kMostSlides] = {1, 1, 1};  // of the axes of x
  Taps of[kMostSlides];
};

inline Slides slides_of(const Loops& loops) {
  Slides slides;
  for (int i = 0; i < loops.slides; ++i) {
    const Slide& s = loops.slide[i];
    slides.size[i] = s.size;
    slides.of[i] = {.taps = loops.size[s.tap],
                    .positions = loops.size[s.position],
                    .stride = s.stride,
                    .dilation = s.dilation,
                    .padding = s.padding,
                    .y_position = loops.y.stride[s.position],
                    .y_tap = loops.y.stride[s.tap],
                    .w_tap = loops.x[1].stride[s.tap]};
  }
  return slides;
}

/// Loops with the place along each axis of x.
struct Placed {
  Loops loops;
  View place[kMostSlides];
};

/// The loops over all positions and taps, in which x has strides along both.
inline Placed at_windows(const Loops& loops) {
  Placed placed{loops, {}};
  View& x = placed.loops.x[0];
  for (int i = 0; i < loops.slides; ++i) {
    const Slide& s = loops.slide[i];
    x.stride[s.position] = s.stride * s.x_stride;
    x.stride[s.tap] = s.dilation * s.x_stride;
    x.offset -= s.padding * s.x_stride;
    placed.place[i].stride[s.position] = s.stride;
    placed.place[i].stride[s.tap] = s.dilation;
    placed.place[i].offset = -s.padding;
  }
  return placed;
}

/// The loops over all elements of x; y and a weight are where position and tap are 0.
inline Placed at_elements(const Loops& loops) {
  Placed placed{loops, {}};
  Loops& over = placed.loops;
  for (int i = 0; i < loops.slides; ++i) {
    const Slide& s = loops.slide[i];
    over.size[s.position] = s.size, over.size[s.tap] = 1;
    over.x[0].stride[s.position] = s.x_stride;
    over.y.stride[s.position] = 0;
    placed.place[i].stride[s.position] = 1;
  }
  return placed;
}

/// Whether the places along all axes are inside of x.
__device__ __forceinline__ bool is_inside(const Slides& slides, const int64_t* place) {
  bool inside = true;
  for (int s = 0; s < kMostSlides; ++s) inside &= 0 <= place[s] && place[s] < slides.size[s];
  return inside;
}

/// f(position, tap) for each tap of the windows over one axis that is at this place of x.
template <class F>
__device__ __forceinline__ void each_tap(const Taps& s, int64_t place, F f) {
  for (int64_t tap = 0; tap < s.taps; ++tap) {
    const int64_t from = place + s.padding - tap * s.dilation, position = from / s.stride;
    if (from < 0 || position >= s.positions || position * s.stride != from) continue;
    f(position, tap);
  }
}

}  // namespace maml::cuda
