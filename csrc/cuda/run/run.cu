// One call on a CUDA device. Its spans are copied to the device; then, for each chunk of tasks, parameters
// are packed, an executor runs, and results are added up in order of tasks. Nothing here waits for the
// device.
#include <mutex>
#include <optional>

#include "cuda/run/add_up.h"
#include "cuda/run/backend.h"
#include "cuda/run/batched.h"
#include "cuda/run/capture.h"
#include "cuda/run/chunked.h"
#include "cuda/run/device_bytes.h"
#include "cuda/run/megakernel.h"
#include "cuda/run/small_mlp_work.h"
#include "cuda/run/symbolic_task.h"
#include "meta_gradient.h"

namespace maml::cuda {
namespace {

constexpr int64_t kMostTasksAtOnce = 65535;  // blockIdx.z

// When the megakernel serves a problem. These limits are estimates; they have not been tuned on a GPU.

/// Multiply-adds of one forward pass over support and query above which the batched executor is used even if
/// the state fits one block. A block does some 50 G multiply-adds a second, limited by one load from shared
/// memory for each, so that these take 20 us. That is as long as the launches of such a pass take in the
/// batched executor, which then uses all multiprocessors.
constexpr int64_t kMostWorkOfABlock = int64_t{1} << 20;

/// Samples of a tile, where not all samples fit. Smaller tiles would leave threads of the block without work.
constexpr int64_t kLargestTile = 128, kSmallestTile = 32;

/// Tiles of a set. Each adds some 16 kB to the program of an inner step, for a few layers.
constexpr int64_t kMostTiles = 32;

}  // namespace

Footprint footprint(const Layer& layer) {
  using Of = Footprint (*)(const Layer&);
  static constexpr auto table = for_each_kind([&]<Kind K>() -> Of {
    if constexpr (Declaration<K>::on_cuda) return Implementation<K>::footprint;
    return nullptr;
  });
  return table[static_cast<size_t>(layer.kind)](layer);
}

// The batched executor takes all samples at once: they are its parallelism. It keeps up to 1 GB of states a
// task: they are read at some TB/s, and to compute them again is a chain of small kernels, 150 of 549 for
// five shots of mini-ImageNet, whose states are 224 MB. A constant, not a share of the device's memory: the
// plan of a call is the same on every GPU. Where it does not fit, `task_chunk` or `checkpoint="recompute"`
// makes it smaller.
LayerTraits traits() {
  LayerTraits traits{footprint, Kind::norm_block, conv2d_statistics_rows};
  traits.saved_bytes = int64_t{1} << 30;
  return traits;
}

template <class T>
struct Runner<T>::State {
  Problem problem;
  int device;
  Layout layout;
  Executor executor = Executor::batched;
  std::optional<Chain> chain;  // of the chunked executor
  PlanBytes plan_bytes;
  size_t rates_at = 0, slices_at = 0, updates_at = 0, program_at = 0;
  int program_length = 0;               // of the interpreted part, which is in device memory
  std::vector<Instruction<T>> program;  // of the batched executor
  std::vector<Run> runs;                // of `program`
  std::optional<SmallMlp> mlp;          // run without a program, by a kernel of its own
  Work work_of_task;                    // of the megakernel
  std::once_flag written;
  std::shared_ptr<const DeviceBytes> on_device;  // the plan, from the first call on
  std::mutex replay;  // held while a graph's table is written and its launch enqueued

  State(const Problem& p, int device_)
      : problem(p), device(device_), layout(p, at_own_parameters(p.operation), false) {
    describe();
    std::optional<Problem> small;
    if (problem.support.work + problem.query.work <= kMostWorkOfABlock) {
      mlp = small_mlp_of<T>(problem, device);
      small = mlp ? problem : for_one_block();
    }
    if (small) {
      problem = *std::move(small);
      executor = Executor::megakernel;
      layout = Layout(problem, true, true);
      if (mlp) {
        work_of_task = work_of<T>(problem, *mlp);
        return;
      }
      const std::vector<Instruction<T>> all = record(true);
      work_of_task = work_of(problem, all);
      keep_on_device(all);
    } else if ((chain = chain_of<T>(problem, device))) {
      executor = Executor::chunked;
      problem = without_values(std::move(problem));
      layout = Layout(problem, at_own_parameters(problem.operation), false);
    } else {
      program = record(false);
      runs = runs_of(problem, program);
      std::vector<Instruction<T>> interpreted;
      for (const Run& run : runs) {
        const auto first = program.begin() + run.first;
        if (run.interpreted >= 0) interpreted.insert(interpreted.end(), first, first + run.length);
      }
      keep_on_device(interpreted);
    }
  }

