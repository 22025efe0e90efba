#include "layers/shape.h"

namespace maml {

Shape shape_of(const std::vector<int64_t>& sample) {
  const size_t axes = sample.size();
  Shape shape;
  shape.layout = axes == 1   ? SampleLayout::features
                 : axes == 2 ? SampleLayout::signal
                 : axes == 3 ? SampleLayout::image
                             : SampleLayout::other;
  if (axes > 0) shape.image.c = sample[0];
  if (axes > 2) shape.image.h = sample[1];
  for (size_t i = axes > 2 ? 2 : 1; i < axes; ++i) shape.image.w *= sample[i];
  return shape;
}

std::vector<int64_t> axes_of(const Shape& shape) {
  const Image& s = shape.image;
  switch (shape.layout) {
    case SampleLayout::features:
      return {s.c};
    case SampleLayout::signal:
      return {s.c, s.w};
    default:
      return {s.c, s.h, s.w};
  }
}

std::string text_of(const std::vector<int64_t>& axes) {
  std::string text = "[";
  for (size_t i = 0; i < axes.size(); ++i) text += (i ? ", " : "") + std::to_string(axes[i]);
  return text + "]";
}

std::string text_of(const std::vector<SampleLayout>& layouts) {
  static const char* const kTexts[] = {"features [n, features]", "signals [n, channels, length]",
                                       "images [n, channels, height, width]", "samples of more axes"};
  std::string text;
  for (SampleLayout layout : layouts) {
    text += (text.empty() ? "" : " or ") + std::string(kTexts[static_cast<int>(layout)]);
  }
  return text;
}

}  // namespace maml
