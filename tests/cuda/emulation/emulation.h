// CUDA on the CPU, for tests. A .cu file compiled as C++ against this header runs its kernels unchanged, with
// one fiber for each CUDA thread. Faults that a GPU shows only sometimes are always found here:
//
//   a missing barrier       a wrong result in some schedule (set_schedule), or a report of ThreadSanitizer
//   a read before a write   shared memory is NaN (bytes 0xFF) before every block, and so is fresh cudaMalloc
//   a missing copy wait     an asynchronous copy writes its bytes at the wait; until then they are NaN
//   a divergent barrier     std::runtime_error that names the places and how many threads wait or have
//                           returned
//   out of bounds           a report of AddressSanitizer; of UndefinedBehaviorSanitizer for arrays and
//                           alignment
//
// One block runs at a time, on the OS thread that launches it; other launches wait. The emulation is stricter
// than the hardware: a thread that has returned does not count at a barrier, threads at different
// __syncthreads never meet, and shuffles do not order memory accesses. Not emulated: the memory model without
// barriers, races between blocks, nvcc's contraction of a * b + c, and the alignment of __shared__ arrays
// (g++ gives large ones 16 bytes or more).
//
// Build the kernels with -x c++ -std=c++20 and link emulation.cpp, which is always built without sanitizers.
// For sanitizers, add
//   -Og -g -fsanitize=thread
//   -Og -g -fsanitize=address,bounds,alignment -fno-sanitize-recover=all
// Do not strip the program or library: shared variables are found by their symbols. __shared__ variables have
// types without constructors; dynamic_shared() replaces `extern __shared__`.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

// --------------------------------------------------------------------------------------- the language
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// Static storage serves one block at a time. The tag becomes part of the symbol's name, by which
// emulation.cpp finds the variables to poison (g++ ignores section attributes in templates).
#define __shared__ static __attribute__((abi_tag("emulation_shared")))

