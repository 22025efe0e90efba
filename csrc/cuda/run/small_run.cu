// Kernel: kReductionThreads threads; blockIdx: x the blocks of the first instruction, of which one runs the
// others; z task. Shared memory: two instructions and the sums of reductions. The block that runs an
// instruction sees what was written before: by the instruction before it, after the barrier between them; by
// other blocks, because it is the last to arrive. Numerics: as in interpreter.h; a linear layer has other
// orders of sums than its kernels have.
#include "cuda/channels.h"
#include "cuda/run/interpreter.h"
#include "cuda/run/last_block.h"
#include "cuda/run/small_run.h"
#include "layers/registry.h"

namespace maml::cuda {

bool has_block_passes(const Layer& l) {
  static constexpr auto kinds = for_each_kind([&]<Kind K> { return HasBlockPasses<K>; });
  if (!kinds[static_cast<size_t>(l.kind)]) return false;
  if (l.kind == Kind::conv2d) return is_linear(l);
  if (l.kind == Kind::norm_block) return BlockActivation::has(l.function);
  return l.kind != Kind::pointwise || in_megakernel(l.function);
}

namespace {

// When one block is to compute an instruction. These limits are estimates; they have not been tuned on a GPU.

/// Elements of a tensor: 32 for each thread of the block. It has four loads in flight, to an L2 cache 0.35 us
/// away: 3 us, as much as a launch and a half. An instruction on more of them (the last BatchNorm of
/// mini-ImageNet on 5 images has 16,000) is faster with kernels of its own, on several multiprocessors.
constexpr int64_t kMostElements = 8192;

/// Blocks of a task up to which a normalisation is the first instruction of a run, and no launch of its own.
/// That launch takes 1.8 us and the time of its bytes, here some 0.1 us. In the run, to see which block is
/// last takes about 0.8 us, and each block, which has a multiprocessor to itself, up to 1 us for its 24 kB (a
/// pool of 2 x 2). So this pays while all blocks of four tasks run at once.
constexpr int64_t kMostFirstBlocks = kSmallTiles ? 128 : 32;

/// Multiply-adds of a product: 256 for each thread, which takes some 2 us. The linear layer of mini-ImageNet
/// on 5 images has 20,000, that of Omniglot on 75 images 24,000.
constexpr int64_t kMostWork = 65536;

static_assert(kReductionThreads == kThreads);  // of channels.h

template <class T>
__global__ void __launch_bounds__(kReductionThreads, 1)
    small_run_kernel(DevicePlan plan, int first, int length, const T* rates, Deferred deferred) {
  __shared__ uint64_t slots[2 * Reader<T>::kWords];
  __shared__ double sums[kReductionThreads];
  Reader<T> program(static_cast<const Instruction<T>*>(plan.program) + first, slots);
  program.fetch(0);  // the plan does not change
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  int next = 0;
  if (gridDim.x > 1) {
    program.store(next, memory, task);
    __syncthreads();
    const Instruction<T>& i = program[next];
    NormaliseInBlock::run_forward(i.op, grid_team(), i.layer, i.tensors);
    if (!last_to_arrive(memory.counters_of(task), gridDim.x)) return;
    program.fetch(++next);
  }
  interpret<Home::device_memory>(program, next, length, plan, memory, task, resolve(rates, memory, task),
                                 sums);
}

template <class T>
bool is_small(const Problem& problem, const Instruction<T>& i) {
  const int64_t adapted = problem.packing.adapted;
  switch (i.op) {
    case Op::forward:
    case Op::backward:
    case Op::forward_tangent:
    case Op::backward_tangent: {
      const Layer& l = i.layer;
      const int64_t elements = l.n * std::max(size(l.in), size(l.out));
      const bool few = elements <= kMostElements && properties(l.kind).work(l) <= kMostWork;
      return few && has_block_passes(l);
    }
    case Op::loss:
    case Op::loss_tangent:
    case Op::metric:
      return i.loss.n * i.loss.c <= kMostElements;
    case Op::descend:
    case Op::direction:
    case Op::rate_gradient:
      return adapted <= kMostElements;
    case Op::retreat:
      return adapted + i.size <= kMostElements;
    case Op::add_weighted:
    case Op::pull:
    case Op::conjugate_step:
    case Op::copy:
    case Op::zero:
      return i.size <= kMostElements;
    default:  // Op::join, and those of an optimizer, which have kernels of their own
      return false;
  }
}

/// The blocks of a task that compute an instruction if it is the first of a run; 1 where it cannot be, unless
/// it is small: a forward pass of a normalisation whose statistics a convolution has taken.
template <class T>
int first_blocks(const Instruction<T>& i) {
  const Layer& l = i.layer;
  const Tensors<T>& t = i.tensors;
  if (i.op != Op::forward && i.op != Op::forward_tangent) return 1;
  if ((l.kind != Kind::norm_block && l.kind != Kind::batch_norm) || !has_block_passes(l)) return 1;
  if (i.op == Op::forward ? !t.statistics : t.x_dot[0] && !t.statistics_dot) return 1;
  const int64_t blocks = row_grid<T>(l.n * l.out.h * l.out.w, l.in.c).x;
  return blocks <= kMostFirstBlocks ? static_cast<int>(blocks) : 1;
}

}  // namespace

template <class T>
std::vector<Run> runs_of(const Problem& problem, const std::vector<Instruction<T>>& program) {
  std::vector<Run> runs;
  const int count = static_cast<int>(program.size());
  int interpreted = 0;
  for (int first = 0; first < count;) {
    const int blocks = is_small(problem, program[first]) ? 1 : first_blocks(program[first]);
    int last = blocks > 1 ? first + 1 : first;
    while (last < count && program[last].beside == program[first].beside && is_small(problem, program[last]))
      ++last;
    const bool together = last - first > 1;
    const int length = together ? last - first : 1;
    runs.push_back({first, length, together ? interpreted : -1, together ? blocks : 1});
    if (together) interpreted += length;
    first += length;
  }
  return runs;
}
template std::vector<Run> runs_of(const Problem&, const std::vector<Instruction<float>>&);
template std::vector<Run> runs_of(const Problem&, const std::vector<Instruction<double>>&);

template <class T>
void launch_small_run(const Launcher& launch, const DevicePlan& plan, const Run& run, const T* rates) {
  launch("small layers", small_run_kernel<T>, {run.blocks}, kReductionThreads, 0, plan, run.interpreted,
         run.length, rates, launch.memory);
}
template void launch_small_run(const Launcher&, const DevicePlan&, const Run&, const float*);
template void launch_small_run(const Launcher&, const DevicePlan&, const Run&, const double*);

}  // namespace maml::cuda
