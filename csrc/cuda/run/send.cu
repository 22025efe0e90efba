// Copies small data to the device as kernel arguments.
#include "cuda/run/description.h"

namespace maml::cuda {
namespace {

constexpr int kThreads = 64;

/// One kernel's worth of data: it fits the 4 KB limit of kernel arguments.
struct Parcel {
  static constexpr size_t kWords = 448;
  uint64_t words[kWords];
};

__global__ void __launch_bounds__(kThreads)
    unpack_parcel(const __grid_constant__ Parcel parcel, uint64_t* to, int words) {
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) to[i] = parcel.words[i];
}

}  // namespace

void send(cudaStream_t stream, const void* from, size_t bytes, void* to) {
  const Launcher launch{stream, 1, Deferred()};
  const size_t words = bytes / sizeof(uint64_t);
  for (size_t at = 0; at < words; at += Parcel::kWords) {
    Parcel parcel;
    const size_t count = std::min(words - at, Parcel::kWords);
    std::memcpy(parcel.words, static_cast<const uint64_t*>(from) + at, count * sizeof(uint64_t));
    launch("send", unpack_parcel, {}, kThreads, 0, parcel, static_cast<uint64_t*>(to) + at,
           static_cast<int>(count));
  }
}

}  // namespace maml::cuda
