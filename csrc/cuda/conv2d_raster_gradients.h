// Both gradients of a 3 x 3 convolution by the matrix instructions of a warpgroup (wgmma), on GPUs of compute
// capability 9.0. conv2d_gradients.cu computes all others.
#pragma once

#include <optional>

#include "cuda/conv2d.h"

// The library is built for such GPUs, or this is the emulation, which has wgmma.
#if defined(MAML_CUDA_WGMMA) || !defined(__CUDACC__)
#define MAML_RASTER_GRADIENTS 1
#else
#define MAML_RASTER_GRADIENTS 0
#endif

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
