// The test of the emulation itself: small correct kernels, and copies of them with one mistake each. The
// program runs the case that is given as argument and prints "right", "wrong: ..." or the text of the
// exception (tests/cuda/test_emulation.py).
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "emulation.h"

namespace planted {  // not anonymous: else __shared__ variables of templates would have no symbols to find

using Verdict = std::string;

template <class... Params, class... Args>
void launch(unsigned blocks, dim3 threads, size_t shared_bytes, void (*kernel)(Params...), Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  if (const cudaError_t e = cudaLaunchKernelEx(&config, kernel, args...))
    throw std::runtime_error(cudaGetErrorString(e));
}

std::vector<float> numbers(size_t n) {
  std::vector<float> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = static_cast<float>(i * 7 % 11);
  return x;
}

Verdict compare(const std::vector<float>& got, const std::vector<float>& expected) {
  size_t wrong = 0, nan = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    wrong += !(got[i] == expected[i]);
    nan += std::isnan(got[i]);
  }
  if (wrong == 0) return "right";
  return "wrong: " + std::to_string(wrong) + " of " + std::to_string(got.size()) +
         ", nan: " + std::to_string(nan);
}

// --------------------------------------------------------------------------------- a tiled transpose
constexpr int kTile = 8;
enum class TransposeBug { none, no_barrier, lost_tail };

template <TransposeBug bug, class T>
__global__ void transpose(const T* x, T* y, int rows, int cols) {  // y [cols][rows]
  __shared__ T tile[kTile][kTile + 1];
  const int tiles = (cols + kTile - 1) / kTile;
  const int row0 = static_cast<int>(blockIdx.x) / tiles * kTile;
  const int col0 = static_cast<int>(blockIdx.x) % tiles * kTile;
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  if (row0 + ty < rows && col0 + tx < cols) tile[ty][tx] = x[(row0 + ty) * cols + col0 + tx];
  if constexpr (bug != TransposeBug::no_barrier) __syncthreads();
  const int last = bug == TransposeBug::lost_tail ? cols / kTile * kTile : cols;
  if (row0 + tx < rows && col0 + ty < last) y[(col0 + ty) * rows + row0 + tx] = tile[tx][ty];
}

template <TransposeBug bug>
Verdict run_transpose() {
  const int rows = 19, cols = 13;
  const std::vector<float> x = numbers(rows * cols);
  std::vector<float> y(x.size(), NAN), expected(x.size());
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) expected[j * rows + i] = x[i * cols + j];
  launch(3 * 2, dim3(kTile, kTile), 0, transpose<bug, float>, x.data(), y.data(), rows, cols);
  return compare(y, expected);
}

// ---------------------------------------------------------------------------------------- row sums
enum class SumBug { none, no_barrier, early_return, one_too_many, wrong_mask, mixed_shuffles };

template <SumBug bug>
__global__ void row_sum(const float* x, float* y, int n) {
  __shared__ float partial[4];
  const int i = static_cast<int>(threadIdx.x);
  if (bug == SumBug::early_return && i >= n) return;
  float sum = 0;
  for (int j = i; j < n + (bug == SumBug::one_too_many); j += 128)
    sum += x[static_cast<int>(blockIdx.x) * n + j];
  const unsigned mask = bug == SumBug::wrong_mask ? 0x7fffffff : 0xffffffff;
  for (int d = 16; d > 0; d /= 2) {
    if (bug == SumBug::mixed_shuffles && i % 32 == 5)
      sum += __shfl_down_sync(mask, sum, static_cast<unsigned>(d));
    else
      sum += __shfl_xor_sync(mask, sum, d);
  }
  if (i % 32 == 0) partial[i / 32] = sum;
  if constexpr (bug != SumBug::no_barrier) __syncthreads();
  if (i >= 32) return;  // only one warp goes on: its barriers do not wait for the block
  float v = i < 4 ? partial[i] : 0;
  for (unsigned d = 2; d > 0; d /= 2) v += __shfl_down_sync(~0u, v, d);
  if (i == 0) y[blockIdx.x] = v;
}

template <SumBug bug>
Verdict run_row_sum() {
  const int rows = 3, n = 77;
  const std::vector<float> x = numbers(rows * n);
  std::vector<float> y(rows, NAN), expected(rows, 0);
  for (int i = 0; i < rows * n; ++i) expected[i / n] += x[i];
  launch(rows, 128, 0, row_sum<bug>, x.data(), y.data(), n);
  return compare(y, expected);
}

