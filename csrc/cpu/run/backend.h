// The CPU backend as the bindings see it: one table for each instruction set that this build holds, and the
// choice among them.
#pragma once

#include <string>
#include <vector>

#include "call.h"
#include "plan/problem.h"

namespace maml::cpu {

struct Backend {
  const char* isa;
  bool (*available)();
  LayerTraits traits;
  /// Elements of workspace that a call needs.
  int64_t (*workspace_float)(const Problem&, int64_t tasks, int64_t at_once);
  int64_t (*workspace_double)(const Problem&, int64_t tasks, int64_t at_once);
  void (*run_float)(const Problem&, const Call<float>&);
  void (*run_double)(const Problem&, const Call<double>&);
};

/// The widest instruction set that this machine has, or the one that MAML_CUDA_CPU_ISA names.
/// Throws std::invalid_argument where it names one that this build or this machine lacks.
const Backend& backend();

/// Names of the instruction sets in this build.
std::vector<std::string> instruction_sets();

/// Tasks, or groups of tasks in lanes, whose results stand side by side before they are added up, in order.
constexpr int64_t kWave = 32;

}  // namespace maml::cpu
