// The definition of ChunkKernels, for the files that instantiate it.
#pragma once

#include "cuda/run/chunk_kernel.h"

namespace maml::cuda {

template <class Unit, Pass kPass>
__global__ void __launch_bounds__(kChunkThreads, 1)
    chunk_kernel(const __grid_constant__ Chain chain, const __grid_constant__ Places places,
                 const __grid_constant__ LossPart loss,
                 const __grid_constant__ ChunkTensors<typename Unit::T> symbolic, int64_t part_size,
                 Deferred deferred) {
  __shared__ double sums[kChunkWarps];
  // Not in registers, where it would take thirty in each thread.
  __shared__ uint64_t resolved[sizeof(ChunkTensors<typename Unit::T>) / sizeof(uint64_t)];
  auto& t = *reinterpret_cast<ChunkTensors<typename Unit::T>*>(resolved);
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  if (threadIdx.x == 0) {
    auto here = [&](auto* p) { return resolve(p, memory, task); };
    const ChunkTensors<typename Unit::T>& s = symbolic;
    t = {here(s.x),         here(s.theta),     here(s.phi),   resolve(s.target, memory, task),
         here(s.direction), here(s.cotangent), here(s.value), here(s.logits),
         here(s.gradient),  s.limit,           here(s.parts)};
  }
  __syncthreads();
  Chunk<Unit, kPass>(chain, places, loss, t, sums).run(grid_team(), part_size, memory.counters_of(task));
}

/// f(kernel) of a pass.
template <class Unit, class F>
auto with_chunk_kernel(Pass pass, F f) {
  return pass == Pass::gradient  ? f(chunk_kernel<Unit, Pass::gradient>)
         : pass == Pass::product ? f(chunk_kernel<Unit, Pass::product>)
                                 : f(chunk_kernel<Unit, Pass::metric>);
}

template <class Unit>
void ChunkKernels<Unit>::launch(const Launcher& launch, Pass pass, const Chain& chain, const LossPart& part,
                                const ChunkTensors<T>& tensors) {
  const Places places = places_of<T>(chain, pass);
  const size_t bytes = static_cast<size_t>(places.total) * sizeof(T);
  const char* name = pass == Pass::gradient  ? "chunks, gradient"
                     : pass == Pass::product ? "chunks, product"
                                             : "chunks, metric";
  with_chunk_kernel<Unit>(pass, [&](auto kernel) {
    launch(name, kernel, {chunks_of(part.samples)}, kChunkThreads, bytes, chain, places, part, tensors,
           part_size(tensors.limit), launch.memory);
  });
}

template <class Unit>
size_t ChunkKernels<Unit>::shared_bytes(Pass pass, const Chain& chain) {
  const size_t fixed = with_chunk_kernel<Unit>(pass, [](auto kernel) { return static_shared_bytes(kernel); });
  return fixed + static_cast<size_t>(places_of<T>(chain, pass).total) * sizeof(T);
}

}  // namespace maml::cuda
