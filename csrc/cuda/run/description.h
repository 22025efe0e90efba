// What kernels read besides their arguments. Of the plan: its description, written to the device once. Of a
// call: its spans, one for each region and for each of the user's tensors.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "call.h"
#include "cuda/run/launch.h"
#include "plan/problem.h"

namespace maml::cuda {

/// A parameter of `size` elements: [rows, columns, taps] in the user's order; packed as [taps, columns,
/// rows], from offset `at`.
struct ParameterInfo {
  int64_t size, rows, taps, at;
  int64_t gradient_at;  // offset in the flat gradient; -1: frozen
};

/// A rate tensor, packed from offset `at`. An elementwise one has the order of elements of its parameter.
struct RateInfo {
  int64_t size, at;
  int64_t parameter;  // of an elementwise rate; else -1
  int64_t result_at,
      gradient_at;  // offsets of its gradient in a task's result and in the flat gradient; -1: not learned
};

/// The plan in device memory, as kernels take it by value.
struct DevicePlan {
  const ParameterInfo* parameters;
  const RateInfo* rates;
  const RateSlice* slices;     // [inner steps with different rates, slices_a_step]
  const UpdateSlice* updates;  // the same, where there is an optimizer
  const void* program;         // the megakernel's instructions
  int parameter_count, rate_count, slices_a_step, program_length;
};

/// The bytes that are copied to the device; append() returns the offset of the items.
class PlanBytes {
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

/// The indices of the call's tensors among its spans; the spans of the regions come first.
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

/// Writes whole 8-byte words to device memory, in stream order. The data are passed as kernel arguments: this
/// works inside a graph capture too, and no host memory has to outlive the call.
void send(cudaStream_t stream, const void* from, size_t bytes, void* to);

}  // namespace maml::cuda
