// The definition of ChunkKernels, for the files that instantiate it.
#pragma once

#include "cuda/run/chunk_kernel.h"
#include "cuda/run/last_block.h"

namespace maml::cuda {

/// The sums over the parts of all chunks, in their order, by one block.
template <class T>
__device__ void add_parts(const Chain& chain, const ChunkTensors<T>& t, int chunks, int64_t part_size) {
  const int thread = static_cast<int>(threadIdx.x);
  auto add = [&](int64_t at, int size) {
    for (int i = thread; t.gradient && at >= 0 && at < t.limit && i < size; i += kChunkThreads) {
      T sum = 0;
#pragma unroll 4
      for (int c = 0; c < chunks; ++c) sum += t.parts[c * part_size + at + i];
      t.gradient[at + i] = sum;
    }
  };
  for (int l = 0; l < chain.count; ++l) {
    const ChainLayer& layer = chain.layers[l];
    add(layer.weight, layer.in * layer.out);
    add(layer.bias, layer.out);
  }
  add(chain.append, chain.appended);
  if (t.value && thread == 0) {
    double value = 0;
    for (int c = 0; c < chunks; ++c) value += static_cast<double>(t.parts[c * part_size + t.limit]);
    *t.value = static_cast<T>(value);
  }
}

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
  Chunk<Unit, kPass>(chain, places, loss, t, sums).run(grid_team(), part_size);
  if (gridDim.x == 1 || !(t.gradient || t.value)) return;
  if (last_to_arrive(memory.counters_of(task), gridDim.x)) {
    add_parts(chain, t, static_cast<int>(gridDim.x), part_size);
  }
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
