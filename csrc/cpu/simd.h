// Vectors of the instruction set that this file is compiled for, as wide as its registers, and loads and
// stores of a part of one. The folder is compiled once for every instruction set, each time into its own
// namespace MAML_ISA with its own MAML_VECTOR_BYTES and MAML_REGISTERS (CMakeLists.txt); backend.h chooses at
// run time.
#pragma once

#include <cstdint>
#include <cstring>

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

/// The first `count` lanes: the others load zero and are not stored. count in [0, kLanes].
template <class T>
struct Lanes {
#if defined(__AVX512F__)
  uint32_t mask;
  explicit Lanes(int64_t count) : mask((1u << count) - 1) {}
#elif defined(__AVX2__)
  __m256i mask;
  explicit Lanes(int64_t count) {
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
  return reinterpret_cast<Vector<float>>(_mm256_maskload_ps(p, lanes.mask));
#else
  Vector<float> v{};
  std::memcpy(&v, p, static_cast<size_t>(lanes.count) * sizeof(float));
  return v;
#endif
}
inline Vector<double> load(const double* p, const Lanes<double>& lanes) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes.mask), p));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector<double>>(_mm256_maskload_pd(p, lanes.mask));
#else
  Vector<double> v{};
  std::memcpy(&v, p, static_cast<size_t>(lanes.count) * sizeof(double));
  return v;
#endif
}
inline void store(float* p, Vector<float> v, const Lanes<float>& lanes) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lanes.mask), reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, lanes.mask, reinterpret_cast<__m256>(v));
#else
  std::memcpy(p, &v, static_cast<size_t>(lanes.count) * sizeof(float));
#endif
}
inline void store(double* p, Vector<double> v, const Lanes<double>& lanes) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lanes.mask), reinterpret_cast<__m512d>(v));
#elif defined(__AVX2__)
  _mm256_maskstore_pd(p, lanes.mask, reinterpret_cast<__m256d>(v));
#else
  std::memcpy(p, &v, static_cast<size_t>(lanes.count) * sizeof(double));
#endif
}

/// All lanes, in place of Lanes where a vector is whole.
struct Whole {};

template <class T>
inline Vector<T> load(const T* p, Whole) {
  return load(p);
}
template <class T>
inline void store(T* p, Vector<T> v, Whole) {
  store(p, v);
}

}  // namespace maml::MAML_ISA
