// Both gradients of a 3 x 3 convolution by the matrix instructions of a warpgroup (wgmma), for GPUs of
// compute capability 9.0. Not in the library yet: only the tests compile it (docs/gpu.md). It is to take the
// place of conv2d_gradients.cu for the layers that it serves.
#pragma once

#include <optional>

#include "cuda/conv2d.h"

namespace maml::cuda {

/// Whether this layer, these tensors and this GPU are served.
bool raster_gradients_serve(const Layer& l, const WeightTerms<float>& weight, const InputTerms<float>& input);

/// What gradients (conv2d.h) does, or nothing where that is not served.
std::optional<CotangentSums<float>> raster_gradients(const Launcher& launch, const char* name, const Layer& l,
                                                     const WeightTerms<float>& weight,
                                                     const InputTerms<float>& input, float* scratch,
                                                     const Normalised<float>* norm);
/// Elements of scratch, without those of the sums of the input gradient.
int64_t raster_gradients_scratch(const Layer& l);

}  // namespace maml::cuda
