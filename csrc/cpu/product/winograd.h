// Convolutions of 3 x 3 taps with fewer products: of stride 1 with 36 for each 4 x 4 outputs instead of 144,
// or 16 for each 2 x 2 instead of 36; of stride 2 with at most 49 for each 3 x 3 instead of 81
// (winograd.cpp). conv2d.cpp takes this way wherever is_winograd(l). `memory`: at least winograd_scratch(l)
// elements.
#pragma once

#include "cpu/product/product.h"
#include "layers/layer.h"

namespace maml::MAML_ISA {

/// By the layer's shape alone.
bool is_winograd(const Layer& l);

/// Elements of transformed weights, and of the sums of a weight gradient.
int64_t winograd_weights(const Layer& l);
int64_t winograd_scratch(const Layer& l);

/// out = G w G^T, as winograd_convolve reads it: [weights, c_in + 1, c_out], the last row of each unused, so
/// that they do not share cache sets.
template <class T>
void winograd_forward_weights(const Layer& l, const T* w, T* out);

/// out [weights, c_out + 1, c_in], as winograd_input_gradient reads it.
template <class T>
void winograd_transposed_weights(const Layer& l, const T* w, T* out);

/// y = bias + sum of terms x * w, w transformed.
template <class T>
void winograd_convolve(const Layer& l, const Term<T>* terms, int count, const T* bias, T* y, T* memory);

/// grad_x (+)= sum of terms g * w, w transposed and transformed.
template <class T>
void winograd_input_gradient(const Layer& l, const Term<T>* terms, int count, bool add, T* grad_x, T* memory);

/// sums [weights, c_in + 1, c_out] (+)= sum of terms x^T g, transformed.
template <class T>
void winograd_weight_sums(const Layer& l, const Term<T>* terms, int count, bool add, T* sums, T* memory);

/// grad_w (+)= G^T sums G.
template <class T>
void winograd_weight_gradient(const Layer& l, const T* sums, bool add, T* grad_w);

}  // namespace maml::MAML_ISA
