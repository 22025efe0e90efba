// Conversion between channels first, the order of the user's images, and channels last, the order of the
// layers.
#pragma once

#include "cpu/product/product.h"

namespace maml::MAML_ISA {

/// out[s, j, i] (+)= in[s, i, j] for every sample s.
template <class T>
void reorder(int64_t n, int64_t rows, int64_t columns, const T* in, bool add, T* out) {
  if (!add) return transpose(n, rows, columns, in, out);
  for (int64_t s = 0; s < n; ++s, in += rows * columns, out += rows * columns) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i) out[j * rows + i] += in[i * columns + j];
    }
  }
}

}  // namespace maml::MAML_ISA
