// What kernels read beside their own arguments: of a plan, its image, written to the device once; of a call,
// its spans, one for each region and for each of the user's tensors.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "call.h"
#include "cuda/run/launch.h"
#include "plan/plan.h"

namespace maml::cuda {

/// A parameter: in the user's order [rows, columns, taps] of `size` elements, packed [taps, columns, rows]
/// from `at`.
struct ParameterInfo {
  int64_t size, rows, taps, at;
  int64_t gradient_at;  // in the flat gradient; -1: frozen
};

/// A rate tensor: packed from `at`; elementwise where it has a parameter's order of elements.
struct RateInfo {
  int64_t size, at;
  int64_t parameter;  // or -1
  int64_t result_at,
      gradient_at;  // its gradient, in a task's result and in the flat gradient; -1: not learned
};

/// The plan on the device.
struct Image {
  const ParameterInfo* parameters;
  const RateInfo* rates;
  const RateSlice* slices;  // [steps with rates of their own, slices_a_step]
  const void* program;      // of the megakernel
  int parameter_count, rate_count, slices_a_step, program_length;
};

/// The image as bytes to be written to the device, and its view there.
class ImageBytes {
 public:
  template <class Item>
  size_t append(const Item* items, size_t count) {
    static_assert(std::is_trivially_copyable_v<Item>);
    const size_t at = bytes_.size();
    bytes_.resize(at + (count * sizeof(Item) + 15) / 16 * 16);
    if (count) std::memcpy(bytes_.data() + at, items, count * sizeof(Item));
    return at;
  }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

 private:
  std::vector<unsigned char> bytes_;
};

/// Where the spans of a call's tensors stand behind those of its regions.
struct SpanOrder {
  int parameters, rates, given, per_task, count;
  SpanOrder(int parameter_count, int rate_count, bool has_given, bool has_per_task) {
    parameters = static_cast<int>(Region::count);
    rates = parameters + parameter_count;
    given = rates + rate_count;
    per_task = given + (has_given ? parameter_count : 0);
    count = per_task + (has_per_task ? parameter_count : 0);
  }
};

/// Writes whole words to device memory in the order of the stream. They travel as arguments of kernels: in a
/// graph or out of it, and no memory of the host has to stay.
void send(cudaStream_t stream, const void* from, size_t bytes, void* to);

}  // namespace maml::cuda
