// One call as a backend sees it: the tensors of the user.
#pragma once

#include <cstdint>
#include <vector>

#include "layers/layer.h"

namespace maml {

/// The tensors of one call, tasks first and dense unless a stride says otherwise. T is float or double; null:
/// absent.
template <class T>
struct Call {
  int64_t tasks = 0;
  int64_t at_once = 1;                     // tasks at work at the same time: each needs a workspace
  std::vector<const T*> parameters;        // in the user's order of elements
  std::vector<int64_t> parameter_strides;  // from task to task; 0: shared
  std::vector<const T*> rates;
  const T* x_support = nullptr;
  Target<T> y_support;
  const T* x_query = nullptr;
  Target<T> y_query;
  const T* task_weights = nullptr;  // [tasks]; null: 1 / tasks for meta_gradient, else 1
  const T* query_weights =
      nullptr;  // [steps + 1], of the query loss at each phi_k; where the problem has them
  std::vector<const T*>
      given;  // adapt_backward: cotangents; hvp and fisher: directions; one a parameter; null: zero
  std::vector<int64_t> given_strides;  // predict_backward: the cotangent of the prediction
  T* loss = nullptr;                   // [1]
  T* task_losses = nullptr;            // [tasks]
  T* logits = nullptr;                 // [tasks, n_query, ...]
  T* support_losses = nullptr;         // [tasks, steps]
  T* gradient = nullptr;               // [result_size], the trainable parameters in the user's order
  std::vector<T*> per_task;  // one a parameter [tasks, size]: adapted parameters, gradients, products
  T* workspace = nullptr;
  // kept_fisher: the first `kept` tasks have workspaces of their own, of Problem::task_size(), one behind the
  // other; prepared: as an earlier call with the same parameters and data has left them.
  T* state = nullptr;
  int64_t kept = 0;
  bool prepared = false;
};

}  // namespace maml
