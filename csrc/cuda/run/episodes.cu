// Draws episodes from a data set in GPU memory (episodes.h), in one launch.
//
//   x[task, image, c, i, j] = values[c, pixel (c, i, j) of the image drawn, rotated as its class is]
//   y[task, image] = the number of the class within the episode
//
// A block writes one image of one task. First it finds out which image: for class `way` and sample `index` it
// needs element `way` and element `index` of two shuffles. Instead of shuffling, it traces that one position
// back through the steps of the shuffle (pick). The random partners of the steps are independent, so that
// each thread computes one; then all threads go through them together, in shared memory, where all read the
// same word (a broadcast). Then the block copies, one pixel a thread: bytes are read in order (in columns if
// the image is rotated by 90 or 270 degrees; they then come from the L1 cache), floats are written in order.
// A pixel has 256 possible values, so normalisation is a table look-up, 1 KB a channel, which stays in the L1
// cache. The host has computed the table, so that every backend gives the same bits.
//
// Limits: images of less than 2^31 pixels, at most 2^31 - 1 images a launch. 128 threads and 512 bytes of
// shared memory a block. The twin on the CPU is cpu/run/episodes.cpp.
#include "cuda/run/on_device.h"
#include "episodes.h"

namespace maml::cuda {
namespace {

constexpr int kThreads = kSmallTiles ? 32 : 128;

/// The element that a shuffle leaves at position i. Step j swaps position j with partner(j) >= j, so step i
/// is the last one that changes position i, and the element stood at partner(i) before it. From there back
/// through the steps j < i: an element that is at `place` after step j was at j before it if partner(j) is
/// `place`, else at `place`.
__device__ __forceinline__ uint32_t pick(const Shuffle& shuffle, uint32_t i, uint32_t* partners) {
  uint32_t place = shuffle.partner(i);
  for (uint32_t end = i; end > 0;) {  // the steps [begin, end), from the last to the first
    const uint32_t begin = end > kThreads ? end - kThreads : 0;
    __syncthreads();  // all threads are done with the previous partners
    if (begin + threadIdx.x < end) partners[threadIdx.x] = shuffle.partner(begin + threadIdx.x);
    __syncthreads();
    for (uint32_t j = end; j-- > begin;) {
      if (partners[j - begin] == place) place = j;
    }
    end = begin;
  }
  return place;
}

template <class T>
__global__ void __launch_bounds__(kThreads) episodes_kernel(Episodes e) {
  __shared__ uint32_t partners[kThreads];
  const uint32_t ways = static_cast<uint32_t>(e.n_way), each = static_cast<uint32_t>(e.k_shot + e.n_query);
  const uint32_t task = blockIdx.x / (ways * each), way = blockIdx.x / each % ways, index = blockIdx.x % each;
  const uint32_t c = pick(shuffled_classes(e, task), way, partners);
  const uint32_t sample = pick(shuffled_samples(e, task, way), index, partners);
  const Shown s = shown(e, task, way, index, c, sample);

  const int width = static_cast<int>(e.width), plane = static_cast<int>(e.height) * width;
  const int down = static_cast<int>(s.turn.down), across = static_cast<int>(s.turn.across);
  const bool upright = across == 1;
  const uint8_t* from = s.image + s.turn.start;
  const T* values = static_cast<const T*>(e.values);
  T* to = static_cast<T*>(s.set ? e.x[1] : e.x[0]) + s.row * e.channels * plane;
  for (int64_t channel = 0; channel < e.channels; ++channel, from += plane, values += 256, to += plane) {
    for (int p = static_cast<int>(threadIdx.x); p < plane; p += kThreads) {
      const int i = upright ? 0 : p / width;
      const int at = upright ? p : i * down + (p - i * width) * across;
      to[p] = __ldg(values + __ldg(from + at));
    }
  }
  if (threadIdx.x == 0) (s.set ? e.y[1] : e.y[0])[s.row] = way;
}

}  // namespace

void draw(const Episodes& e, int device, void* stream) {
  const OnDevice on(device);
  const Launcher launch{static_cast<cudaStream_t>(stream), 1, Deferred()};
  const Grid images{e.tasks * e.n_way * (e.k_shot + e.n_query)};
  launch("episodes", e.is_double ? episodes_kernel<double> : episodes_kernel<float>, images, kThreads, 0, e);
}

}  // namespace maml::cuda
