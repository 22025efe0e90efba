// One call on the CPU: parameters are packed into the layers' layout, threads share the tasks, results are
// added up in order of tasks, and the gradient is returned in the user's layout.
//
// One thread runs a task from beginning to end: alone, or, for small networks, together with others in the
// lanes of vectors (tasks_in_lanes.h). Where the last large tasks would leave most threads idle, these tasks
// run one after the other, and all threads share each pass (share.h). The sums within a task do not depend on
// other tasks. The sum over tasks is computed in double, task by task within a group and group by group, wave
// after wave. So the bits depend neither on the number of threads nor on the other tasks of a batch.
// Cross-core reads are slow, so a group reads the packed parameters and writes only its sum.
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <utility>

#include "cpu/layers.h"
#include "cpu/run/backend.h"
#include "cpu/run/share.h"
#include "cpu/run/tasks_in_lanes.h"
#include "meta_gradient.h"

namespace maml::MAML_ISA {

Footprint footprint(const Layer& layer) {
  using Of = Footprint (*)(const Layer&);
  static constexpr auto table = for_each_kind([&]<Kind K>() -> Of {
    if constexpr (Declaration<K>::on_cpu) return Implementation<K>::footprint;
    return nullptr;
  });
  return table[static_cast<size_t>(layer.kind)](layer);
}

namespace {

template <class T>
struct Cpu : Updates<T, T> {
  void forward(const Layer& l, const Tensors<T>& t) const { passes_of<T>(l.kind).forward(l, t); }
  void backward(const Layer& l, const Tensors<T>& t) const { passes_of<T>(l.kind).backward(l, t); }
  void forward_tangent(const Layer& l, const Tensors<T>& t) const {
    passes_of<T>(l.kind).forward_tangent(l, t);
  }
  void backward_tangent(const Layer& l, const Tensors<T>& t) const {
    passes_of<T>(l.kind).backward_tangent(l, t);
  }

  void loss(const LossPart& part, const T* z, const Target<T>& target, T* value, T* grad_z, T* saved) const {
    const T loss = loss_passes<T>(part.kind).value(part, z, target, grad_z, saved);
    if (value) *value = part.add ? *value + loss : loss;
  }
  void loss_tangent(const LossPart& part, const T* z, const Target<T>& target, const T* z_dot, const T* saved,
                    T* grad_z_dot) const {
    loss_passes<T>(part.kind).tangent(part, z, target, z_dot, saved, grad_z_dot);
  }
  void metric(const LossPart& part, const T* z, const Target<T>& target, const T* z_dot, T* grad_z) const {
    loss_passes<T>(part.kind).metric(part, z, target, z_dot, grad_z);
  }
};

/// Converts between the user's weights [rows, columns, taps] and the layers' [taps, columns, rows]. Other
/// parameters have the same layout in both.
template <class From, class To>
void pack(const Parameter& p, const From* user, To* packed) {
  const int64_t columns = p.size / (p.rows * p.taps);
  for (int64_t o = 0; o < p.rows; ++o) {
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t t = 0; t < p.taps; ++t) packed[(t * columns + i) * p.rows + o] = static_cast<To>(*user++);
    }
  }
}
template <class From, class To>
void unpack(const Parameter& p, const From* packed, To* user) {
  const int64_t columns = p.size / (p.rows * p.taps);
  for (int64_t o = 0; o < p.rows; ++o) {
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t t = 0; t < p.taps; ++t) *user++ = static_cast<To>(packed[(t * columns + i) * p.rows + o]);
    }
  }
}

/// Multiply-adds below which one thread does it all: these take some 50 us, as long as waking a second
/// thread.
constexpr int64_t kWorkOfOneThread = 1'000'000;

/// Multiply-adds of a task above which it pays that the threads share its passes and meet after each.
constexpr int64_t kWorkOfATeam = 10'000'000;

/// The most bytes of a group of tasks in lanes, so that they fit a cache.
constexpr int64_t kLaneBytes = int64_t{8} << 20;

/// The layout of a call's workspace: the part that all threads share, then a part for each thread.
template <class T>
struct WorkspaceLayout {
  static constexpr int64_t W = kLanes<T>;
  int64_t tasks, shared = 0, thread = 0;
  bool lanes;
  int64_t wave;         // tasks that are computed before their results are added up
  int64_t sums, alone;  // the most groups in lanes, and the most tasks outside of them, in a wave

