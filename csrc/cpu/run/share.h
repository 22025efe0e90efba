// Sharing the work of one task among threads, where there are more threads than tasks. Work is split only
// between elements of a result, never within a sum, so that the bits of a result do not depend on the number
// of threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace maml::MAML_ISA {

/// The number of threads that share the passes of this thread's task.
inline thread_local int team_size = 1;

/// Sets it for the time of a scope.
struct SharingThreads {
  explicit SharingThreads(int threads) { team_size = threads; }
  ~SharingThreads() { team_size = 1; }
  SharingThreads(const SharingThreads&) = delete;
  SharingThreads& operator=(const SharingThreads&) = delete;
};

/// Work, in multiply-adds, below which one thread does it all: some 5 us.
constexpr int64_t kWorkToShare = 200'000;

/// The cost of one element of an elementwise pass, in multiply-adds.
constexpr int64_t kElementWork = 16;

/// Calls f(first, last) for parts of [0, count) that start at multiples of `grain`, one part a thread.
/// `work`: the cost of the whole in multiply-adds, roughly. Inside f, nothing is shared further.
template <class F>
inline void share(int64_t count, int64_t grain, int64_t work, F f) {
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t parts = work < kWorkToShare ? 1 : std::min<int64_t>(team_size, grains);
  if (parts <= 1 || omp_in_parallel()) {
    if (count > 0) f(int64_t{0}, count);
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    f(part * grains / parts * grain, std::min(count, (part + 1) * grains / parts * grain));
  }
}

/// share() over samples that have `elements` elements each.
template <class F>
inline void share_samples(int64_t n, int64_t elements, F f) {
  share(n, 1, kElementWork * n * elements, f);
}

/// share() over the elements of a vector or a value.
template <class F>
inline void share_elements(int64_t count, F f) {
  share(count, 1024, kElementWork * count, f);
}

}  // namespace maml::MAML_ISA
