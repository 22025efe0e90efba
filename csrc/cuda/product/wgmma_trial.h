// Whether the matrix instructions of a warpgroup do on a GPU what wgmma.h says. Where the operands stand in
// shared memory is a matter of words in the PTX ISA, and a wrong reading of them would give wrong numbers
// without an error. So a device is tried once, before their first use: products of small integers, which are
// exact, for every shape and way of reading that a kernel uses. A device that fails has the portable kernels.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>

#include "cuda/product/wgmma.h"
#include "cuda/run/device_bytes.h"

namespace maml::cuda {
namespace trial {

inline constexpr int kThreads = 128, kRows = 64;
inline constexpr int kDepth = 32;  // two instructions one after the other
/// From a chunk to that of the next 8 k or mn. Not a multiple of a core matrix, so that each distance counts.
constexpr int chunk_distance_of(int mns, Along way) { return (way == Along::k ? mns : kDepth) + 1; }
constexpr int chunks_of(int mns, Along way) {
  return (way == Along::k ? kDepth : mns) / 8 * chunk_distance_of(mns, way);
}

/// Element (mn, k) of A or of B.
__device__ __forceinline__ int integer(int mn, int k, bool of_b) {
  return of_b ? (mn * 7 + k * 11) % 13 - 6 : (mn * 5 + k * 3) % 17 - 8;
}

/// Writes an operand, by a warpgroup: chunks of 8 k of an mn, or of 8 mn of a k.
template <Along Way>
__device__ __forceinline__ void lay_out(Chunk* to, int mns, bool of_b) {
  const int chunks = (Way == Along::k ? kDepth : mns) / 8, in_chunk = Way == Along::k ? mns : kDepth;
  for (int i = static_cast<int>(threadIdx.x); i < chunks * in_chunk; i += kThreads) {
    const int chunk = i / in_chunk, other = i - chunk * in_chunk;
    float value[8];
    for (int e = 0; e < 8; ++e) {
      const int along = 8 * chunk + e;
      value[e] =
          static_cast<float>(Way == Along::k ? integer(other, along, of_b) : integer(along, other, of_b));
    }
    Chunk& own = to[chunk * chunk_distance_of(mns, Way) + other];
    for (int e = 0; e < 4; ++e) own.word[e] = to_bf16(value[2 * e], value[2 * e + 1]);
  }
}

/// The descriptor of an operand that is laid out so, and the bytes to the next 16 k.
template <Along Way>
__device__ __forceinline__ uint64_t descriptor_of(const Chunk* start, int mns, int& step) {
  const int core = 8 * static_cast<int>(sizeof(Chunk));
  const int next = chunk_distance_of(mns, Way) * static_cast<int>(sizeof(Chunk));
  step = 2 * (Way == Along::k ? next : core);
  return Way == Along::k ? matrix_descriptor(start, next, core) : matrix_descriptor(start, core, next);
}

/// The sums of this thread that are wrong, of a product with N columns, both operands read in one way.
template <int N, Along Way>
__device__ int wrong_sums() {
  Chunk* const a = reinterpret_cast<Chunk*>(dynamic_shared());
  Chunk* const b = a + chunks_of(kRows, Way);
  __syncthreads();
  lay_out<Way>(a, kRows, false);
  lay_out<Way>(b, N, true);
  publish_shared();
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x), first_row = thread / 32 * 16 + thread % 32 / 4;
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = static_cast<float>(thread - i);  // a product is added to it
  int step_a, step_b;
  const uint64_t of_a = descriptor_of<Way>(a, kRows, step_a), of_b = descriptor_of<Way>(b, N, step_b);
  begin_products();
#pragma unroll
  for (int i = 0; i < kDepth / 16; ++i) wgmma<Way, Way>(d, later(of_a, i * step_a), later(of_b, i * step_b));
  commit_products();
  wait_products<0>(d);
  int wrong = 0;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int row = first_row + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    int sum = thread - i;
    for (int k = 0; k < kDepth; ++k) sum += integer(row, k, false) * integer(column, k, true);
    wrong += d[i] != static_cast<float>(sum);
  }
  return wrong;
}

/// One warpgroup. wrong [Threads]
template <int Threads>
__global__ void __launch_bounds__(Threads) wgmma_trial_kernel(int* wrong) {
  wrong[threadIdx.x] = wrong_sums<32, Along::k>() + wrong_sums<64, Along::k>() + wrong_sums<32, Along::mn>() +
                       wrong_sums<64, Along::mn>();
}

inline bool is_exact(int device) {
  const OnDevice on(device);
  const OutsideCaptures outside;
  int wrong[kThreads];
  void* on_device = nullptr;
  cudaStream_t stream = nullptr;
  check(cudaMalloc(&on_device, sizeof wrong), "allocating memory for the trial of wgmma");
  cudaError_t status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (status == cudaSuccess) {
    const int64_t chunks = std::max(chunks_of(kRows, Along::k), chunks_of(kRows, Along::mn));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1), config.blockDim = dim3(kThreads), config.stream = stream;
    config.dynamicSmemBytes = 2 * static_cast<size_t>(chunks) * sizeof(Chunk);
    status = cudaMemsetAsync(on_device, 0, sizeof wrong, stream);
    if (status == cudaSuccess)
      status = cudaLaunchKernelEx(&config, wgmma_trial_kernel<kThreads>, static_cast<int*>(on_device));
    if (status == cudaSuccess)
      status = cudaMemcpyAsync(wrong, on_device, sizeof wrong, cudaMemcpyDeviceToHost, stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
  }
  cudaFree(on_device);
  check(status, "the trial of wgmma");
  return std::all_of(std::begin(wrong), std::end(wrong), [](int of_thread) { return of_thread == 0; });
}

}  // namespace trial

/// Whether products by wgmma are right on a device of compute capability 9.0. Waits for a kernel, once for
/// each device.
inline bool wgmma_is_exact(int device) {
  static std::mutex mutex;
  static std::map<int, bool> known;
  const std::lock_guard lock(mutex);
  auto found = known.find(device);
  if (found == known.end()) found = known.emplace(device, trial::is_exact(device)).first;
  return found->second;
}

}  // namespace maml::cuda