// ------------------------------------------------------------------------- exchange within one warp
enum class WarpBug { none, no_barrier, shuffle_for_barrier };

template <WarpBug bug>
__global__ void reverse_warp(const float* x, float* y) {
  __shared__ float s[32];
  const unsigned i = threadIdx.x;
  s[i] = x[i];
  if constexpr (bug == WarpBug::none) __syncwarp();
  float unused = 0;
  if constexpr (bug == WarpBug::shuffle_for_barrier) unused = __shfl_sync(~0u, 0.0f, 0);
  y[i] = s[31 - i] + unused;
}

template <WarpBug bug>
Verdict run_reverse_warp() {
  const std::vector<float> x = numbers(32);
  std::vector<float> y(32, NAN);
  launch(1, 32, 0, reverse_warp<bug>, x.data(), y.data());
  return compare(y, {x.rbegin(), x.rend()});
}

__global__ void warp_functions(unsigned* errors) {
  const int i = static_cast<int>(emulation::lane), warp = static_cast<int>(threadIdx.x) / 32;
  const int lanes = warp == 0 ? 32 : 8;  // the last warp has fewer lanes
  unsigned bad = 0;
  const auto expect = [&](bool holds) { bad += !holds; };
  expect(__shfl_sync(~0u, i, 3) == 3);
  expect(__shfl_sync(~0u, 10 * i, 1, 8) == 10 * (i / 8 * 8 + 1));
  expect(__shfl_xor_sync(~0u, 1.0 * i, 4) == (i ^ 4));
  expect(__shfl_up_sync(~0u, i, 2u, 4) == (i % 4 < 2 ? i : i - 2));
  expect(__shfl_down_sync(~0u, i, 2u, 4) == (i % 4 < 2 ? i + 2 : i));
  expect(__ballot_sync(~0u, i % 2) == (lanes == 32 ? 0xaaaaaaaa : 0xaau));
  expect(__any_sync(~0u, i == 7) && !__any_sync(~0u, i == 77));
  expect(__all_sync(~0u, i < lanes) && !__all_sync(~0u, i < 7));
  if (i < 4) expect(__shfl_sync(0xf, i, 2) == 2);  // a part of the warp
  if (lanes == 8) expect(std::isnan(__shfl_sync(~0u, 1.0f, 9)));
  if (lanes == 32) {
    struct Parts {
      int lane, twice;
    } mine{i, 2 * i}, all[32];
    emulation::warp_gather(&mine, sizeof mine, all);
    for (int l = 0; l < 32; ++l) expect(all[l].lane == l && all[l].twice == 2 * l);
  }
  atomicAdd(errors, bad);
}

Verdict run_warp_functions() {
  unsigned errors = 0;
  launch(2, 40, 0, warp_functions, &errors);
  return errors == 0 ? "right" : "wrong: " + std::to_string(errors);
}

// ------------------------------------------------------------------ barriers that not all threads reach
__global__ void two_barriers(float* y) {
  if (threadIdx.x < 8) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 0;
}

__global__ void trap(float* y) {
  if (threadIdx.x == 5) __trap();
  __syncthreads();
  y[threadIdx.x] = 0;
}

template <class Kernel>
Verdict run_failing(Kernel* kernel) {
  std::vector<float> y(16);
  launch(1, 16, 0, kernel, y.data());
  return "right";
}

// ------------------------------------------------------------------------------------ shared memory
enum class ReadBug { none, uninitialised, past_static, past_dynamic, hidden };

inline float through_shared(float x) {
  __shared__ float hidden[8];
  hidden[threadIdx.x] = x;
  return hidden[threadIdx.x];
}

template <ReadBug bug>
__global__ void read_shared(float* y) {
  __shared__ float fixed[8];
  float* dynamic = static_cast<float*>(emulation::dynamic_shared());
  const unsigned i = threadIdx.x;
  if (bug != ReadBug::uninitialised || blockIdx.x == 0) fixed[i] = dynamic[i] = 1;
  __syncthreads();
  if (bug == ReadBug::hidden) fixed[i] = through_shared(fixed[i]);
  y[blockIdx.x * 8 + i] =
      fixed[i + (bug == ReadBug::past_static)] + dynamic[i + (bug == ReadBug::past_dynamic)];
}

template <ReadBug bug>
Verdict run_read_shared() {
  std::vector<float> y(16, NAN);
  launch(2, 8, 8 * sizeof(float), read_shared<bug>, y.data());
  return compare(y, std::vector<float>(16, 2));
}

