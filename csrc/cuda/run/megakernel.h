// The executor for small networks: one block computes the whole meta-step of a task, with all its state in
// shared memory.
#pragma once

#include "cuda/run/layout.h"
#include "cuda/run/program.h"

namespace maml::cuda {

/// The most spans that fit into kernel arguments.
inline constexpr int kMegakernelSpans = 200;

/// Whether one block's shared memory, without the kernel's static part, holds a task.
template <class T>
bool fits_one_block(const Layout& layout, int device);

/// Runs the plan's program for every task of `launch`. The spans are passed as kernel arguments; the first
/// block also copies them to `table` in device memory, for the kernels that follow. Region::task is where
/// results are written (stride 0: nowhere); a task's other memory is the block's shared memory.
template <class T>
void launch_megakernel(const Launcher& launch, const Problem& problem, const Layout& layout,
                       const DevicePlan& plan, const Span* spans, const SpanOrder& order, Span* table);

}  // namespace maml::cuda
