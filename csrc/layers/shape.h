// Shapes of values: the shape of one sample.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace maml {

/// How the axes of a sample are interpreted. The layers treat all of them as images: features are one pixel,
/// a signal is one row.
enum class SampleLayout {
  features,  // [c]
  signal,    // [c, length]
  image,     // [c, height, width]
  other      // any other number of axes: [c, height, all the rest]
};

/// Channels, height and width.
struct Image {
  int64_t c, h, w;
};

inline int64_t size(const Image& s) { return s.c * s.h * s.w; }

struct Shape {
  SampleLayout layout = SampleLayout::features;
  Image image{1, 1, 1};
  Image between{};      // Layer::between
  bool samples = true;  // whether there is one for each sample; otherwise one for the task
  int64_t rows = 1;     // images in a sample: a token of a sequence is an image of one pixel
};

inline int64_t size(const Shape& s) { return s.rows * size(s.image); }

/// The shape of a sample with these axes, as the user has them.
Shape shape_of(const std::vector<int64_t>& sample);

/// The axes of a sample as the user has them; `other`: as [c, height, the rest].
std::vector<int64_t> axes_of(const Shape& shape);

/// "[3, 28, 28]"
std::string text_of(const std::vector<int64_t>& axes);
inline std::string text_of(const Shape& shape) { return text_of(axes_of(shape)); }

/// "features [n, features] or images [n, channels, height, width]"
std::string text_of(const std::vector<SampleLayout>& layouts);

}  // namespace maml
