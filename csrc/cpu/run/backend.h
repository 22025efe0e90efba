// The interface of the CPU backend to the bindings: a table of functions for each instruction set of this
// build, and the choice between them.
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
  /// The number of elements of workspace that a call needs.
  int64_t (*workspace_float)(const Problem&, int64_t tasks, int64_t at_once);
  int64_t (*workspace_double)(const Problem&, int64_t tasks, int64_t at_once);
  void (*run_float)(const Problem&, const Call<float>&);
  void (*run_double)(const Problem&, const Call<double>&);
};

/// The backend of the widest instruction set that this machine has, or of the one that MAML_CUDA_CPU_ISA
/// names. Throws std::invalid_argument if it names one that this build or this machine lacks.
const Backend& backend();

/// The names of the instruction sets in this build.
std::vector<std::string> instruction_sets();

/// How many tasks, or groups of tasks in lanes, are computed before their results are added up, in order.
constexpr int64_t kWave = 32;

}  // namespace maml::cpu
