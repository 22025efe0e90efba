// Vectors as wide as the registers of the instruction set, with full and partial loads and stores. The
// sources of the CPU backend are compiled once for every instruction set, each time into a namespace MAML_ISA
// with its own MAML_VECTOR_BYTES and MAML_REGISTERS (CMakeLists.txt); run/backend.h chooses one at run time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace maml::MAML_ISA {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(MAML_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(MAML_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = MAML_VECTOR_BYTES / sizeof(T);

template <class T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
inline Vector<float> broadcast(float x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<float>>(_mm512_set1_ps(x));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector<float>>(_mm256_set1_ps(x));
#else
  return x - Vector<float>{};  // x - 0 is x for every x, so the compiler drops it; x + 0 is not
#endif
}
inline Vector<double> broadcast(double x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<double>>(_mm512_set1_pd(x));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector<double>>(_mm256_set1_pd(x));
#else
  return x - Vector<double>{};
#endif
}

/// The first `count` lanes, count in [0, kLanes]: the others load zero and are not stored. Without AVX-512,
/// masked accesses are slow, stores above all (dozens of operations on some CPUs); so a full vector is
/// accessed without a mask.
template <class T>
struct Lanes {
  using V = Vector<T>;
#if defined(__AVX512F__)
  uint32_t mask;
  explicit Lanes(int64_t count) : mask((1u << count) - 1) {}
#elif defined(__AVX2__)
  __m256i mask;
  bool whole;
  explicit Lanes(int64_t count, int64_t all = kLanes<T>) : whole(count == all) {
    alignas(32) int32_t words[8];
    for (int i = 0; i < 8; ++i) words[i] = i < count * static_cast<int64_t>(sizeof(T) / 4) ? -1 : 0;
    mask = _mm256_load_si256(reinterpret_cast<const __m256i*>(words));
  }
#else
  int64_t count;
  explicit Lanes(int64_t c) : count(c) {}
#endif
};

inline Vector<float> load(const float* p, const Lanes<float>& lanes) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes.mask), p));
#elif defined(__AVX2__)
  return lanes.whole ? load(p) : reinterpret_cast<Vector<float>>(_mm256_maskload_ps(p, lanes.mask));
#else
  if (lanes.count == kLanes<float>) return load(p);
  Vector<float> v{};
  std::memcpy(&v, p, static_cast<size_t>(lanes.count) * sizeof(float));
  return v;
#endif
}
inline Vector<double> load(const double* p, const Lanes<double>& lanes) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes.mask), p));
#elif defined(__AVX2__)
  return lanes.whole ? load(p) : reinterpret_cast<Vector<double>>(_mm256_maskload_pd(p, lanes.mask));
#else
  if (lanes.count == kLanes<double>) return load(p);
  Vector<double> v{};
  std::memcpy(&v, p, static_cast<size_t>(lanes.count) * sizeof(double));
  return v;
#endif
}
inline void store(float* p, Vector<float> v, const Lanes<float>& lanes) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lanes.mask), reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
  if (lanes.whole) return store(p, v);
  _mm256_maskstore_ps(p, lanes.mask, reinterpret_cast<__m256>(v));
#else
  if (lanes.count == kLanes<float>) return store(p, v);
  std::memcpy(p, &v, static_cast<size_t>(lanes.count) * sizeof(float));
#endif
}
inline void store(double* p, Vector<double> v, const Lanes<double>& lanes) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lanes.mask), reinterpret_cast<__m512d>(v));
#elif defined(__AVX2__)
  if (lanes.whole) return store(p, v);
  _mm256_maskstore_pd(p, lanes.mask, reinterpret_cast<__m256d>(v));
#else
  if (lanes.count == kLanes<double>) return store(p, v);
  std::memcpy(p, &v, static_cast<size_t>(lanes.count) * sizeof(double));
#endif
}

/// Stands for Lanes where a vector is full.
struct Whole {};

template <class T>
inline Vector<T> load(const T* p, Whole) {
  return load(p);
}
template <class T>
inline void store(T* p, Vector<T> v, Whole) {
  store(p, v);
}

/// Calls f(j, lanes) for the vectors of a row of channels.
template <class T, class F>
inline void each_lanes(int64_t channels, F f) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  for (; j + W <= channels; j += W) f(j, Whole{});
  if (j < channels) f(j, Lanes<T>(channels - j));
}

/// Calls f(j, vectors, lanes) for blocks of 4, 2 or 1 vectors of a row of channels; `vectors` is a constant.
template <class T, class F>
inline void each_block(int64_t channels, F f) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  for (; j + 4 * W <= channels; j += 4 * W) f(j, std::integral_constant<int, 4>(), Whole{});
  if (j + 2 * W <= channels) f(j, std::integral_constant<int, 2>(), Whole{}), j += 2 * W;
  each_lanes<T>(channels - j,
                [&](int64_t i, auto lanes) { f(j + i, std::integral_constant<int, 1>(), lanes); });
}