  /// The program of one task, whose tensors are all `inside` the memory of a block or in the workspace.
  std::vector<Instruction<T>> record(bool inside) const {
    const Recorder<T> recorder(problem, !inside);
    const Task<T> task = symbolic_task<T>(problem, layout, inside);
    TaskRunner<Recorder<T>, T>(recorder, problem, task, place<T>(Region::task, layout.work)).run();
    return recorder.program();
  }
  void keep_on_device(const std::vector<Instruction<T>>& instructions) {
    program_at = plan_bytes.append(instructions.data(), instructions.size());
    program_length = static_cast<int>(instructions.size());
  }

  /// The problem in the form that the megakernel takes: unchanged, or in the largest tiles that fit the
  /// shared memory of a block; nothing where it does not serve it.
  std::optional<Problem> for_one_block() const {
    if (!problem.runs_in_megakernel() || problem.data_size || all_spans().count > kMegakernelSpans) return {};
    auto fits = [&](const Problem& p) { return fits_one_block<T>(Layout(p, true, true), device); };
    if (fits(problem)) return problem;
    Problem tiled = problem;
    LayerTraits tiles = traits();
    for (tiles.tile = kLargestTile; tiles.tile >= kSmallestTile; tiles.tile /= 2) {
      tiled.lay_out(tiles);
      if (std::max(tiled.support.tiles, tiled.query.tiles) > kMostTiles) return {};
      if (fits(tiled)) return tiled;
    }
    return {};
  }

  void describe() {
    std::vector<ParameterInfo> parameters;
    int64_t gradient = 0;
    for (size_t i = 0; i < problem.graph.parameters.size(); ++i) {
      const Parameter& p = problem.graph.parameters[i];
      const bool trainable = p.role != Role::frozen;
      parameters.push_back({p.size, p.rows, p.taps, problem.packing.at[i], trainable ? gradient : -1});
      if (trainable) gradient += p.size;
    }
    std::vector<RateInfo> rates;
    for (size_t i = 0; i < problem.rate_tensors.size(); ++i) {
      const RateTensor& r = problem.rate_tensors[i];
      rates.push_back(
          {r.size, problem.rate_at[i], r.parameter, problem.rate_grad_at[i], r.learned ? gradient : -1});
      if (r.learned) gradient += r.size;
    }
    plan_bytes.append(parameters.data(), parameters.size());  // at 0
    rates_at = plan_bytes.append(rates.data(), rates.size());
    slices_at = plan_bytes.bytes().size();
    std::vector<RateSlice> slices;
    for (const std::vector<RateSlice>& step : problem.slices)
      slices.insert(slices.end(), step.begin(), step.end());
    plan_bytes.append(slices.data(), slices.size());
    std::vector<UpdateSlice> updates;
    for (const std::vector<UpdateSlice>& step : problem.update_slices)
      updates.insert(updates.end(), step.begin(), step.end());
    updates_at = plan_bytes.append(updates.data(), updates.size());
  }

  /// The plan in device memory.
  DevicePlan view() {
    std::call_once(written,
                   [&] { on_device = std::make_shared<const DeviceBytes>(device, plan_bytes.bytes()); });
    const auto* bytes = static_cast<const unsigned char*>(on_device->start());
    return {reinterpret_cast<const ParameterInfo*>(bytes),
            reinterpret_cast<const RateInfo*>(bytes + rates_at),
            reinterpret_cast<const RateSlice*>(bytes + slices_at),
            reinterpret_cast<const UpdateSlice*>(bytes + updates_at),
            bytes + program_at,
            static_cast<int>(problem.graph.parameters.size()),
            static_cast<int>(problem.rate_tensors.size()),
            static_cast<int>(problem.slices[0].size()),
            program_length};
  }

  SpanOrder all_spans() const {
    return {static_cast<int>(problem.graph.parameters.size()), static_cast<int>(problem.rate_tensors.size()),
            takes_given(problem.operation), gives_per_task(problem.operation)};
  }

