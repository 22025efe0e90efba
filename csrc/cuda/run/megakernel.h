// The executor of small networks: the whole meta-step of a task in one block, everything it computes in
// shared memory.
#pragma once

#include "cuda/run/layout.h"
#include "cuda/run/program.h"

namespace maml::cuda {

/// As many spans as fit the kernel's arguments.
inline constexpr int kMegakernelSpans = 200;

/// Whether the shared memory of one block, less what the kernel declares itself, holds a task.
template <class T>
bool fits_one_block(const Layout& layout, int device);

/// Runs the image's program for every task of `launch`. The call's spans are read on the host; the first
/// block leaves a copy at `table`, on the device, for the kernels behind it. Region::task is where the
/// results go (stride 0: nowhere): a task's own memory is the block's.
template <class T>
void launch_megakernel(const Launcher& launch, const Problem& problem, const Layout& layout,
                       const Image& image, const Span* spans, const SpanOrder& order, Span* table);

}  // namespace maml::cuda
