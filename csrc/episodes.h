// Few-shot episodes from a data set of uint8 images: which images an episode contains, for every backend.
//
// The random numbers are Philox4x32-10 (Salmon et al. 2011): a stateless function of (seed; episode, stream,
// step). So an episode is the same on every device and in a batch of any size. Sampling without replacement
// is the start of a Fisher-Yates shuffle: step i swaps element i with a partner that is uniform in [i,
// count). Stream 0 shuffles the classes; stream 1 + w shuffles the samples of the episode's class w.
#pragma once

#include <array>
#include <cstdint>

namespace maml {

/// A batch of episodes to draw: the data set, the sizes and the output tensors, all on one device.
struct Episodes {
  const uint8_t* images;  // [classes, samples, channels, height, width]
  const void* values;     // [channels, 256], float or double: the output for each pixel value
  bool is_double;
  int64_t classes, samples, channels, height, width;
  int64_t rotations;  // a class gives so many: its (square) images turned by 0, 1, ... quarter turns
  int64_t n_way, k_shot, n_query;
  int64_t seed, first, tasks;  // task t is episode first + t
  // Support set and query set, ordered by class. Labels are 0 .. n_way - 1, in the order of the draw.
  std::array<void*, 2> x;     // [tasks, n_way * k_shot or n_query, channels, height, width]
  std::array<int64_t*, 2> y;  // [tasks, n_way * k_shot or n_query]
};

namespace cpu {
void draw(const Episodes& episodes, int threads);
}
namespace cuda {
/// Enqueues one kernel on the stream.
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
// Test vectors of the authors' implementation.
static_assert(philox({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
static_assert(philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}) ==
              Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
static_assert(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
              Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

/// A random permutation of [0, count).
struct Shuffle {
  uint64_t seed, episode;
  uint32_t stream, count;

  /// The element that step i swaps with element i. Uniform in [i, count), up to 2^-64.
  constexpr uint32_t partner(uint32_t i) const {
    const Words w = philox({i, stream, static_cast<uint32_t>(episode), static_cast<uint32_t>(episode >> 32)},
                           {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
    const uint64_t places = count - i;  // scales the 64-bit number w[0] 2^32 + w[1] to [0, places)
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

/// Reads an image turned counterclockwise: output pixel (row i, column j) is input pixel start + i * down +
/// j * across.
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

/// One image of an episode: where to read it, and where to write it.
struct Shown {
  const uint8_t* image;  // [channels, height, width]
  Turned turn;
  int set;      // 0: support, 1: query
  int64_t row;  // in that set's tensors, within all tasks
};
/// Image `index` of class `way` of a task (support images first). In the data set it is `sample` of
/// `drawn_class`, which counts rotations.
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