  WorkspaceLayout(const Problem& p, int64_t tasks_) : tasks(tasks_) {
    const int64_t in_lanes = W * lane_size(p);
    lanes = p.runs_in_lanes() && p.operation != Operation::kept_fisher && few_lanes(tasks) &&
            in_lanes * static_cast<int64_t>(sizeof(T)) <= kLaneBytes;
    wave = std::min(tasks, lanes ? W * cpu::kWave : cpu::kWave);
    sums = lanes ? (wave + W - 1) / W : 0;
    alone = lanes ? (W - 1) / 3 : wave;
    // Totals and sums are doubles: at most two elements of T each. 16: room to align the start to a cache
    // line.
    shared = 16 + p.packing.total + p.rates_size + (alone + 2 * sums + 2) * p.result_size;
    thread = p.task_size() + 3 * p.packing.total;
    if (lanes) thread = std::max(thread, in_lanes);
  }
  /// Whether so many tasks justify a vector, which takes as long as a third of its lanes as single tasks.
  static bool few_lanes(int64_t tasks) { return 3 * tasks >= kLanes<T>; }

  /// Vectors of a group: its parameters, the given and the returned ones, data, losses, and the tasks'
  /// workspace.
  static int64_t lane_size(const Problem& p) {
    return 3 * p.packing.total + p.result_size + whole_lines(predictions(p.query)) +
           whole_lines(p.support_sets() * samples(p.support)) + whole_lines(samples(p.query)) +
           whole_lines(p.loss_columns() + 1) + whole_lines(p.packing.total / kLanes<T> + 1) +
           loss_scratch(p) + targets(p) + whole_lines(p.data_size) + p.task_size();
  }
  static int64_t loss_scratch(const Problem& p) {
    return whole_lines(3 * std::max(predictions(p.support), predictions(p.query)) / kLanes<T> + 1);
  }
  /// Vectors of the targets of a task's support sets, where it has several.
  static int64_t targets(const Problem& p) {
    const int64_t sets = p.support_sets(), size = sizeof(LaneTargets<T>) / sizeof(Vector<T>) + 1;
    return sets > 1 ? whole_lines(sets * size) : 0;
  }
  static int64_t samples(const Stage& s) { return s.n ? s.n * s.values[0].size : 0; }
  static int64_t predictions(const Stage& s) { return s.n ? s.n * s.values[s.output].size : 0; }

  int64_t size(int64_t at_once) const { return shared + std::min(at_once, tasks) * thread; }
};

/// Workspaces smaller than this get no advice: it costs some 40 us a call.
constexpr int64_t kLargeWorkspace = int64_t{8} << 20;

/// madvise() for the huge pages (2 MB) that lie entirely in a workspace; only on Linux.
void advise([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes, [[maybe_unused]] int advice) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (bytes < kLargeWorkspace) return;
  const auto start = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) / kHuge * kHuge;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, advice);
#endif
}

/// Large workspaces use huge pages where possible: with pages of 4 KB, page faults cost up to a quarter of a
/// call. The caller keeps the workspace for its next call. Between calls the system may take the pages if
/// memory runs short (MADV_FREE). Not released unconditionally: clearing fresh pages, and compaction to make
/// room for huge ones, has cost as much as a whole call.
#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)
constexpr int kInUse = MADV_HUGEPAGE, kToSpare = MADV_FREE;
#else
constexpr int kInUse = 0, kToSpare = 0;  // no advice
#endif

template <class T>
class Run {
  using V = Vector<T>;
  static constexpr int64_t W = kLanes<T>;

