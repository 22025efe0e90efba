// Episodes drawn on the GPU out of a data set that lives there (episodes.h), in one launch.
//
//   x[task, image, c, i, j] = values[c, pixel (c, i, j) of the image drawn, turned as its class is]
//   y[task, image] = the class's number in the episode
//
// A block shows one image of one task. First it learns which: for class `way` and sample `index` it needs
// place `way` and place `index` of two shuffles, and instead of shuffling it follows that one place back
// through the steps before (pick). Their partners are independent, so each thread computes one; then all
// threads walk through them together, in shared memory that broadcasts. Then the block copies, a pixel a
// thread: bytes read in order (in columns where the image is turned by 90 or 270 degrees: it is in the L1
// cache then), floats written in order. A pixel has 256 values, so that normalisation is a look-up, 1 KB a
// channel, which stays in the L1 cache; the host has computed the table, and every backend gives the same
// bits.
//
// Limits: images of less than 2^31 pixels, 2^31 - 1 images a launch. 128 threads, 512 bytes of shared memory.
#include "cuda/run/on_device.h"
#include "episodes.h"

namespace maml::cuda {
namespace {

constexpr int kThreads = kSmallTiles ? 32 : 128;

/// What a shuffle leaves at place i. Step j <= i is the last one that changes place j, so that what stands at
/// a place after it stood at j before it if that place was j's partner.
__device__ __forceinline__ uint32_t pick(const Shuffle& shuffle, uint32_t i, uint32_t* partners) {
  uint32_t place = shuffle.partner(i);
  for (uint32_t end = i; end > 0;) {  // steps [begin, end), the last ones first
    const uint32_t begin = end > kThreads ? end - kThreads : 0;
    __syncthreads();  // until all have walked through those before
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
  const Launcher launch{static_cast<cudaStream_t>(stream), 1, nullptr};
  const Grid images{e.tasks * e.n_way * (e.k_shot + e.n_query)};
  launch("episodes", e.is_double ? episodes_kernel<double> : episodes_kernel<float>, images, kThreads, 0, e);
}

}  // namespace maml::cuda