  static int64_t chunk(int64_t tasks, int64_t at_once) {
    return std::min({at_once, tasks, kMostTasksAtOnce});
  }
  int64_t chunk(const Call<T>& call) const { return chunk(call.tasks, call.at_once); }
  int64_t chunks(const Call<T>& call) const { return blocks_for(call.tasks, chunk(call)); }

  /// Elements of the workspace for one task: with the megakernel, only the result.
  int64_t task_stride() const {
    return executor != Executor::megakernel    ? layout.task_size
           : gives_gradient(problem.operation) ? whole_lines(problem.result_size)
                                               : 0;
  }
  static int64_t elements(int64_t bytes) { return whole_lines(bytes / static_cast<int64_t>(sizeof(T))); }
  int64_t spans_size(int64_t chunk_count) const {
    return elements(chunk_count * all_spans().count * static_cast<int64_t>(sizeof(Span)));
  }
  int64_t counters_size(int64_t chunk) const {
    return executor != Executor::megakernel
               ? elements(chunk * kStreams * kCounters * static_cast<int64_t>(sizeof(unsigned)))
               : 0;
  }
  int64_t workspace(int64_t tasks, int64_t at_once) const {
    const int64_t size = chunk(tasks, at_once);
    return spans_size(blocks_for(tasks, size)) + counters_size(size) + layout.shared_size +
           size * task_stride();
  }

  /// The memory of the call's first chunk, whose spans are at `table`. The others differ in their table.
  Memory memory(const Call<T>& call, const Span* table) const {
    T* counters = call.workspace + spans_size(chunks(call));
    T* shared = counters + counters_size(chunk(call));
    auto bytes = [](T* p) { return reinterpret_cast<unsigned char*>(p); };
    return {reinterpret_cast<const Table*>(table),
            bytes(shared),
            {bytes(shared + layout.shared_size), task_stride() * static_cast<int64_t>(sizeof(T))},
            reinterpret_cast<unsigned*>(counters)};
  }

  /// The spans of all chunks, one chunk after the other.
  std::vector<Span> spans(const Call<T>& call) const {
    const SpanOrder order = all_spans();
    std::vector<Span> all;
    const Memory workspace = memory(call, nullptr);
    const int64_t element = sizeof(T),
                  predictions =
                      problem.query.n ? problem.query.n * problem.query.values[problem.query.output].size : 0;
    const int64_t sets = problem.support_sets(), support = sets * problem.support.n;
    auto samples = [&](const Stage& s) { return s.n ? s.n * s.values[0].size * element : 0; };
    const Loss loss = problem.graph.loss;
    auto targets = [&](const Stage& s) {
      if (!s.n) return int64_t{0};
      return s.n * (takes_classes(loss) ? 8 : Target<T>::width(loss, target_columns(loss, s)) * element);
    };
    for (int64_t first = 0; first < call.tasks; first += chunk(call)) {
      auto span = [&](const void* start, int64_t stride) -> Span {
        auto* bytes = static_cast<unsigned char*>(const_cast<void*>(start));
        return {bytes ? bytes + first * stride : nullptr, stride};
      };
      auto push = [&](const void* start, int64_t stride) { all.push_back(span(start, stride)); };
      const size_t regions = all.size();
      all.resize(regions + static_cast<size_t>(Region::count));
      auto region = [&](Region r, const void* start, int64_t stride) {
        all[regions + static_cast<size_t>(r)] = span(start, stride);
      };
      region(Region::shared, workspace.shared, 0);
      region(Region::x_support, call.x_support, sets * samples(problem.support));
      region(Region::y_support, call.y_support.y, sets * targets(problem.support));
      region(Region::scale_support, call.y_support.scale, support * element);
      region(Region::old_log_probs_support, call.y_support.old_log_probs, support * element);
      region(Region::x_query, call.x_query, samples(problem.query));
      region(Region::y_query, call.y_query.y, targets(problem.query));
      region(Region::scale_query, call.y_query.scale, problem.query.n * element);
      region(Region::old_log_probs_query, call.y_query.old_log_probs, problem.query.n * element);
      region(Region::logits, call.logits, predictions * element);
      region(Region::support_losses, call.support_losses, problem.loss_columns() * element);
      region(Region::task_losses, call.task_losses, element);
      const bool cotangent = problem.operation == Operation::predict_backward;
      region(Region::cotangent, cotangent ? call.given[0] : nullptr, predictions * element);
      if (problem.data_size) region(Region::cotangent, call.data_gradient, problem.data_size * element);
      region(Region::task_weights, call.task_weights, element);
      region(Region::query_weights, call.query_weights, 0);
      region(Region::loss, call.loss, 0);
      region(Region::gradient, call.gradient, 0);
      all[regions + static_cast<size_t>(Region::random)] = {reinterpret_cast<unsigned char*>(call.seed),
                                                            first};
      all[regions + static_cast<size_t>(Region::task)] = workspace.task;  // the same for every chunk
      for (size_t i = 0; i < call.parameters.size(); ++i) {
        push(call.parameters[i], call.parameter_strides.empty() ? 0 : call.parameter_strides[i] * element);
      }
      for (const T* rate : call.rates) push(rate, 0);
      for (size_t i = 0; order.given < order.per_task && i < call.given.size(); ++i) {
        push(call.given[i], call.given_strides[i] * element);
      }
      for (size_t i = 0; order.per_task < order.count && i < call.per_task.size(); ++i) {
        push(call.per_task[i], problem.graph.parameters[i].size * element);
      }
    }
    return all;
  }