// clang-format off
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) double2 { double x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
// clang-format on

namespace emulation {

/// The order in which threads that are ready run, and the blocks of a grid: ascending, descending or random.
/// Before the first call, the environment decides:
/// MAML_CUDA_EMULATION_SCHEDULE=forward|backward|shuffled[:seed].
enum class Schedule { forward, backward, shuffled };
void set_schedule(Schedule schedule, unsigned seed = 0);

/// The number of multiprocessors that the device reports (4 by default): results must not depend on it.
void set_multiprocessors(int count);

/// The number of switches from one fiber to another since the program started.
int64_t switches();

/// The block's dynamic shared memory: aligned to 128 bytes, and exactly as long as the launch asked for.
void* dynamic_shared();

/// All 32 lanes of a warp give `bytes` bytes; each receives 32 x bytes, in the order of the lanes. The
/// emulated mma instructions use it. As in CUDA, it does not order memory accesses.
void warp_gather(const void* mine, size_t bytes, void* all,
                 const std::source_location& place = std::source_location::current());

/// cp.async: one thread's copy of 4, 8 or 16 aligned bytes to shared memory. If not valid, it writes zeros
/// and reads nothing, but the address must be aligned all the same. The bytes are written when this thread
/// waits; other threads may read them after a barrier that follows.
void defer_copy(void* shared, const void* global, size_t bytes, bool valid = true);
/// cp.async.commit_group: the copies since the last commit become a group.
void commit_copies();
/// cp.async.wait_group: all groups of this thread but the latest `pending` ones are written.
void wait_copies(int pending);

/// griddepcontrol.wait: a kernel launched with programmatic dependent launch must call it in every thread.
/// (Here kernels run one after the other; that is all that is checked.)
void wait_for_previous_kernels();

/// Ends the launch; the host gets std::runtime_error(what).
[[noreturn]] void fail(const char* what);

// The functions below are built on these.
struct Indices {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Indices indices;  // of the running thread
extern unsigned lane;    // of the running thread
void block_barrier(const std::source_location& place);
/// A barrier of the block; whether any thread's predicate is true.
bool block_vote(bool predicate, const std::source_location& place);
void warp_barrier(unsigned mask, const std::source_location& place);
/// Exchanges 4 or 8 bytes within a warp; a lane that is not in the mask yields poison.
void warp_exchange(unsigned mask, const char* name, const void* mine, size_t bytes, unsigned from,
                   void* received, const std::source_location& place);
/// One bit for each lane: its predicate.
unsigned warp_ballot(unsigned mask, bool predicate, const std::source_location& place);

template <class T>
T shuffle(unsigned mask, const char* name, T mine, unsigned from, const std::source_location& place) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "no such shuffle in CUDA");
  T received;
  warp_exchange(mask, name, &mine, sizeof mine, from, &received, place);
  return received;
}

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulation

inline constexpr const uint3& threadIdx = emulation::indices.thread;
inline constexpr const uint3& blockIdx = emulation::indices.block;
inline constexpr const dim3& blockDim = emulation::indices.block_size;
inline constexpr const dim3& gridDim = emulation::indices.grid_size;
inline constexpr int warpSize = 32;

// --------------------------------------------------------------------------------- barriers and warps
// The last argument of each function is the place of the call, for error messages.
inline void __syncthreads(const std::source_location& place = std::source_location::current()) {
  emulation::block_barrier(place);
}
inline int __syncthreads_or(int predicate,
                            const std::source_location& place = std::source_location::current()) {
  return emulation::block_vote(predicate != 0, place);
}
inline void __syncwarp(unsigned mask = ~0u,
                       const std::source_location& place = std::source_location::current()) {
  emulation::warp_barrier(mask, place);
}
template <class T>
T __shfl_sync(unsigned mask, T mine, int from, int width = 32,
              const std::source_location& place = std::source_location::current()) {
  const unsigned last = static_cast<unsigned>(width) - 1;
  return emulation::shuffle(mask, "__shfl_sync", mine,
                            (emulation::lane & ~last) | (static_cast<unsigned>(from) & last), place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T mine, unsigned by, int width = 32,
                 const std::source_location& place = std::source_location::current()) {
  const unsigned last = static_cast<unsigned>(width) - 1, within = emulation::lane & last;
  return emulation::shuffle(mask, "__shfl_up_sync", mine, emulation::lane - (by <= within ? by : 0), place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T mine, unsigned by, int width = 32,
                   const std::source_location& place = std::source_location::current()) {
  const unsigned last = static_cast<unsigned>(width) - 1, within = emulation::lane & last;
  return emulation::shuffle(mask, "__shfl_down_sync", mine, emulation::lane + (by <= last - within ? by : 0),
                            place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T mine, int bits, int width = 32,
                  const std::source_location& place = std::source_location::current()) {
  const unsigned last = static_cast<unsigned>(width) - 1,
                 from = emulation::lane ^ static_cast<unsigned>(bits);
  return emulation::shuffle(mask, "__shfl_xor_sync", mine,
                            from > (emulation::lane | last) ? emulation::lane : from, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              const std::source_location& place = std::source_location::current()) {
  return emulation::warp_ballot(mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate,
                      const std::source_location& place = std::source_location::current()) {
  return emulation::warp_ballot(mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      const std::source_location& place = std::source_location::current()) {
  return emulation::warp_ballot(mask, predicate == 0, place) == 0;
}

// -------------------------------------------------------------------------------- memory and arithmetic
// Threads of a block interleave only at barriers, and blocks not at all: fences need not do anything.
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emulation::fail("__trap()"); }

template <class T>
T __ldg(const T* p) {
  return *p;
}

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "no such atomicAdd in CUDA");
  if constexpr (std::is_integral_v<T>) return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
  T old, sum;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do sum = old + v;
  while (!__atomic_compare_exchange(p, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

inline unsigned atomicInc(unsigned* p, unsigned last) {
  unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, old >= last ? 0 : old + 1, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}

inline unsigned __float_as_uint(float v) { return emulation::same_bits<unsigned>(v); }
inline int __float_as_int(float v) { return emulation::same_bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emulation::same_bits<float>(v); }
inline float __int_as_float(int v) { return emulation::same_bits<float>(v); }
inline long long __double_as_longlong(double v) { return emulation::same_bits<long long>(v); }
inline double __longlong_as_double(long long v) { return emulation::same_bits<double>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }

inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
inline float rsqrt(float v) { return 1 / std::sqrt(v); }
inline double rsqrt(double v) { return 1 / std::sqrt(v); }
inline float __frcp_rn(float v) { return 1 / v; }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }

#include "host.h"