 public:
  Run(const Problem& problem, const Call<T>& call) : p_(problem), call_(call), layout_(problem, call.tasks) {
    advise(call.workspace, bytes(), kInUse);
    const int64_t kept = call.kept * problem.task_size() * static_cast<int64_t>(sizeof(T));
    if (!call.prepared) advise(call.state, kept, kInUse);
    // Vectors are aligned to cache lines.
    T* at = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(call.workspace) + 63) / 64 * 64);
    auto take = [&](int64_t size) { return std::exchange(at, at + size); };
    theta_ = take(p_.packing.total);
    rates_ = take(p_.rates_size);
    results_ = take(layout_.alone * p_.result_size);
    sums_ = reinterpret_cast<double*>(take(2 * layout_.sums * p_.result_size));
    totals_ = reinterpret_cast<double*>(take(2 * p_.result_size));
    const bool small = call.tasks * p_.work < kWorkOfOneThread;
    threads_ = small ? 1 : static_cast<int>(std::min<int64_t>(call.at_once, call.tasks));
    thread_memory_ = at;
  }

  void operator()() {
    if (shared_parameters()) pack_all(call_.parameters, {}, 0, theta_);
    pack_rates();
    const bool adds_up = call_.gradient != nullptr;
    if (adds_up) std::fill_n(totals_, p_.result_size, 0.0);
    for (int64_t wave = 0; wave < call_.tasks; wave += layout_.wave) {
      const int64_t end = std::min(call_.tasks, wave + layout_.wave);
      const int64_t groups =
          layout_.lanes ? (end - wave + (WorkspaceLayout<T>::few_lanes((end - wave) % W) ? W - 1 : 0)) / W
                        : 0;
      const int64_t alone = std::min(end, wave + groups * W), units = groups + end - alone;
      auto run_unit = [&](int64_t u) {
        T* memory = thread_memory_ + omp_get_thread_num() * layout_.thread;
        if (u < groups) {
          const int64_t first = wave + u * W;
          run_lanes(first, std::min(W, end - first), u, memory);
        } else {
          run_task(alone + u - groups, u - groups, memory);
        }
      };
      const int64_t shared = shared_units(units), whole = units - shared;
      if (threads_ > 1 && whole > 1) {
#pragma omp parallel for schedule(dynamic) num_threads(threads_)
        for (int64_t u = 0; u < whole; ++u) run_unit(u);
      } else {
        for (int64_t u = 0; u < whole; ++u) run_unit(u);
      }
      const SharingThreads sharing(call_.at_once);
      for (int64_t u = whole; u < units; ++u) run_unit(u);
      if (adds_up) add_up(groups, alone, end);
    }
    if (adds_up) hand_back_gradient();
    if (call_.loss) {
      double loss = 0;
      for (int64_t t = 0; t < call_.tasks; ++t) loss += weight(t) * static_cast<double>(call_.task_losses[t]);
      *call_.loss = static_cast<T>(loss);
    }
    advise(call_.workspace, bytes(), kToSpare);
  }

 private:
  /// How many of a wave's units are shared by all threads: those of a last round that would leave at least
  /// half of the threads without one.
  int64_t shared_units(int64_t units) const {
    if (layout_.lanes || p_.work < kWorkOfATeam) return 0;
    const int64_t left = units % call_.at_once;
    return 2 * left <= call_.at_once ? left : 0;
  }

  int64_t bytes() const { return layout_.size(call_.at_once) * static_cast<int64_t>(sizeof(T)); }
  bool shared_parameters() const { return call_.parameter_strides.empty(); }

  double weight(int64_t t) const {
    if (call_.task_weights) return static_cast<double>(call_.task_weights[t]);
    return p_.operation == Operation::adapt_backward ? 1.0 : 1.0 / static_cast<double>(call_.tasks);
  }

  void pack_all(const std::vector<const T*>& user, const std::vector<int64_t>& strides, int64_t task,
                T* packed) const {
    for (size_t i = 0; i < user.size(); ++i) {
      const Parameter& parameter = p_.graph.parameters[i];
      T* to = packed + p_.packing.at[i];
      if (user[i]) {
        pack(parameter, user[i] + (strides.empty() ? 0 : task * strides[i]), to);
      } else {
        std::fill_n(to, parameter.size, T(0));
      }
    }
  }

  void pack_rates() const {
    for (size_t i = 0; i < p_.rate_tensors.size(); ++i) {
      const RateTensor& rate = p_.rate_tensors[i];
      T* to = rates_ + p_.rate_at[i];
      if (rate.parameter < 0) {
        std::copy_n(call_.rates[i], rate.size, to);
        continue;
      }
      const Parameter& parameter = p_.graph.parameters[rate.parameter];
      for (int64_t s = 0; s < rate.size; s += parameter.size) pack(parameter, call_.rates[i] + s, to + s);
    }
  }

  /// The t-th set of samples, and what their loss compares.
  const T* x_of(const Stage& s, const T* x, int64_t t) const {
    return x ? x + t * WorkspaceLayout<T>::samples(s) : nullptr;
  }
  Target<T> target_of(const Stage& s, const Target<T>& of_all, int64_t t) const {
    return s.n ? of_all.from(p_.graph.loss, target_columns(p_.graph.loss, s), t * s.n) : Target<T>{};
  }
  int64_t predictions() const { return WorkspaceLayout<T>::predictions(p_.query); }

  void run_task(int64_t t, int64_t slot, T* at) const {
    auto take = [&](int64_t size) { return std::exchange(at, at + size); };
    T* own = take(p_.packing.total);
    T* given = take(p_.packing.total);
    T* out = take(p_.packing.total);
    Task<T> task{};
    task.theta = theta_;
    if (!shared_parameters()) {
      pack_all(call_.parameters, call_.parameter_strides, t, own);
      task.theta = own;
    }
    task.x_support = x_of(p_.support, call_.x_support, t * p_.support_sets());
    task.y_support = target_of(p_.support, call_.y_support, t * p_.support_sets());
    task.x_query = x_of(p_.query, call_.x_query, t);
    task.y_query = target_of(p_.query, call_.y_query, t);
    const int64_t sets = p_.support_sets();
    task.support_counts = call_.support_counts ? call_.support_counts + t * sets : nullptr;
    task.query_count = call_.query_counts ? call_.query_counts + t : nullptr;
    task.support_losses = call_.support_losses ? call_.support_losses + t * p_.loss_columns() : nullptr;
    task.query_loss = call_.task_losses ? call_.task_losses + t : nullptr;
    task.logits = call_.logits ? call_.logits + t * predictions() : nullptr;
    task.data_gradient = call_.data_gradient ? call_.data_gradient + t * p_.data_size : nullptr;
    task.result = call_.gradient ? results_ + slot * p_.result_size : out;
    task.adapted = out;
    if (p_.operation == Operation::predict_backward) {
      task.given = call_.given[0] + t * predictions();
    } else if (!call_.given.empty()) {
      pack_all(call_.given, call_.given_strides, t, given);
      task.given = given;
    }
    task.stream = {call_.seed, static_cast<uint32_t>(t), static_cast<uint32_t>(2 * call_.first_step)};
    const bool kept = t < call_.kept;
    task.prepared = kept && call_.prepared;
    if (kept) at = call_.state + t * p_.task_size();
    const Cpu<T> backend{{{rates_}, call_.query_weights}};
    TaskRunner<Cpu<T>, T>(backend, p_, task, at).run();
    hand_back_task(out, t);
  }

  /// Runs tasks [first, first + count) in lanes; lanes beyond them repeat the last task. Padding is computed
  /// like any sample, with the scale 0: no layer in lanes combines samples.
  void run_lanes(int64_t first, int64_t count, int64_t group, T* memory) const {
    using Tasks = TasksInLanes<T>;
    V* at = reinterpret_cast<V*>(memory);
    auto take = [&](int64_t size) { return std::exchange(at, at + size); };
    auto each_lane = [&](auto f) {
      for (int64_t lane = 0; lane < W; ++lane) f(lane, first + std::min(lane, count - 1));
    };
    V *own = take(p_.packing.total), *given = take(p_.packing.total), *out = take(p_.packing.total);
    V *result = take(p_.result_size), *logits = take(whole_lines(predictions()));
    const int64_t sets = p_.support_sets(), support_size = sets * WorkspaceLayout<T>::samples(p_.support);
    V* x[2] = {take(whole_lines(support_size)), take(whole_lines(WorkspaceLayout<T>::samples(p_.query)))};
    V* losses = take(whole_lines(p_.loss_columns() + 1));
    V* data_gradient = std::fill_n(take(whole_lines(p_.data_size)), p_.data_size, V{}) - p_.data_size;
    T* packed = reinterpret_cast<T*>(take(whole_lines(p_.packing.total / W + 1)));
    T* loss_scratch = reinterpret_cast<T*>(take(WorkspaceLayout<T>::loss_scratch(p_)));
    LaneTargets<T> one[2];
    LaneTargets<T>* targets[2] = {one, one + 1};
    if (sets > 1) targets[0] = reinterpret_cast<LaneTargets<T>*>(take(WorkspaceLayout<T>::targets(p_)));
    each_lane([&](int64_t lane, int64_t t) {
      if (call_.x_support) Tasks::give(support_size, x_of(p_.support, call_.x_support, t * sets), lane, x[0]);
      if (call_.x_query)
        Tasks::give(WorkspaceLayout<T>::samples(p_.query), x_of(p_.query, call_.x_query, t), lane, x[1]);
      for (int64_t set = 0; set < sets; ++set)
        targets[0][set].of[lane] = target_of(p_.support, call_.y_support, t * sets + set);
      targets[1]->of[lane] = target_of(p_.query, call_.y_query, t);
      if (!shared_parameters()) {
        pack_all(call_.parameters, call_.parameter_strides, t, packed);
        Tasks::give(p_.packing.total, packed, lane, own);
      }
      if (p_.operation == Operation::predict_backward) {
        Tasks::give(predictions(), call_.given[0] + t * predictions(), lane, logits);
      } else if (!call_.given.empty()) {
        pack_all(call_.given, call_.given_strides, t, packed);
        Tasks::give(p_.packing.total, packed, lane, given);
      }
    });
    if (shared_parameters()) {
      for (int64_t i = 0; i < p_.packing.total; ++i) own[i] = broadcast(theta_[i]);
    }
    Task<V> task{};
    task.theta = own;
    task.x_support = x[0];
    task.y_support = {targets[0]};
    task.x_query = x[1];
    task.y_query = {targets[1]};
    task.support_losses = losses;
    task.query_loss = losses + p_.loss_columns();
    task.logits = logits;
    task.data_gradient = data_gradient;
    task.result = call_.gradient ? result : out;
    task.given = p_.operation == Operation::predict_backward ? logits : given;
    task.adapted = out;
    const Tasks backend(rates_, call_.query_weights, loss_scratch);
    TaskRunner<Tasks, V>(backend, p_, task, at).run();
    if (call_.gradient) {
      double weights[W];
      for (int64_t lane = 0; lane < count; ++lane) weights[lane] = weight(first + lane);
      Tasks::add_up(p_.result_size, result, count, weights, sums_ + group * p_.result_size);
    }
    T* each = reinterpret_cast<T*>(given);  // `given` is not needed any more
    if (!call_.per_task.empty()) Tasks::separate(p_.packing.total, out, each);
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t t = first + lane;
      const int64_t columns = p_.loss_columns();
      if (call_.support_losses) Tasks::take(columns, losses, lane, call_.support_losses + t * columns);
      if (call_.task_losses) call_.task_losses[t] = losses[columns][lane];
      if (call_.logits) Tasks::take(predictions(), logits, lane, call_.logits + t * predictions());
      if (call_.data_gradient)
        Tasks::take(p_.data_size, data_gradient, lane, call_.data_gradient + t * p_.data_size);
      hand_back_task(each + lane * p_.packing.total, t);
    }
  }

  /// Writes a task's outputs that have the shapes of the parameters, for those that the call wants.
  void hand_back_task(const T* out, int64_t t) const {
    for (size_t i = 0; i < call_.per_task.size(); ++i) {
      const Parameter& parameter = p_.graph.parameters[i];
      if (call_.per_task[i])
        unpack(parameter, out + p_.packing.at[i], call_.per_task[i] + t * parameter.size);
    }
  }

  /// Adds a wave to the totals: the sums of its groups, then tasks [alone, end).
  void add_up(int64_t groups, int64_t alone, int64_t end) const {
    for (int64_t g = 0; g < groups; ++g) {
      const double* sum = sums_ + g * p_.result_size;
      for (int64_t i = 0; i < p_.result_size; ++i) totals_[i] += sum[i];
    }
    for (int64_t t = alone; t < end; ++t) {
      const double w = weight(t);
      const T* result = results_ + (t - alone) * p_.result_size;
      for (int64_t i = 0; i < p_.result_size; ++i) totals_[i] += w * static_cast<double>(result[i]);
    }
  }

  /// Writes the gradient: the trainable parameters in the user's order, then the learned rates.
  void hand_back_gradient() const {
    T* to = call_.gradient;
    for (size_t i = 0; i < p_.graph.parameters.size(); ++i) {
      const Parameter& parameter = p_.graph.parameters[i];
      if (parameter.role == Role::frozen) continue;
      unpack(parameter, totals_ + p_.packing.at[i], to);
      to += parameter.size;
    }
    for (size_t i = 0; i < p_.rate_tensors.size(); ++i) {
      const RateTensor& rate = p_.rate_tensors[i];
      if (!rate.learned) continue;
      const double* from = totals_ + p_.rate_grad_at[i];
      if (rate.parameter < 0) {
        for (int64_t j = 0; j < rate.size; ++j) to[j] = static_cast<T>(from[j]);
      } else {
        const Parameter& parameter = p_.graph.parameters[rate.parameter];
        for (int64_t s = 0; s < rate.size; s += parameter.size) unpack(parameter, from + s, to + s);
      }
      to += rate.size;
    }
  }

  const Problem& p_;
  const Call<T>& call_;
  const WorkspaceLayout<T> layout_;
  double *totals_, *sums_;
  T *theta_, *rates_, *results_, *thread_memory_;
  int threads_;
};

}  // namespace

int64_t workspace_float(const Problem& p, int64_t tasks, int64_t at_once) {
  return WorkspaceLayout<float>(p, tasks).size(at_once);
}
int64_t workspace_double(const Problem& p, int64_t tasks, int64_t at_once) {
  return WorkspaceLayout<double>(p, tasks).size(at_once);
}
void run_float(const Problem& problem, const Call<float>& call) { Run<float>(problem, call)(); }
void run_double(const Problem& problem, const Call<double>& call) { Run<double>(problem, call)(); }

}  // namespace maml::MAML_ISA
