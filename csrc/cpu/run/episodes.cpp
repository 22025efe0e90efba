// Draws episodes on the CPU (episodes.h) by textbook Fisher-Yates shuffles; threads share the tasks.
#include "episodes.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace maml::cpu {
namespace {

/// The first n elements of a shuffle.
std::vector<uint32_t> start_of(const Shuffle& shuffle, int64_t n) {
  std::vector<uint32_t> order(shuffle.count);
  std::iota(order.begin(), order.end(), 0);
  for (uint32_t i = 0; i < n; ++i) std::swap(order[i], order[shuffle.partner(i)]);
  order.resize(n);
  return order;
}

template <class T>
void show(const Episodes& e, const Shown& s, T* to) {
  const uint8_t* from = s.image + s.turn.start;
  const T* values = static_cast<const T*>(e.values);
  for (int64_t c = 0; c < e.channels; ++c, from += e.height * e.width, values += 256) {
    for (int64_t i = 0; i < e.height; ++i) {
      for (int64_t j = 0; j < e.width; ++j) *to++ = values[from[i * s.turn.down + j * s.turn.across]];
    }
  }
}

template <class T>
void draw_task(const Episodes& e, int64_t task) {
  const std::vector<uint32_t> classes = start_of(shuffled_classes(e, task), e.n_way);
  for (int64_t way = 0; way < e.n_way; ++way) {
    const std::vector<uint32_t> samples = start_of(shuffled_samples(e, task, way), e.k_shot + e.n_query);
    for (int64_t index = 0; index < e.k_shot + e.n_query; ++index) {
      const Shown s = shown(e, task, way, index, classes[way], samples[index]);
      show(e, s, static_cast<T*>(e.x[s.set]) + s.row * e.channels * e.height * e.width);
      e.y[s.set][s.row] = way;
    }
  }
}

/// Up to this number of pixels one thread is faster than waking a second one.
constexpr int64_t kWorkOfOneThread = 100'000;

}  // namespace

void draw(const Episodes& e, int threads) {
  const int64_t pixels = e.n_way * (e.k_shot + e.n_query) * e.channels * e.height * e.width;
  const bool small = e.tasks * pixels < kWorkOfOneThread;
#pragma omp parallel for schedule(dynamic) num_threads(small ? 1 : threads)
  for (int64_t task = 0; task < e.tasks; ++task) {
    e.is_double ? draw_task<double>(e, task) : draw_task<float>(e, task);
  }
}

}  // namespace maml::cpu
