// The matrix instructions behind the products of reduced precision, with their plain twins, and the rounding
// of their operands. D = A B + D in one warp, A [16, k], B [k, 8], D [16, 8] of float32.
//
// With g = lane / 4 and t = lane % 4 a thread holds
//   d = D[g, 2t], D[g, 2t + 1], D[g + 8, 2t], D[g + 8, 2t + 1]
//   tf32, k = 8    a = A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4];  b = B[t, g], B[t + 4, g]
//   bf16, k = 16   a = A[g, 2t..], A[g + 8, 2t..], A[g, 2t + 8..], A[g + 8, 2t + 8..], pairs of neighbours;
//                  b = B[2t.., g], B[2t + 8.., g]
// A twin rounds operands as the instruction does and sums in float32, k ascending from d; the hardware's
// order and its few extra bits are its own.
#pragma once

#include <cstdint>

#include "cuda/run/platform.h"

namespace maml::cuda {

/// x rounded to 10 bits of fraction, to nearest, ties away from zero: cvt.rna.tf32.f32 up to the 13 low bits,
/// which the instruction does not read. Spelled out, because the compiler makes fewer moves of it.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  const bool finite = fabsf(x) < __uint_as_float(0x7f800000u);
  return __float_as_uint(x) + (finite ? 0x1000u : 0u);
}

#ifndef __CUDACC__
namespace twin {

/// The 16 bits of x in bf16, to nearest, ties to even.
inline uint32_t bf16(float x) {
  const uint32_t word = __float_as_uint(x);
  if (!(fabsf(x) < __uint_as_float(0x7f800000u))) return x != x ? 0x7fffu : word >> 16;
  return (word + 0x7fffu + (word >> 16 & 1)) >> 16;
}

}  // namespace twin
#endif

/// Two bf16 in a word, `low` in its low half, to nearest even.
__device__ __forceinline__ uint32_t to_bf16(float low, float high) {
#ifdef __CUDACC__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return twin::bf16(high) << 16 | twin::bf16(low);
#endif
}

/// The values of such a word, which are float32 cut short.
__device__ __forceinline__ float low_half(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_half(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }

#ifndef __CUDACC__
namespace twin {

/// What an instruction reads of a tf32 operand.
inline float tf32(uint32_t word) { return __uint_as_float(word & ~0x1fffu); }

/// What the lanes of a warp bring to an instruction.
struct Operands {
  uint32_t a[4], b[2];
};

/// d of this lane; a_of(operands of a lane, i, k), b_of(.., k) pick an element, k counted within a lane's
/// share.
template <int Depth, class A, class B>
void mma(float (&d)[4], const Operands& mine, A a_of, B b_of) {
  Operands lanes[32];
  emulation::warp_gather(&mine, sizeof mine, lanes);
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    float sum = d[i];
    for (int k = 0; k < Depth; ++k) sum += a_of(lanes, g, i / 2, k) * b_of(lanes, column, k);
    d[i] = sum;
  }
}

}  // namespace twin
#endif

__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  twin::mma<8>(
      d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}},
      [](const twin::Operands* lanes, int g, int half, int k) {
        return twin::tf32(lanes[4 * g + k % 4].a[2 * (k / 4) + half]);
      },
      [](const twin::Operands* lanes, int column, int k) {
        return twin::tf32(lanes[4 * column + k % 4].b[k / 4]);
      });
#endif
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  auto half_of = [](uint32_t word, int k) { return k % 2 ? high_half(word) : low_half(word); };
  twin::mma<16>(
      d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}},
      [half_of](const twin::Operands* lanes, int g, int half, int k) {
        return half_of(lanes[4 * g + k % 8 / 2].a[2 * (k / 8) + half], k);
      },
      [half_of](const twin::Operands* lanes, int column, int k) {
        return half_of(lanes[4 * column + k % 8 / 2].b[k / 8], k);
      });
#endif
}

}  // namespace maml::cuda