// ------------------------------------------------------------- a pipeline of two asynchronous stages
enum class CopyBug {
  none,
  no_wait,
  waits_for_too_few,
  no_barrier_after,
  no_barrier_before_reuse,
  misaligned
};

template <CopyBug bug>
__global__ void pipeline(const float4* x, float* y,
                         int tiles) {  // y[i] = sum over tiles of the other thread's x
  __shared__ float4 stage[2][16];
  const unsigned i = threadIdx.x;
  const auto fetch = [&](int tile) {
    const bool valid = tile < tiles;
    const void* from = x + tile * 16 + i;
    if (bug == CopyBug::misaligned && !valid) from = &x[-1].w;  // not read, but misaligned
    emulation::defer_copy(&stage[tile % 2][i], from, sizeof(float4), valid);
    emulation::commit_copies();
  };
  float sum = 0;
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    if constexpr (bug != CopyBug::no_wait) emulation::wait_copies(bug == CopyBug::waits_for_too_few ? 2 : 1);
    if constexpr (bug != CopyBug::no_barrier_after) __syncthreads();
    sum += stage[tile % 2][15 - i].w;
    if constexpr (bug != CopyBug::no_barrier_before_reuse) __syncthreads();
  }
  y[i] = sum;
}

template <CopyBug bug>
Verdict run_pipeline() {
  const int tiles = 3;
  std::vector<float4> x(tiles * 16);
  std::vector<float> y(16, NAN), expected(16, 0);
  for (int i = 0; i < tiles * 16; ++i) {
    x[i].w = static_cast<float>(i * 5 % 7);
    expected[15 - i % 16] += x[i].w;
  }
  launch(1, 16, 0, pipeline<bug>, x.data(), y.data(), tiles);
  return compare(y, expected);
}

// ------------------------------------------------------------------------------------------ last block
enum class LastBug { none, fixed_block, never_zero };

/// Each block sums its 32 numbers; the last one to arrive adds up the sums of all blocks.
template <LastBug bug>
__global__ void sum_by_last_block(const float* x, float* parts, unsigned* counter, float* y) {
  __shared__ float mine[32];
  mine[threadIdx.x] = x[blockIdx.x * 32 + threadIdx.x];
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    float sum = 0;
    for (const float v : mine) sum += v;
    parts[blockIdx.x] = sum;
    __threadfence();
    const unsigned most = bug == LastBug::never_zero ? gridDim.x : gridDim.x - 1;
    last = atomicInc(counter, most) == gridDim.x - 1;
    if (bug == LastBug::fixed_block) last = blockIdx.x == gridDim.x - 1;
  }
  if (!__syncthreads_or(last) || threadIdx.x > 0) return;
  y[0] = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) y[0] += parts[b];
}

template <LastBug bug>
Verdict run_last_block() {
  const unsigned blocks = 5;
  const std::vector<float> x = numbers(blocks * 32);
  std::vector<float> parts(blocks, NAN), y(1, NAN), expected(1, 0);
  for (const float v : x) expected[0] += v;
  unsigned counter = 0;
  for (int i = 0; i < 2; ++i) {
    launch(blocks, 32, 0, sum_by_last_block<bug>, x.data(), parts.data(), &counter, y.data());
    if (counter != 0) return "wrong: the counter is not zero";
    const Verdict verdict = compare(y, expected);
    if (verdict != "right") return verdict;
    y[0] = NAN;
    for (float& part : parts) part = NAN;
  }
  return "right";
}

// --------------------------------------------------------------------------------------- the host side
__global__ void add_one(float* x) { x[threadIdx.x] += 1; }

Verdict run_graph() {
  std::vector<float> x(4, 1), y(4, 0);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaStreamCaptureStatus status;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  cudaStreamIsCapturing(stream, &status);
  {
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(4);
    config.stream = stream;
    float* argument = x.data();
    cudaLaunchKernelEx(&config, add_one, argument);
    argument = nullptr;  // the graph keeps its own copy
  }
  cudaMemcpyAsync(y.data(), x.data(), 4 * sizeof(float), cudaMemcpyDefault, stream);
  if (status != cudaStreamCaptureStatusActive || x[0] != 1) return "wrong: the work was done, not recorded";
  if (cudaStreamEndCapture(stream, &graph) != cudaSuccess) return "wrong: no graph";
  cudaGraphInstantiate(&executable, graph);
  cudaGraphDestroy(graph);
  cudaGraphLaunch(executable, stream);
  if (x[0] != 2 || y[0] != 2) return "wrong: first replay";
  for (float& v : x) v = 10;
  cudaGraphLaunch(executable, stream);
  cudaStreamSynchronize(stream);
  cudaGraphExecDestroy(executable);
  cudaStreamDestroy(stream);
  return compare(y, std::vector<float>(4, 11));
}