/// The lanes of a vector of half the width, where instructions on one cost half as much; else 0.
#if defined(__AVX2__)
template <class T>
struct HalfVectorOf {
  typedef T type __attribute__((vector_size(MAML_VECTOR_BYTES / 2)));
};
template <class T>
using HalfVector = typename HalfVectorOf<T>::type;
template <class T>
constexpr int kHalf = kLanes<T> / 2;
/// The first `count` lanes of a half vector, as Lanes.
template <class T>
struct HalfLanes : Lanes<T> {
  using V = HalfVector<T>;
#if defined(__AVX512F__)
  using Lanes<T>::Lanes;
#else
  explicit HalfLanes(int64_t count) : Lanes<T>(count, kHalf<T>) {}
#endif
};
template <class T>
inline HalfVector<T> half(Vector<T> v) {
  HalfVector<T> h;
  std::memcpy(&h, &v, sizeof(h));
  return h;
}
/// x in all lanes of a half vector. A broadcast from memory costs in proportion to its width.
template <class T>
inline HalfVector<T> broadcast_half(T x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return reinterpret_cast<HalfVector<T>>(_mm256_set1_ps(x));
  if constexpr (sizeof(T) == 8) return reinterpret_cast<HalfVector<T>>(_mm256_set1_pd(x));
#else
  if constexpr (sizeof(T) == 4) return reinterpret_cast<HalfVector<T>>(_mm_set1_ps(x));
  if constexpr (sizeof(T) == 8) return reinterpret_cast<HalfVector<T>>(_mm_set1_pd(x));
#endif
}
#else
template <class T>
constexpr int kHalf = 0;
template <class T>
using HalfLanes = Lanes<T>;
#endif

#if defined(__AVX512F__)
template <class T>
inline typename HalfLanes<T>::V load(const T* p, const HalfLanes<T>& half) {
  using V = typename HalfLanes<T>::V;
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<V>(_mm256_maskz_loadu_ps(static_cast<__mmask8>(half.mask), p));
  } else {
    return reinterpret_cast<V>(_mm256_maskz_loadu_pd(static_cast<__mmask8>(half.mask), p));
  }
}
template <class T>
inline void store(T* p, typename HalfLanes<T>::V v, const HalfLanes<T>& half) {
  if constexpr (sizeof(T) == 4) {
    _mm256_mask_storeu_ps(p, static_cast<__mmask8>(half.mask), reinterpret_cast<__m256>(v));
  } else {
    _mm256_mask_storeu_pd(p, static_cast<__mmask8>(half.mask), reinterpret_cast<__m256d>(v));
  }
}
#elif defined(__AVX2__)
template <class T>
inline typename HalfLanes<T>::V load(const T* p, const HalfLanes<T>& half) {
  using V = typename HalfLanes<T>::V;
  if (half.whole) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  const __m128i mask = _mm256_castsi256_si128(half.mask);
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<V>(_mm_maskload_ps(p, mask));
  } else {
    return reinterpret_cast<V>(_mm_maskload_pd(p, mask));
  }
}
template <class T>
inline void store(T* p, typename HalfLanes<T>::V v, const HalfLanes<T>& half) {
  if (half.whole) {
    std::memcpy(p, &v, sizeof(v));
    return;
  }
  const __m128i mask = _mm256_castsi256_si128(half.mask);
  if constexpr (sizeof(T) == 4) {
    _mm_maskstore_ps(p, mask, reinterpret_cast<__m128>(v));
  } else {
    _mm_maskstore_pd(p, mask, reinterpret_cast<__m128d>(v));
  }
}
#endif

/// Lane j of the result is element I[j] of the concatenation of a and b.
template <int... I, class V>
inline V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  typedef Index Indices __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Indices{I...});
#endif
}

/// Transposes W vectors of W lanes in place: swaps the off-diagonal blocks of D x D elements, for D = 1, 2,
/// 4, ...
template <class T, int D = 1>
inline void turn(Vector<T> (&v)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
  [&]<int... J>(std::integer_sequence<int, J...>) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & D) continue;
      const Vector<T> a = v[i], b = v[i + D];
      v[i] = shuffle<(J & D ? W + J - D : J)...>(a, b);
      v[i + D] = shuffle<(J & D ? W + J : J + D)...>(a, b);
    }
  }(std::make_integer_sequence<int, W>());
  if constexpr (2 * D < W) turn<T, 2 * D>(v);
}

/// out[j, i] = in[i, j] for at most W x W elements, with strides between rows.
template <class T>
inline void transpose_block(int64_t rows, int64_t columns, const T* in, int64_t in_row, T* out,
                            int64_t out_row) {
  constexpr int W = kLanes<T>;
  if (rows == W && columns == W) {
    Vector<T> v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = load(in + i * in_row);
    turn<T>(v);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) store(out + j * out_row, v[j]);
    return;
  }
  Vector<T> v[W] = {};
  const Lanes<T> wide(columns), high(rows);
  for (int64_t i = 0; i < rows; ++i) v[i] = load(in + i * in_row, wide);
  turn<T>(v);
  for (int64_t j = 0; j < columns; ++j) store(out + j * out_row, v[j], high);
}

}  // namespace maml::MAML_ISA
