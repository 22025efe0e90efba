// y = a m x for all tasks, with a random mask m (layers/dropout.h). A thread takes an element of the result;
// where that is a cotangent which the loops read several times, it sums in row-major order (strided.h). It
// computes the random number of every element that it reads. The twin on the CPU is cpu/dropout.cpp.
#include "cuda/implement.h"
#include "cuda/strided.h"

namespace maml::cuda {
namespace {

/// The random number of an element. No array is indexed by a variable, as that would be in local memory.
__device__ __forceinline__ uint32_t random_number(const Stream& stream, uint32_t mask, int64_t element) {
  const PhiloxBlock block = block_of(stream, mask, element / 4);
  const uint32_t first = element & 1 ? block.word[1] : block.word[0];
  const uint32_t second = element & 1 ? block.word[3] : block.word[2];
  return element & 2 ? second : first;
}

/// out (+)= a m in. The operands of the loops are in, out and the mask.
template <class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    masked_kernel(const __grid_constant__ Split<3> loops, T a, uint32_t number, uint64_t keep, Stream stream,
                  const T* symbolic_in, bool add, T* symbolic_out, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  const T* in = resolve(symbolic_in, memory, blockIdx.z);
  T* out = resolve(symbolic_out, memory, blockIdx.z);
  stream = of_task(stream, memory, blockIdx.z);
  for (int64_t step = team.first(); step < loops.outer.steps; step += team.step()) {
    const Offsets<3> to = outer_step(loops, step);
    Sum<T> sum;
    each_step(loops.inner, to, [&](const Offsets<3>& at) {
      sum += (random_number(stream, number, at.of[2]) < keep ? a : T(0)) * in[at.of[0]];
    });
    put(out, to.of[1], sum.value(), add);
  }
}

template <class T>
void masked(const Launcher& launch, const char* name, const Layer& l, const View& from, const View& to,
            const T* in, bool add, T* out) {
  const View of_mask = numbers_of_mask(l);
  const Split<3> s = split<3>(*l.loops, l.n, to, {&from, &to, &of_mask});
  clear_unless_reached(launch, to, l.n, s.outer.steps, add, out);
  launch(name, masked_kernel<T>, step_grid(s.outer.steps), kElementThreads, 0, s, static_cast<T>(l.a),
         l.mask->number, l.mask->keep, l.stream, in, add, out, launch.memory);
}

}  // namespace

template <>
struct OnGpu<Kind::dropout> {
  template <class T>
  static void apply(const Launcher& launch, const Layer& l, const T* x, T* y) {
    masked(launch, "dropout", l, l.loops->x[0], l.loops->y, x, false, y);
  }
  template <class T>
  static void adjoint(const Launcher& launch, const Layer& l, const T* g, bool add, T* grad_x) {
    masked(launch, "dropout transposed", l, l.loops->y, l.loops->x[0], g, add, grad_x);
  }
};
template struct Implementation<Kind::dropout>;

}  // namespace maml::cuda
