// The products of a warpgroup (wgmma.h) in the emulation: right for every shape, way of reading and start,
// against a plain loop on matrices laid out here by the PTX ISA's words; and each mistake is found.
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/product/wgmma_trial.h"

namespace {

using namespace maml::cuda;

enum class Mistake { none, no_wait, no_publish, no_begin, swapped, overwritten };

constexpr int kDepth = 32, kBefore = 3;  // chunks before the operands: a start need not be a core matrix

/// Operands as bytes of shared memory, and how they stand there.
struct Operands {
  const unsigned char* bytes;
  int size, a, b, a_leading, a_stride, b_leading, b_stride, a_step, b_step;  // step: bytes to the next 16 k
  float* c;                                                                  // [64, n]
};

template <int N, Along A, Along B, Mistake mistake>
__global__ void kernel(Operands p) {
  unsigned char* const shared = dynamic_shared();
  for (int i = static_cast<int>(threadIdx.x); i < p.size; i += 128) shared[i] = p.bytes[i];
  if (mistake != Mistake::no_publish) publish_shared();
  __syncthreads();
  if (mistake != Mistake::no_begin) begin_products();
  float d[N / 2] = {};
  const bool swapped = mistake == Mistake::swapped;
  const uint64_t a =
      matrix_descriptor(shared + p.a, swapped ? p.a_stride : p.a_leading, swapped ? p.a_leading : p.a_stride);
  const uint64_t b = matrix_descriptor(shared + p.b, p.b_leading, p.b_stride);
  for (int k = 0; k < kDepth / 16; ++k) wgmma<A, B>(d, later(a, k * p.a_step), later(b, k * p.b_step));
  commit_products();
  if (mistake == Mistake::overwritten) {
    __syncthreads();
    shared[p.a + static_cast<int>(threadIdx.x)] = 0;
    __syncthreads();
  }
  if (mistake != Mistake::no_wait) wait_products<0>(d);
  const int thread = static_cast<int>(threadIdx.x), row = thread / 32 * 16 + thread % 32 / 4;
  for (int i = 0; i < N / 2; ++i) p.c[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + thread % 4 * 2 + i % 2] = d[i];
}

/// Writes matrix [mn, k] from chunk `start` on: element (i, k) is at a sum of strides, in bytes.
void lay_out(std::vector<unsigned char>& bytes, const std::vector<float>& m, int mns, Along along, int start,
             int leading, int stride) {
  for (int i = 0; i < mns; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      const int row = along == Along::k ? i % 8 : k % 8, column = along == Along::k ? k % 8 : i % 8;
      const size_t at = static_cast<size_t>(start + i / 8 * stride + k / 8 * leading + row * 16 + column * 2);
      const auto half = static_cast<uint16_t>(to_bf16(m[static_cast<size_t>(i * kDepth + k)], 0));
      if (bytes.size() < at + 2) bytes.resize(at + 2, 0xFF);
      std::memcpy(&bytes[at], &half, 2);
    }
  }
}

template <int N, Along A, Along B, Mistake mistake = Mistake::none>
std::string run() {
  std::mt19937 random(N);
  std::uniform_int_distribution<int> small(-8, 8);  // products and sums are exact
  std::vector<float> a(64 * kDepth), b(N * kDepth), c(64 * N, NAN);
  for (float& v : a) v = static_cast<float>(small(random));
  for (float& v : b) v = static_cast<float>(small(random));
  std::vector<unsigned char> bytes;
  Operands p{};
  // Core matrices follow each other along MN, with a gap of one chunk between neighbours along k, or the
  // other way round.
  p.a = kBefore * 16;
  p.a_stride = A == Along::k ? 128 : kDepth * 16 + 16, p.a_leading = A == Along::k ? 64 * 16 + 16 : 128;
  lay_out(bytes, a, 64, A, p.a, p.a_leading, p.a_stride);
  p.b = static_cast<int>(bytes.size() + 15) / 16 * 16 + 16;
  p.b_stride = B == Along::k ? 128 : kDepth * 16 + 48, p.b_leading = B == Along::k ? N * 16 + 32 : 128;
  lay_out(bytes, b, N, B, p.b, p.b_leading, p.b_stride);
  p.a_step = 2 * p.a_leading, p.b_step = 2 * p.b_leading;
  p.bytes = bytes.data(), p.size = static_cast<int>(bytes.size()), p.c = c.data();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(128);
  config.dynamicSmemBytes = bytes.size();
  try {
    if (cudaLaunchKernelEx(&config, kernel<N, A, B, mistake>, p) != cudaSuccess) return "no launch";
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  int wrong = 0;
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < N; ++j) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k)
        sum += a[static_cast<size_t>(i * kDepth + k)] * b[static_cast<size_t>(j * kDepth + k)];
      wrong += c[static_cast<size_t>(i * N + j)] != sum;
    }
  }
  return wrong == 0 ? "right" : "wrong";
}

int failures = 0;

void expect(const std::string& got, const char* words, const char* what) {
  if (got.find(words) != std::string::npos) return;
  std::printf("%s: \"%s\", should be \"%s\"\n", what, got.c_str(), words);
  ++failures;
}

template <int N>
void every_way() {
  expect(run<N, Along::k, Along::k>(), "right", "A along k, B along k");
  expect(run<N, Along::k, Along::mn>(), "right", "A along k, B along mn");
  expect(run<N, Along::mn, Along::k>(), "right", "A along mn, B along k");
  expect(run<N, Along::mn, Along::mn>(), "right", "A along mn, B along mn");
}

}  // namespace

int main() {
  constexpr Along k = Along::k;
  for (int schedule = 0; schedule < 3; ++schedule) {
    emulation::set_schedule(static_cast<emulation::Schedule>(schedule), 1);
    every_way<32>();
    every_way<64>();
    expect(run<32, k, k, Mistake::no_wait>(), "a product of a warpgroup that is not waited for", "no wait");
    expect(run<32, k, k, Mistake::no_publish>(), "whose operands in shared memory are not published",
           "no fence");
    expect(run<32, k, k, Mistake::no_begin>(), "without begin_products", "no wgmma.fence");
    expect(run<32, k, k, Mistake::swapped>(), "reads outside dynamic shared memory", "swapped distances");
    expect(run<32, k, k, Mistake::overwritten>(), "wrong", "operands overwritten before the wait");
    expect(trial::is_exact(0) ? "exact" : "not", "exact", "the trial of a device");
    emulation::cores_transposed = true;
    expect(trial::is_exact(0) ? "exact" : "not", "not", "the trial of a device that reads in another way");
    emulation::cores_transposed = false;
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
