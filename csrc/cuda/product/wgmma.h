// Matrix instructions of a warpgroup (wgmma, sm_90a only), and plain functions in their place for the
// emulation. Four warps compute D [64, n] += A [64, 16] B [16, n] with operands of bf16 in shared memory and
// sums of float32 in registers. A warpgroup starts at a thread that is a multiple of 128. With
// w = thread / 32 % 4, g = lane / 4 and t = lane % 4, a thread holds
//
//   d[4 j ..] = D[16 w + g, 8 j + 2 t], the next column, and both columns of row 16 w + g + 8
//
// Operands stand in shared memory as chunks of 16 bytes (8 bf16), without a swizzle. Eight consecutive chunks
// are a core matrix of 128 bytes. There are two ways to read one (PTX ISA, "Asynchronous warpgroup level
// matrix shared memory layout"; "MN" is the index of A's rows or of B's columns):
//
//   along k    a chunk is one MN and 8 k      a core matrix 8 MN; `leading` bytes to the next 8 k,
//                                             `stride` bytes to the next 8 MN
//   along MN   a chunk is one k and 8 MN      a core matrix 8 k;  `leading` bytes to the next 8 k,
//                                             `stride` bytes to the next 8 MN
//
// The instructions run behind the thread that starts them. Ordinary stores to their operands are followed by
// publish_shared() and a barrier; before the first instruction comes begin_products(); after the last one
// commit_products(); neither sums nor operands may be touched before wait_products().
//
// The emulation decodes the descriptor as the hardware does, and computes when the thread waits. It sums in
// float32, in ascending k, starting from d; the hardware in another order and with a few extra bits.
#pragma once

#include <cstdint>

#include "cuda/product/mma.h"
#ifndef __CUDACC__
#include "warpgroup.h"
#endif

namespace maml::cuda {

/// The chunk of bf16 that one row of a core matrix is.
struct alignas(16) Chunk {
  uint32_t word[4];
};

/// Where an operand stands: a matrix descriptor without a swizzle. `start`: in the block's shared memory;
/// `leading` and `stride`: multiples of 16 below 2^18.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* start, int leading, int stride) {
#ifdef __CUDACC__
  const uint64_t address = __cvta_generic_to_shared(start);
#else
  const uint64_t address = emulation::shared_address(start);
#endif
  const uint64_t l = static_cast<uint64_t>(leading), s = static_cast<uint64_t>(stride);
  return (address & 0x3ffff) >> 4 | (l & 0x3ffff) >> 4 << 16 | (s & 0x3ffff) >> 4 << 32;
}

/// The descriptor of the operand that starts so many bytes later.
__device__ __forceinline__ uint64_t later(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

/// Makes this thread's stores to shared memory visible to matrix instructions that start after a barrier.
__device__ __forceinline__ void publish_shared() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emulation::publish_shared();
#endif
}

__device__ __forceinline__ void begin_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  emulation::begin_products();
#endif
}

__device__ __forceinline__ void commit_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  emulation::commit_products();
#endif
}

/// Waits until at most `Pending` groups of the warpgroup's products are unfinished. The sums are named, so
/// that the compiler neither moves nor reads them before.
template <int Pending, int Sums>
__device__ __forceinline__ void wait_products([[maybe_unused]] float (&sums)[Sums]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#pragma unroll
  for (int i = 0; i < Sums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
#elif !defined(__CUDACC__)
  emulation::wait_products(Pending);
#endif
}

/// What the instruction's two immediate operands say of a matrix.
enum class Along { k = 0, mn = 1 };

#ifndef __CUDACC__
namespace twin {

/// Element (mn, k) of a matrix of 16 k.
template <Along A>
float element(uint64_t descriptor, int mn, int k) {
  auto field = [&](int bit) { return static_cast<int64_t>(descriptor >> bit & 0x3fff) << 4; };
  const int64_t leading = field(16), stride = field(32);
  const bool chunk_is_mn = (A == Along::k) != emulation::cores_transposed;
  const int64_t within = chunk_is_mn ? mn % 8 * 16 + k % 8 * 2 : k % 8 * 16 + mn % 8 * 2;
  const int64_t at = field(0) + mn / 8 * stride + k / 8 * leading + within;
  uint16_t half;
  std::memcpy(&half, emulation::shared_at(at, 2), sizeof half);
  return __uint_as_float(static_cast<uint32_t>(half) << 16);
}

template <int N, Along A, Along B>
void wgmma(const emulation::WarpgroupProduct& p) {
  if ((p.a | p.b) >> 49) emulation::fail("a matrix descriptor with a swizzle or a base offset");
  const int thread = static_cast<int>(threadIdx.x) % 128, g = thread % 32 / 4, t = thread % 4;
  float a[2][16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) a[half][k] = element<A>(p.a, thread / 32 * 16 + g + 8 * half, k);
  }
  for (int j = 0; j < N / 8; ++j) {
    for (int column = 0; column < 2; ++column) {
      for (int k = 0; k < 16; ++k) {
        const float b = element<B>(p.b, 8 * j + 2 * t + column, k);
        for (int half = 0; half < 2; ++half) p.sums[4 * j + 2 * half + column] += a[half][k] * b;
      }
    }
  }
}

}  // namespace twin
#endif

#define MAML_WGMMA_SUMS(i)                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])

/// D += A B, n = 32: by all threads of a warpgroup together.
template <Along A, Along B>
__device__ __forceinline__ void wgmma(float (&d)[16], uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, p, 1, 1, %18, %19;\n}\n"
      : MAML_WGMMA_SUMS(0), MAML_WGMMA_SUMS(8)
      : "l"(a), "l"(b), "n"(static_cast<int>(A)), "n"(static_cast<int>(B)));
#elif !defined(__CUDACC__)
  emulation::defer_product({twin::wgmma<32, A, B>, d, a, b});
#endif
}

/// The same with n = 64.
template <Along A, Along B>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, %34, %35;\n}\n"
      : MAML_WGMMA_SUMS(0), MAML_WGMMA_SUMS(8), MAML_WGMMA_SUMS(16), MAML_WGMMA_SUMS(24)
      : "l"(a), "l"(b), "n"(static_cast<int>(A)), "n"(static_cast<int>(B)));
#elif !defined(__CUDACC__)
  emulation::defer_product({twin::wgmma<64, A, B>, d, a, b});
#endif
}
#undef MAML_WGMMA_SUMS

}  // namespace maml::cuda
