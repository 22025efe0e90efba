// The tensors of one call, as Python passes them: of each tensor the address of its memory. maml_cuda/engine
// has made them dense, of one dtype and on one device, and keeps them alive until the call has run.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "call.h"
#include "python/memory.h"

namespace maml {

/// The tensors of one call.
struct BoundCall {
  int64_t tasks = 0, at_once = 1;
  Memory workspace;
  std::vector<Memory> parameters;
  std::vector<Memory> rates;
  std::array<Memory, 4> support{}, query{};  // x, and what its loss compares: y, scale, old_log_probs
  Memory task_weights, query_weights;
  std::array<Memory, 3> losses{};  // loss, task_losses, support_losses
  Memory logits, gradient;
  std::vector<int64_t> parameter_strides;
  std::vector<Memory> given;  // the cotangents of a backward or the directions of hvp
  std::vector<int64_t> given_strides;
  std::vector<Memory> per_task;
  Memory state;
  int64_t kept = 0;
  bool prepared = false;
  uint64_t seed = 0;
  int64_t first_step = 0;
  Memory support_counts, query_counts;
  Memory data_gradient;

  template <class T>
  Call<T> as() const {
    Call<T> call;
    call.tasks = tasks;
    call.at_once = at_once;
    call.parameters = all_as<const T>(parameters);
    call.parameter_strides = parameter_strides;
    call.rates = all_as<const T>(rates);
    call.x_support = support[0].as<const T>();
    call.y_support = target<T>(support);
    call.x_query = query[0].as<const T>();
    call.y_query = target<T>(query);
    call.task_weights = task_weights.as<const T>();
    call.query_weights = query_weights.as<const T>();
    call.given = all_as<const T>(given);
    call.given_strides = given_strides;
    call.loss = losses[0].as<T>();
    call.task_losses = losses[1].as<T>();
    call.support_losses = losses[2].as<T>();
    call.logits = logits.as<T>();
    call.gradient = gradient.as<T>();
    call.per_task = all_as<T>(per_task);
    call.workspace = workspace.as<T>();
    call.state = state.as<T>();
    call.kept = kept;
    call.prepared = prepared;
    call.seed = seed;
    call.first_step = first_step;
    call.support_counts = support_counts.as<const int64_t>();
    call.query_counts = query_counts.as<const int64_t>();
    call.data_gradient = data_gradient.as<T>();
    return call;
  }

 private:
  template <class T>
  static std::vector<T*> all_as(const std::vector<Memory>& tensors) {
    std::vector<T*> pointers;
    pointers.reserve(tensors.size());
    for (Memory m : tensors) pointers.push_back(m.as<T>());
    return pointers;
  }
  template <class T>
  static Target<T> target(const std::array<Memory, 4>& data) {
    return {data[1].as<const void>(), data[2].as<const T>(), data[3].as<const T>()};
  }
};

}  // namespace maml
