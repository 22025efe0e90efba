// Runs of small instructions. A launch takes some 3 us, however little it computes. So instructions that
// follow each other, and of which one block computes each in less time than that, are launched together: one
// block a task interprets them (interpreter.h), with all tensors in device memory. In a few-shot network
// these are the last layers: the last normalisation, the pool, the linear layer and the loss, forward and
// backward. A network that is small everywhere is a single run.
//
// A run may begin with a forward pass of a normalisation that is too large for one block. Several blocks then
// compute this pass, and the last of them to finish (last_block.h) goes on with the rest.
#pragma once

#include <vector>

#include "cuda/run/description.h"
#include "cuda/run/program.h"

namespace maml::cuda {

/// Instructions of a program that are launched together, or a single one with kernels of its own.
struct Run {
  int first, length;
  int interpreted;  // the first of them among those in device memory; -1: it has kernels of its own
  int blocks = 1;   // of a task, that compute the first instruction
};

/// Whether one block can compute the passes of a layer.
bool has_block_passes(const Layer& layer);

/// Divides a program into runs. It depends on the shapes of one task only, so that a result has the same bits
/// whatever the number of tasks is.
template <class T>
std::vector<Run> runs_of(const Problem& problem, const std::vector<Instruction<T>>& program);

/// Interprets a run; the plan's program has the instructions of all interpreted runs.
template <class T>
void launch_small_run(const Launcher& launch, const DevicePlan& plan, const Run& run, const T* rates);

}  // namespace maml::cuda