Verdict run_broken_capture() {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  const bool refused = cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported;
  const bool broken = cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated;
  cudaStreamDestroy(stream);
  return refused && broken && graph == nullptr ? "right" : "wrong: a capture may not wait";
}

enum class BranchBug { none, no_join, too_early };

/// y = x on a branch, parallel to z = 2 on the origin; after the join, the origin overwrites x.
template <BranchBug bug>
Verdict run_branch() {
  std::vector<float> x(1, 1), y(1, 0), z(1, 0);
  const float next = 5, two = 2;
  cudaStream_t origin, branch;
  cudaEvent_t forked, done;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaStreamCreateWithFlags(&origin, cudaStreamNonBlocking);
  cudaStreamCreateWithFlags(&branch, cudaStreamNonBlocking);
  cudaEventCreateWithFlags(&forked, cudaEventDisableTiming);
  cudaEventCreateWithFlags(&done, cudaEventDisableTiming);
  cudaStreamBeginCapture(origin, cudaStreamCaptureModeRelaxed);
  cudaEventRecord(forked, origin);
  cudaStreamWaitEvent(branch, forked);
  const auto copy = [](cudaStream_t stream, const float* from, float* to) {
    cudaMemcpyAsync(to, from, sizeof(float), cudaMemcpyDefault, stream);
  };
  copy(branch, x.data(), y.data());
  copy(origin, &two, z.data());
  if (bug == BranchBug::too_early) copy(origin, &next, x.data());
  if (bug != BranchBug::no_join) {
    cudaEventRecord(done, branch);
    cudaStreamWaitEvent(origin, done);
  }
  if (bug == BranchBug::none) copy(origin, &next, x.data());
  const cudaError_t status = cudaStreamEndCapture(origin, &graph);
  cudaEventDestroy(forked);
  cudaEventDestroy(done);
  cudaStreamDestroy(branch);
  cudaStreamDestroy(origin);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  cudaGraphInstantiate(&executable, graph);
  cudaGraphDestroy(graph);
  cudaGraphLaunch(executable, nullptr);
  cudaGraphExecDestroy(executable);
  y.push_back(z[0]);
  y.push_back(x[0]);
  return compare(y, {1, 2, 5});
}

/// A kernel launched with programmatic dependent launch.
template <bool waits>
__global__ void add_one_early(float* x) {
  if (waits || threadIdx.x > 0) emulation::wait_for_previous_kernels();
  x[threadIdx.x] += 1;
}

template <bool waits>
Verdict run_early() {
  std::vector<float> y(4, 1);
  cudaLaunchAttribute early{cudaLaunchAttributeProgrammaticStreamSerialization, {1}};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(4);
  config.attrs = &early;
  config.numAttrs = 1;
  if (cudaLaunchKernelEx(&config, add_one_early<waits>, y.data())) return "wrong: not launched";
  return compare(y, std::vector<float>(4, 2));
}

