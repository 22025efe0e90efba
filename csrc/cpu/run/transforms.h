// The factors of the transform of a parameter's inner gradient (FactorForm), and their gradients. V is T, or
// a vector of T with one task in each lane; the factors are the same for all tasks.
//
// A sum has the same order for T and for vectors of it: over j one after the other, or in parts (`dot`), so
// that a task has the same bits in a lane and alone.
#pragma once

#include <algorithm>

#include "cpu/run/share.h"
#include "optimizers.h"

namespace maml::MAML_ISA {

/// The sum of a times b, in parts that are vectors of T.
template <class A, class V>
V dot(int64_t n, const A* a, const V* b) {
  constexpr int64_t kParts = 16;
  V part[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts) {
    for (int64_t p = 0; p < kParts; ++p) part[p] += a[i + p] * b[i + p];
  }
  for (int64_t p = 0; i < n; ++i, ++p) part[p] += a[i] * b[i];
  for (int64_t half = kParts / 2; half > 0; half /= 2) {
    for (int64_t p = 0; p < half; ++p) part[p] += part[p + half];
  }
  return part[0];
}

/// y = M x along an axis, or its transpose.
template <class V, class T>
void multiply_axis(const FactorForm& form, int64_t size, const T* m, bool transposed, const V* x, V* y) {
  const int64_t n = form.n, inner = form.inner, outer = size / (n * inner), work = size * n;
  if (inner == 1 && form.taps == 1) {
    return share(outer, 1, work, [&](int64_t first, int64_t last) {
      for (int64_t a = first; a < last; ++a) {
        const V* from = x + a * n;
        V* to = y + a * n;
        if (!transposed) {
          for (int64_t i = 0; i < n; ++i) to[i] = dot(n, m + i * n, from);
          continue;
        }
        std::fill_n(to, n, V{});
        for (int64_t j = 0; j < n; ++j) {
          const V own = from[j];
          for (int64_t i = 0; i < n; ++i) to[i] += m[j * n + i] * own;
        }
      }
    });
  }
  share(outer * n, 1, work, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t a = row / n, i = row % n;
      V* to = y + (a * n + form.place(i)) * inner;
      std::fill_n(to, inner, V{});
      for (int64_t j = 0; j < n; ++j) {
        const V* from = x + (a * n + form.place(j)) * inner;
        const T own = transposed ? m[j * n + i] : m[i * n + j];
        for (int64_t c = 0; c < inner; ++c) to[c] += own * from[c];
      }
    }
  });
}

/// result [n, n] -= the sum over all else of out[i] x[j].
template <class V>
void add_axis_gradient(const FactorForm& form, int64_t size, const V* x, const V* out, V* result) {
  const int64_t n = form.n, inner = form.inner, outer = size / (n * inner);
  share(n, 1, size * n, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      V* to = result + i * n;
      if (inner == 1 && form.taps == 1) {
        for (int64_t a = 0; a < outer; ++a) {
          const V own = out[a * n + i];
          const V* from = x + a * n;
          for (int64_t j = 0; j < n; ++j) to[j] -= own * from[j];
        }
        continue;
      }
      for (int64_t j = 0; j < n; ++j) {
        V sum{};
        for (int64_t a = 0; a < outer; ++a) {
          sum += dot(inner, out + (a * n + form.place(i)) * inner, x + (a * n + form.place(j)) * inner);
        }
        to[j] -= sum;
      }
    }
  });
}

/// y = P_f x, or its transpose, of one parameter; x where it has no factor f.
template <class V, class T>
void transform_gradient(const UpdateSlice& s, int f, bool transposed, const T* rates, const V* x, V* y) {
  if (f >= s.factors) {
    std::copy_n(x, s.size, y);
    return;
  }
  const FactorForm& form = s.factor_form[f];
  const T* factor = rates + s.factor[f].at;
  if (form.n > 0) return multiply_axis(form, s.size, factor, transposed, x, y);
  share_elements(s.size, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) y[i] = through(form.through, factor[i]) * x[i];
  });
}

/// Adds to the gradient of factor f of one parameter, from its input x and out = -gamma.
template <class V>
void add_factor_gradient(const UpdateSlice& s, int f, const V* x, const V* out, V* result) {
  if (f >= s.factors || s.factor[f].grad_at == kNowhere) return;
  const FactorForm& form = s.factor_form[f];
  V* to = result + s.factor[f].grad_at;
  if (form.n > 0) return add_axis_gradient(form, s.size, x, out, to);
  share_elements(s.size, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) to[i] -= out[i] * x[i];
  });
}

}  // namespace maml::MAML_ISA
