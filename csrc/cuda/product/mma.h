// The matrix instructions for products of reduced precision, the rounding of their operands, and plain
// functions that replace both in the emulation. One warp computes D = A B + D with A [16, k], B [k, 8], and D
// [16, 8] of float32.
//
// With g = lane / 4 and t = lane % 4 a thread holds
//   d = D[g, 2t], D[g, 2t + 1], D[g + 8, 2t], D[g + 8, 2t + 1]
//   tf32, k = 8    a = A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4];  b = B[t, g], B[t + 4, g]
//   bf16, k = 16   a = A[g, 2t..], A[g + 8, 2t..], A[g, 2t + 8..], A[g + 8, 2t + 8..], pairs of consecutive
// k;
//                  b = B[2t.., g], B[2t + 8.., g]
// The emulation rounds operands as the instruction does and sums in float32, in ascending k, starting from d.
// The hardware sums in another order and with a few extra bits, so results may differ in the last places.
#pragma once

#include <cstdint>

#include "cuda/run/platform.h"

namespace maml::cuda {

/// x rounded to 10 bits of fraction, to nearest, ties away from zero: half of the last place that stays is
/// added to x, and the 13 low bits, which the matrix instruction does not read, are left as they are. Equals
/// cvt.rna.tf32.f32 in the other bits, but for subnormal x, which the instruction truncates. Two
/// instructions, LOP3 and FFMA, in two different pipes; cvt and a test for NaN with an integer addition take
/// three.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  const float power = __uint_as_float(__float_as_uint(x) & 0xff800000u);  // 2^e, infinite for NaN
  return __float_as_uint(__fmaf_rn(power, 0x1p-11f, x));
}

#ifndef __CUDACC__
namespace twin {

/// x as bf16, in 16 bits: to nearest, ties to even.
inline uint32_t bf16(float x) {
  const uint32_t word = __float_as_uint(x);
  if (!(fabsf(x) < __uint_as_float(0x7f800000u))) return x != x ? 0x7fffu : word >> 16;
  return (word + 0x7fffu + (word >> 16 & 1)) >> 16;
}

}  // namespace twin
#endif

/// Two bf16 in one word, `low` in its low half; to nearest, ties to even.
__device__ __forceinline__ uint32_t to_bf16(float low, float high) {
#ifdef __CUDACC__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return twin::bf16(high) << 16 | twin::bf16(low);
#endif
}

/// The two values of such a word: a bf16 is the upper half of a float32.
__device__ __forceinline__ float low_half(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_half(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }

#ifndef __CUDACC__
namespace twin {

/// The bits of a tf32 operand that the instruction reads.
inline float tf32(uint32_t word) { return __uint_as_float(word & ~0x1fffu); }

/// The operands of one lane.
struct Operands {
  uint32_t a[4], b[2];
};

/// d of this lane. a_of(operands of all lanes, i, half, k) and b_of(operands of all lanes, column, k) return
/// one element of A or B.
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
