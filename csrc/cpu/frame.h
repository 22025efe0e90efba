// The input of a convolution where taps would read outside it: a copy with zero padding, so that the rows of
// every product can be gathered by offsets alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/run/share.h"
#include "layers/layer.h"

namespace maml::MAML_ISA {

/// Rows [top, top + h) and columns [left, left + w) of an image, zero outside it.
struct Frame {
  int64_t top, left, h, w;
  bool inside(const Image& image) const {
    return top >= 0 && left >= 0 && top + h <= image.h && left + w <= image.w;
  }
};

/// The frame that a window reads to compute an output image.
inline Frame frame_of(const Window& k, const Image& out) {
  return {-k.pad_top, -k.pad_left, (out.h - 1) * k.stride_h + k.kernel_h,
          (out.w - 1) * k.stride_w + k.kernel_w};
}

/// Some samples of an image as a base pointer and strides: in the image itself, or in a padded copy.
template <class T>
struct Framed {
  const T* base;
  int64_t row, sample;  // strides
};

template <class T>
Framed<T> framed(const T* x, int64_t samples, const Image& image, const Frame& frame, T* buffer) {
  const int64_t c = image.c;
  if (frame.inside(image)) {
    return {x + (frame.top * image.w + frame.left) * c, image.w * c, size(image)};
  }
  const int64_t row = frame.w * c, sample = frame.h * row;
  const int64_t j0 = std::clamp<int64_t>(-frame.left, 0, frame.w);
  const int64_t j1 = std::clamp<int64_t>(image.w - frame.left, j0, frame.w);
  share(samples * frame.h, 1, kElementWork * samples * sample, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t s = r / frame.h, i = frame.top + r % frame.h;
      T* to = buffer + r * row;
      if (i < 0 || i >= image.h) {
        std::fill_n(to, row, T(0));
        continue;
      }
      std::fill_n(to, j0 * c, T(0));
      std::memcpy(to + j0 * c, x + s * size(image) + (i * image.w + frame.left + j0) * c,
                  static_cast<size_t>((j1 - j0) * c) * sizeof(T));
      std::fill(to + j1 * c, to + row, T(0));
    }
  });
  return {buffer, row, sample};
}

/// offsets[m] of the samples x rows x columns positions.
inline void fill_offsets(int64_t samples, int64_t rows, int64_t columns, int64_t start, int64_t sample_stride,
                         int64_t row_stride, int64_t column_stride, int32_t* offsets) {
  if (rows * columns == 1) {  // a linear layer
    for (int64_t s = 0; s < samples; ++s) offsets[s] = static_cast<int32_t>(start + s * sample_stride);
    return;
  }
  for (int64_t s = 0; s < samples; ++s) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = start + s * sample_stride + i * row_stride;
      for (int64_t j = 0; j < columns; ++j) *offsets++ = static_cast<int32_t>(at + j * column_stride);
    }
  }
}

}  // namespace maml::MAML_ISA