Verdict run_limits() {
  float y[4]{};
  const auto refuses = [&](dim3 threads, size_t bytes, cudaError_t expected) {
    cudaLaunchConfig_t config{};
    config.blockDim = threads;
    config.dynamicSmemBytes = bytes;
    return cudaLaunchKernelEx(&config, add_one, y) == expected && cudaGetLastError() == expected;
  };
  const auto allow = [](int bytes) {
    return cudaFuncSetAttribute(add_one, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  if (!refuses(1025, 0, cudaErrorInvalidConfiguration)) return "wrong: 1025 threads";
  if (!refuses(0, 0, cudaErrorInvalidConfiguration)) return "wrong: no threads";
  if (!refuses(4, 49 * 1024, cudaErrorInvalidValue)) return "wrong: 49 KB unasked";
  if (allow(227 * 1024) != cudaSuccess || !refuses(4, 227 * 1024, cudaSuccess)) return "wrong: 227 KB";
  if (allow(227 * 1024 + 1) != cudaErrorInvalidValue) return "wrong: more than 227 KB";
  const auto with_static = read_shared<ReadBug::none>;  // it declares 32 bytes
  cudaFuncAttributes own{};
  cudaFuncGetAttributes(&own, reinterpret_cast<const void*>(with_static));
  if (own.sharedSizeBytes != 32) return "wrong: " + std::to_string(own.sharedSizeBytes) + " static bytes";
  cudaLaunchConfig_t config{};
  config.dynamicSmemBytes = 48 * 1024 - 31;
  if (cudaLaunchKernelEx(&config, with_static, y) != cudaErrorInvalidValue) return "wrong: 48 KB and 1 byte";
  if (cudaFuncSetAttribute(with_static, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024 - 31) !=
      cudaErrorInvalidValue)
    return "wrong: more than 227 KB with the static ones";
  cudaGetLastError();
  return y[0] == 1 ? "right" : "wrong: did not run";
}

Verdict run_after_failure() {
  try {
    run_failing(trap);
  } catch (const std::runtime_error&) {
    return run_row_sum<SumBug::none>();
  }
  return "wrong: nothing was thrown";
}

Verdict run_host_threads() {
  Verdict verdicts[3];
  {
    std::vector<std::jthread> threads;
    for (Verdict& v : verdicts) threads.emplace_back([&v] { v = run_row_sum<SumBug::none>(); });
  }
  for (const Verdict& v : verdicts)
    if (v != "right") return v;
  return "right";
}

const std::map<std::string, Verdict (*)()> kCases = {
    {"transpose", run_transpose<TransposeBug::none>},
    {"transpose without its barrier", run_transpose<TransposeBug::no_barrier>},
    {"transpose that loses the tail", run_transpose<TransposeBug::lost_tail>},
    {"row sum", run_row_sum<SumBug::none>},
    {"row sum without its barrier", run_row_sum<SumBug::no_barrier>},
    {"row sum with an early return", run_row_sum<SumBug::early_return>},
    {"row sum of one element too many", run_row_sum<SumBug::one_too_many>},
    {"row sum with a wrong mask", run_row_sum<SumBug::wrong_mask>},
    {"row sum of mixed shuffles", run_row_sum<SumBug::mixed_shuffles>},
    {"warp reversal", run_reverse_warp<WarpBug::none>},
    {"warp reversal without its barrier", run_reverse_warp<WarpBug::no_barrier>},
    {"warp reversal that takes a shuffle for a barrier", run_reverse_warp<WarpBug::shuffle_for_barrier>},
    {"warp functions", run_warp_functions},
    {"two barriers", [] { return run_failing(two_barriers); }},
    {"trap", [] { return run_failing(trap); }},
    {"shared memory", run_read_shared<ReadBug::none>},
    {"shared memory uninitialised", run_read_shared<ReadBug::uninitialised>},
    {"shared memory past the static end", run_read_shared<ReadBug::past_static>},
    {"shared memory past the dynamic end", run_read_shared<ReadBug::past_dynamic>},
    {"shared memory of a function", run_read_shared<ReadBug::hidden>},
    {"pipeline", run_pipeline<CopyBug::none>},
    {"pipeline without a wait", run_pipeline<CopyBug::no_wait>},
    {"pipeline that waits for too few", run_pipeline<CopyBug::waits_for_too_few>},
    {"pipeline with a misaligned address that is not read", run_pipeline<CopyBug::misaligned>},
    {"pipeline without a barrier after the wait", run_pipeline<CopyBug::no_barrier_after>},
    {"pipeline without a barrier before reuse", run_pipeline<CopyBug::no_barrier_before_reuse>},
    {"last block", run_last_block<LastBug::none>},
    {"last block that is a fixed one", run_last_block<LastBug::fixed_block>},
    {"last block whose counter stays", run_last_block<LastBug::never_zero>},
    {"early", run_early<true>},
    {"early without a wait", run_early<false>},
    {"graph", run_graph},
    {"broken capture", run_broken_capture},
    {"branch", run_branch<BranchBug::none>},
    {"branch without a join", run_branch<BranchBug::no_join>},
    {"branch that reads what the origin overwrites", run_branch<BranchBug::too_early>},
    {"limits", run_limits},
    {"after a failure", run_after_failure},
    {"host threads", run_host_threads},
};

}  // namespace planted

int main(int, char** arguments) {
  std::string verdict;
  try {
    verdict = planted::kCases.at(arguments[1])();
  } catch (const std::runtime_error& e) {
    verdict = e.what();
  }
  std::puts(verdict.c_str());
}
