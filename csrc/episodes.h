// Few-shot episodes out of a data set of uint8 images: which images an episode shows, once for every backend.
//
// All chance is Philox4x32-10 (Salmon et al. 2011), a function of (seed; episode, stream, step) without
// state. So an episode is the same on every device and in whatever batch it is drawn. What is drawn without
// replacement is the start of a Fisher-Yates shuffle: step i swaps place i with its partner, uniform in
// [i, count). Stream 0 shuffles the classes, stream 1 + w the samples of the episode's class w.
#pragma once

#include <array>
#include <cstdint>

namespace maml {

/// What to draw, out of which data set, and where to. All memory is on one device.
struct Episodes {
  const uint8_t* images;  // [classes, samples, channels, height, width]
  const void* values;     // [channels, 256]: what a pixel of each value becomes, double or float
  bool is_double;
  int64_t classes, samples, channels, height, width;
  int64_t rotations;  // every class is so many: its images turned by 0, 1, ... quarter turns (if square)
  int64_t n_way, k_shot, n_query;
  int64_t seed, first, tasks;  // task t is episode first + t
  // The support and the query set, class by class; labels number an episode's classes as they were drawn.
  std::array<void*, 2> x;     // [tasks, n_way * k_shot or n_query, channels, height, width]
  std::array<int64_t*, 2> y;  // [tasks, n_way * k_shot or n_query]
};

namespace cpu {
void draw(const Episodes& episodes, int threads);
}
namespace cuda {
/// Enqueues one kernel.
void draw(const Episodes& episodes, int device, void* stream);
}  // namespace cuda

using Words = std::array<uint32_t, 4>;

constexpr Words philox(Words counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key = {key[0] + 0x9E3779B9, key[1] + 0xBB67AE85};
  }
  return counter;
}
// The known answers that come with the authors' implementation.
static_assert(philox({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
static_assert(philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}) ==
              Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
static_assert(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
              Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

/// A shuffle of [0, count).
struct Shuffle {
  uint64_t seed, episode;
  uint32_t stream, count;

  /// Which place step i swaps with place i: each of [i, count) with the same probability, to 1 in 2^64.
  constexpr uint32_t partner(uint32_t i) const {
    const Words w = philox({i, stream, static_cast<uint32_t>(episode), static_cast<uint32_t>(episode >> 32)},
                           {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
    const uint64_t places = count - i;  // the product of w[0] 2^32 + w[1] with it, over 2^64
    return i + static_cast<uint32_t>((w[0] * places + (w[1] * places >> 32)) >> 32);
  }
};

constexpr Shuffle shuffled_classes(const Episodes& e, int64_t task) {
  return {static_cast<uint64_t>(e.seed), static_cast<uint64_t>(e.first + task), 0,
          static_cast<uint32_t>(e.classes * e.rotations)};
}
constexpr Shuffle shuffled_samples(const Episodes& e, int64_t task, int64_t way) {
  return {static_cast<uint64_t>(e.seed), static_cast<uint64_t>(e.first + task),
          static_cast<uint32_t>(1 + way), static_cast<uint32_t>(e.samples)};
}

/// How an image is read that is shown turned counterclockwise: the pixel shown at row i and column j stands
/// at start + i * down + j * across.
struct Turned {
  int64_t start, down, across;
};
constexpr Turned turned(int64_t quarters, int64_t height, int64_t width) {
  switch (quarters) {
    case 1:
      return {width - 1, -1, width};
    case 2:
      return {height * width - 1, -width, -1};
    case 3:
      return {(height - 1) * width, 1, -width};
    default:
      return {0, width, 1};
  }
}

/// An image of an episode, as it is read, and where it goes.
struct Shown {
  const uint8_t* image;  // [channels, height, width]
  Turned turn;
  int set;      // 0: support, 1: query
  int64_t row;  // of that set's tensors
};
/// The `index`-th image of the task's class `way`, which are `sample` and `drawn_class` of the data set.
constexpr Shown shown(const Episodes& e, int64_t task, int64_t way, int64_t index, uint32_t drawn_class,
                      uint32_t sample) {
  const bool query = index >= e.k_shot;
  const uint32_t classes = static_cast<uint32_t>(e.classes);
  const int64_t image = drawn_class % classes * e.samples + sample;
  const int64_t first = (task * e.n_way + way) * (query ? e.n_query : e.k_shot);
  return {e.images + image * e.channels * e.height * e.width,
          turned(drawn_class / classes, e.height, e.width), query, first + index - (query ? e.k_shot : 0)};
}

}  // namespace maml
