// The products of a convolution on some samples of one task, channels last (conv2d.cpp). `memory` is scratch
// of conv2d_scratch(l) elements or more.
#pragma once

#include "cpu/product/product.h"
#include "layers/layer.h"

namespace maml::MAML_ISA {

constexpr int64_t kGroupElements = 32768;  // of a group of samples: half of a 256 KB L2 cache

/// How many samples to process together so that their `elements` each stay in the cache.
int64_t group_of(int64_t n, int64_t elements);

/// The number of elements of the weights in the form that the products read; a weight gradient takes as many.
int64_t product_weights(const Layer& l);

/// The weights w in the form that convolve reads: w itself, or transformed into `room`.
template <class T>
const T* forward_weights(const Layer& l, const T* w, T* room);

/// y = bias + sum of terms x * w, with weights from forward_weights.
template <class T>
void convolve(const Layer& l, const Term<T>* terms, int count, const T* bias, T* y, T* memory);

/// Writes the weights w in the form that input_gradient reads.
template <class T>
void transposed_weights(const Layer& l, const T* w, T* out);

/// grad_x (+)= sum of terms g * w, with weights from transposed_weights.
template <class T>
void input_gradient(const Layer& l, const Term<T>* terms, int count, bool add, T* grad_x, T* memory);

/// grad_w (+)= sum of terms x^T g. Call sum() for one group of samples after the other, then finish().
template <class T>
class WeightGradient {
 public:
  WeightGradient(const Layer& l, bool add, T* grad_w, T* room);
  void sum(const Layer& some, const Term<T>* terms, int count, T* memory);
  void finish() const;

 private:
  const Layer& l_;
  bool add_, started_;
  T *grad_w_, *sums_;
};

int64_t conv2d_scratch(const Layer& l);

}  // namespace maml::MAML_ISA
