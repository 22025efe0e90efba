// The products of a convolution, on some samples of one task, channels last (conv2d.cpp). `memory`: at least
// conv2d_scratch(l) elements.
#pragma once

#include "cpu/product/product.h"
#include "layers/layer.h"

namespace maml::MAML_ISA {

constexpr int64_t kGroupElements = 32768;  // of samples that go together: half of a 256 KB second-level cache

/// Samples that go together, so that what each has of elements stays in the cache.
int64_t group_of(int64_t n, int64_t elements);

/// Elements of weights as the products read them, which is also the room of a weight gradient.
int64_t product_weights(const Layer& l);

/// w as convolve reads it: itself, or in `room`.
template <class T>
const T* forward_weights(const Layer& l, const T* w, T* room);

/// y = bias + sum of terms x * w, w as forward_weights gives it.
template <class T>
void convolve(const Layer& l, const Term<T>* terms, int count, const T* bias, T* y, T* memory);

/// w as input_gradient reads it.
template <class T>
void transposed_weights(const Layer& l, const T* w, T* out);

/// grad_x (+)= sum of terms g * w, w transposed.
template <class T>
void input_gradient(const Layer& l, const Term<T>* terms, int count, bool add, T* grad_x, T* memory);

/// grad_w (+)= sum of terms x^T g, some samples after the other.
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
