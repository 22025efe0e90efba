// The megakernel: one block runs the whole program of one task (program.h): K inner steps, the query pass and
// K Hessian-vector products.
//
// Shared memory: all state of a task (Layout, `inside`): packed parameters, every phi_k, gradients, v,
// tangents, and the activations of all steps, or, where those of all samples do not fit, of one tile. Data
// and labels are read from the user's tensors.
//
// Threads: interpreter.h. Numerics: sums run in ascending order. Limits: kMegakernelSpans tensors, the shared
// memory of one block, and the kinds of layers that say so (Declaration::in_megakernel): linear layers,
// pointwise functions, sums and appended parameters.
#include "cuda/run/interpreter.h"
#include "cuda/run/megakernel.h"
#include "cuda/run/on_device.h"
#include "cuda/run/pack.h"

namespace maml::cuda {
namespace {

constexpr int kBlock = kReductionThreads;

struct Spans {
  Span spans[kMegakernelSpans];
};

template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    megakernel(const __grid_constant__ Spans call, SpanOrder order, DevicePlan plan, Layout layout,
               int64_t result_size, int rate_count, Span* table_out) {
  __shared__ uint64_t slots[2 * Reader<T>::kWords];
  __shared__ Table table;
  __shared__ double sums[kBlock];  // of reductions
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t task = blockIdx.z;
  const BlockTeam team = block_team();
  T* memory = reinterpret_cast<T*>(dynamic_shared());
  constexpr int kRegions = static_cast<int>(Region::count);
  for (int r = thread; r < kRegions; r += kBlock) table.regions[r] = call.spans[r];
  // The task's part of the workspace is the block's shared memory.
  const Memory addresses{&table, nullptr, {reinterpret_cast<unsigned char*>(memory), 0}, nullptr};
  if (task == 0) {
    for (int s = thread; s < order.count; s += kBlock) table_out[s] = call.spans[s];
  }
  auto user = [&](int span) {
    const Span& s = call.spans[span];
    return s.start ? reinterpret_cast<T*>(s.start + task * s.stride) : nullptr;
  };
  for (int p = 0; p < plan.parameter_count; ++p) {
    const ParameterInfo& parameter = plan.parameters[p];
    pack(team, parameter, user(order.parameters + p), memory + layout.own + parameter.at);
    if (order.given < order.per_task) {
      pack(team, parameter, user(order.given + p), memory + layout.given + parameter.at);
    }
  }
  for (int r = 0; r < rate_count; ++r) {
    pack_rate(team, plan, plan.rates[r], user(order.rates + r), memory + layout.rates + plan.rates[r].at);
  }
  Reader<T> program(static_cast<const Instruction<T>*>(plan.program), slots);
  program.fetch(0);
  __syncthreads();  // the table
  interpret<Home::shared_memory>(program, 0, plan.program_length, plan, addresses, task,
                                 memory + layout.rates, sums);
  __syncthreads();
  const Span& results = call.spans[static_cast<int>(Region::task)];
  if (results.stride) {
    copy(team, result_size, memory + layout.result,
         reinterpret_cast<T*>(results.start + task * results.stride));
  }
  for (int p = 0; order.per_task < order.count && p < plan.parameter_count; ++p) {
    T* to = user(order.per_task + p);
    if (to) unpack(team, plan.parameters[p], memory + layout.out + plan.parameters[p].at, to);
  }
}

}  // namespace

template <class T>
void launch_megakernel(const Launcher& launch, const Problem& problem, const Layout& layout,
                       const DevicePlan& plan, const Span* spans, const SpanOrder& order, Span* table) {
  Spans call{};
  std::copy_n(spans, order.count, call.spans);
  launch("megakernel", megakernel<T>, {}, kBlock, static_cast<size_t>(layout.task_size) * sizeof(T), call,
         order, plan, layout, problem.result_size, static_cast<int>(problem.rate_tensors.size()), table);
}
template void launch_megakernel<float>(const Launcher&, const Problem&, const Layout&, const DevicePlan&,
                                       const Span*, const SpanOrder&, Span*);
template void launch_megakernel<double>(const Launcher&, const Problem&, const Layout&, const DevicePlan&,
                                        const Span*, const SpanOrder&, Span*);

template <class T>
bool fits_one_block(const Layout& layout, int device) {
  const OnDevice on(device);
  const size_t bytes = static_cast<size_t>(layout.task_size) * sizeof(T) + static_shared_bytes(megakernel<T>);
  return bytes <= most_shared_bytes(device);
}
template bool fits_one_block<float>(const Layout&, int);
template bool fits_one_block<double>(const Layout&, int);

}  // namespace maml::cuda
