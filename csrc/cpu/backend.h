// The CPU backend as the bindings see it: one table for each instruction set that this build holds, and the
// choice among them.
#pragma once

#include <string>
#include <vector>

#include "../plan.h"

namespace maml::cpu {

/// The tensors of one call, tasks first and dense unless a stride says otherwise. T is float or double; null:
/// absent.
template <class T>
struct Call {
  int64_t tasks = 0;
  int threads = 1;
  std::vector<const T*> parameters;        // in the user's order of elements
  std::vector<int64_t> parameter_strides;  // from task to task; 0: shared
  std::vector<const T*> rates;
  const T* x_support = nullptr;
  const void* y_support = nullptr;
  const T* x_query = nullptr;
  const void* y_query = nullptr;
  const T* task_weights = nullptr;  // [tasks]; null: 1 / tasks for meta_gradient, else 1
  std::vector<const T*> given;  // adapt_backward: cotangents, hvp: directions, one a parameter; null: zero
  std::vector<int64_t> given_strides;  // predict_backward: the cotangent of the prediction
  T* loss = nullptr;                   // [1]
  T* task_losses = nullptr;            // [tasks]
  T* logits = nullptr;                 // [tasks, n_query, ...]
  T* support_losses = nullptr;         // [tasks, steps]
  T* gradient = nullptr;               // [result_size], the trainable parameters in the user's order
  std::vector<T*> per_task;  // one a parameter [tasks, size]: adapted parameters, gradients, products
  T* workspace = nullptr;
};

struct Backend {
  const char* isa;
  bool (*available)();
  LayerTraits traits;
  void (*run_float)(const Problem&, const Call<float>&);
  void (*run_double)(const Problem&, const Call<double>&);
};

/// Elements of workspace that a call needs.
int64_t workspace_size(const Problem& problem, int64_t tasks, int threads);

/// The widest instruction set that this machine has, or the one that MAML_CUDA_CPU_ISA names.
/// Throws std::invalid_argument where it names one that this build or this machine lacks.
const Backend& backend();

/// Names of the instruction sets in this build.
std::vector<std::string> instruction_sets();

/// Tasks whose results stand side by side before they are added up, in order of tasks.
constexpr int64_t kWave = 32;

}  // namespace maml::cpu