  /// Enqueues the call. Its spans are in device memory at `table`.
  void walk(const Call<T>& call, const DevicePlan& view, const Span* table,
            const std::vector<Span>* host_spans, cudaStream_t stream, const Branch* branch = nullptr) const {
    const SpanOrder order = all_spans();
    auto memory_of = [&](int64_t c) { return Deferred(memory(call, table + c * order.count)); };
    int64_t counters = chunk(call) * kStreams * kCounters;  // to be zeroed
    if (executor != Executor::megakernel) {
      const Launcher once{stream, 1, memory_of(0)};
      if (!at_own_parameters(problem.operation))
        pack_all(once, view, order.parameters, layout.theta, Region::shared, std::exchange(counters, 0));
      if (view.rate_count) {
        once("pack rates", pack_rates_kernel<T>, {8, view.rate_count}, kVectorThreads, 0, view, order.rates,
             place<T>(Region::shared, layout.rates), once.memory);
      }
    }
    for (int64_t c = 0; c < chunks(call); ++c) {
      const int64_t tasks = std::min(chunk(call), call.tasks - c * chunk(call));
      const Launcher launch{stream, tasks, memory_of(c), branch};
      if (executor == Executor::megakernel) {
        note([&] { return work_of_task; });
        const Span* from = host_spans->data() + c * order.count;
        Span* to = const_cast<Span*>(table) + c * order.count;
        if (mlp) launch_small_mlp<T>(launch, *mlp, from, order, to);
        if (!mlp) launch_megakernel<T>(launch, problem, layout, view, from, order, to);
      } else {
        run_batched(launch, view, order, std::exchange(counters, 0));
      }
      add_up(launch, call, view, c, reinterpret_cast<const Table*>(table));
    }
  }

  /// Packs the user's tensors; also zeroes so many counters.
  void pack_all(const Launcher& launch, const DevicePlan& view, int first_span, int64_t at, Region region,
                int64_t counters) const {
    note([&] { return traffic<T>(problem.packing.total, 2); });
    launch("pack", pack_kernel<T>, {8, view.parameter_count + (counters > 0)}, kVectorThreads, 0, view,
           first_span, place<T>(region, at), counters, launch.memory);
  }

  /// `counters`: how many are left to be zeroed, by the first launch.
  void run_batched(const Launcher& launch, const DevicePlan& view, const SpanOrder& order,
                   int64_t counters) const {
    if (at_own_parameters(problem.operation))
      pack_all(launch, view, order.parameters, layout.own, Region::task, std::exchange(counters, 0));
    if (takes_given(problem.operation)) pack_all(launch, view, order.given, layout.given, Region::task, 0);
    const T* rates = place<T>(Region::shared, layout.rates);
    if (executor == Executor::chunked) {
      const Task<T> task = symbolic_task<T>(problem, layout, false);
      const Chunked<T> backend(launch, problem, view, rates, *chain);
      TaskRunner<Chunked<T>, T>(backend, problem, task, place<T>(Region::task, layout.work)).run();
      backend.finish();
    } else {
      launch_program(launch, program, runs, problem, view, rates);
    }
    if (gives_per_task(problem.operation)) {
      launch("unpack", unpack_kernel<T>, {8, view.parameter_count}, kVectorThreads, 0, view, order.per_task,
             static_cast<const T*>(place<T>(Region::task, layout.out)), launch.memory);
    }
  }

