// The tensors of one call, as a backend receives them.
#pragma once

#include <cstdint>
#include <vector>

#include "layers/layer.h"

namespace maml {

/// Tasks are the first axis of every tensor; where a task has several support sets, these follow each other.
/// Tensors are dense unless they have a stride. T is float or double. A null pointer is an absent input or an
/// output that is not wanted.
template <class T>
struct Call {
  int64_t tasks = 0;
  int64_t at_once = 1;                     // tasks computed concurrently; each has its own workspace
  std::vector<const T*> parameters;        // in the user's memory layout
  std::vector<int64_t> parameter_strides;  // elements from one task to the next; 0: shared by all tasks
  std::vector<const T*> rates;
  const T* x_support = nullptr;
  Target<T> y_support;
  const T* x_query = nullptr;
  Target<T> y_query;
  // [tasks, sets] and [tasks], on the CPU: the first so many samples are the set, the others are padding,
  // which has the scale 0. Null: there is none.
  const int64_t *support_counts = nullptr, *query_counts = nullptr;
  const T* task_weights = nullptr;  // [tasks]; null: 1 / tasks for meta_gradient, 1 for the other operations
  // [steps + 1], the weight of the query loss at each phi_k; null unless the problem has query_steps.
  const T* query_weights = nullptr;
  // adapt_backward: cotangents; hvp and fisher: directions; one per parameter, null for zero.
  // predict_backward: the cotangent of the prediction.
  std::vector<const T*> given;
  std::vector<int64_t> given_strides;
  T* loss = nullptr;            // [1]
  T* task_losses = nullptr;     // [tasks]
  T* logits = nullptr;          // [tasks, n_query, ...]
  T* support_losses = nullptr;  // [tasks, loss_columns()]
  T* data_gradient = nullptr;   // [tasks, data_size], zeros at first
  T* gradient = nullptr;        // [result_size], of the trainable parameters, in the user's layout
  std::vector<T*> per_task;     // per parameter [tasks, size]: adapted parameters, gradients or products
  T* workspace = nullptr;
  // kept_fisher: `state` holds `kept` consecutive workspaces of Problem::task_size() elements, one for each
  // of the first tasks. `prepared`: an earlier call with the same parameters and data has filled them.
  T* state = nullptr;
  int64_t kept = 0;
  bool prepared = false;
  uint64_t seed = 0;       // of random masks
  int64_t first_step = 0;  // the number of the first inner step, for random masks
};

}  // namespace maml
