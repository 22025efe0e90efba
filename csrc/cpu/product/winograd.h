// Convolutions of 3 x 3 taps with fewer products, by Winograd's algorithm (winograd.cpp). Stride 1: 36
// products for 4 x 4 outputs instead of 144, or 16 for 2 x 2 instead of 36. Stride 2: at most 49 for 3 x 3
// instead of 81. conv2d.cpp uses it wherever is_winograd(l). `memory` is scratch of winograd_scratch(l)
// elements or more.
#pragma once

#include "cpu/product/product.h"
#include "layers/layer.h"

namespace maml::MAML_ISA {

/// Whether the layer is computed this way; depends on its shape alone.
bool is_winograd(const Layer& l);

/// Sizes in elements: of transformed weights, and of the sums of a weight gradient; and of the scratch.
int64_t winograd_weights(const Layer& l);
int64_t winograd_scratch(const Layer& l);

/// out = G w G^T in the form that winograd_convolve reads: [weights, c_in + 1, c_out]. The last row of each
/// matrix is unused; it keeps matrices from sharing cache sets.
template <class T>
void winograd_forward_weights(const Layer& l, const T* w, T* out);

/// out [weights, c_out + 1, c_in] in the form that winograd_input_gradient reads.
template <class T>
void winograd_transposed_weights(const Layer& l, const T* w, T* out);

/// y = bias + sum of terms x * w, with transformed weights.
template <class T>
void winograd_convolve(const Layer& l, const Term<T>* terms, int count, const T* bias, T* y, T* memory);

/// grad_x (+)= sum of terms g * w, with transposed and transformed weights.
template <class T>
void winograd_input_gradient(const Layer& l, const Term<T>* terms, int count, bool add, T* grad_x, T* memory);

/// sums [weights, c_in + 1, c_out] (+)= sum of transformed terms x^T g.
template <class T>
void winograd_weight_sums(const Layer& l, const Term<T>* terms, int count, bool add, T* sums, T* memory);

/// grad_w (+)= G^T sums G.
template <class T>
void winograd_weight_gradient(const Layer& l, const T* sums, bool add, T* grad_w);

}  // namespace maml::MAML_ISA