  void add_up(const Launcher& launch, const Call<T>& call, const DevicePlan& view, int64_t c,
              const Table* first) const {
    if (!call.gradient && !call.loss) return;
    const double equal =
        problem.operation == Operation::adapt_backward ? 1.0 : 1.0 / static_cast<double>(call.tasks);
    const AddUp a{launch.tasks, call.tasks, layout.totals,        layout.result,
                  equal,        c == 0,     c + 1 == chunks(call)};
    const Launcher once{launch.stream, 1, launch.memory};
    note([&] { return traffic<T>(problem.result_size, static_cast<int>(launch.tasks) + 1); });
    int64_t largest = 1;
    for (const Parameter& p : problem.graph.parameters) largest = std::max(largest, p.size);
    for (const RateTensor& r : problem.rate_tensors) largest = std::max(largest, r.size);
    const int64_t blocks = std::min(blocks_for(largest, kSummed<T>), kMostSumBlocks);
    once("add up", add_up_kernel<T>, {blocks, view.parameter_count + view.rate_count + 1}, kReductionThreads,
         0, a, view, first, launch.memory);
  }
};

template <class T>
Runner<T>::Runner(const Problem& problem, int device) : state_(std::make_unique<State>(problem, device)) {}
template <class T>
Runner<T>::Runner(Runner&&) noexcept = default;
template <class T>
Runner<T>::~Runner() = default;

template <class T>
Executor Runner<T>::executor() const {
  return state_->executor;
}

template <class T>
int64_t Runner<T>::workspace(int64_t tasks, int64_t at_once) const {
  return state_->workspace(tasks, at_once);
}

template <class T>
void Runner<T>::run(const Call<T>& call, void* stream) const {
  const OnDevice on(state_->device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const DevicePlan view = state_->view();
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(cuda_stream, &capture), "asking whether the stream captures");
  if (capture != cudaStreamCaptureStatusNone) keep_forever(state_->on_device);
  const std::vector<Span> spans = state_->spans(call);
  auto* table = reinterpret_cast<Span*>(call.workspace);
  if (state_->executor != Executor::megakernel)
    send(cuda_stream, spans.data(), spans.size() * sizeof(Span), table);
  state_->walk(call, view, table, &spans, cuda_stream);
}

template <class T>
int64_t Runner<T>::table_bytes(const Call<T>& call) const {
  return state_->chunks(call) * state_->all_spans().count * static_cast<int64_t>(sizeof(Span));
}

template <class T>
CudaGraph Runner<T>::capture(const Call<T>& call, void* table) const {
  const OnDevice on(state_->device);
  const DevicePlan view = state_->view();
  const Capture capture;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(capture.stream, cudaStreamCaptureModeRelaxed), "beginning a graph");
  try {
    state_->walk(call, view, static_cast<const Span*>(table), nullptr, capture.stream, &capture.branch);
  } catch (...) {
    cudaStreamEndCapture(capture.stream, &graph);
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  cudaError_t status = cudaStreamEndCapture(capture.stream, &graph);
  if (status == cudaSuccess) status = cudaGraphInstantiate(&executable, graph, 0);
  if (graph) cudaGraphDestroy(graph);
  check(status, "capturing the call in a graph");
  return CudaGraph(executable, table);
}

template <class T>
void Runner<T>::run(const Call<T>& call, const CudaGraph& graph, void* stream) const {
  const OnDevice on(state_->device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const std::vector<Span> spans = state_->spans(call);
  const std::lock_guard alone(state_->replay);
  send(cuda_stream, spans.data(), spans.size() * sizeof(Span), graph.table());
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph.executable()), cuda_stream),
        "launching the graph");
}

CudaGraph::~CudaGraph() {
  if (executable_) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_));
}

template class Runner<float>;
template class Runner<double>;

}  // namespace maml::cuda
