// Runs a CUDA layer's four passes for several tasks and compares every output with its reference. Outputs,
// scratch and the gaps between tensors start as NaN.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/layers.h"
#include "cuda/product/statistics_entries.h"
#include "cuda/run/small_run.h"
#include "emulation.h"
#include "layer_references.h"
#include "layers/registry.h"
#include "memory.h"

namespace maml::cuda {

inline int failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("WRONG: %s\n", what.c_str());
}

constexpr int64_t kGap = 16;  // the fewest NaN elements after every tensor

inline int64_t whole(int64_t elements) { return (elements + kGap - 1) / kGap * kGap; }

inline int64_t misaligned = 0;  // how many elements behind an aligned address all tensors start

/// Memory of all tasks, addressed symbolically. Every element is NaN until it is written.
template <class T>
class TestMemory {
 public:
  TestMemory(int64_t tasks, int64_t elements)
      : tasks_(tasks),
        stride_(whole(elements + misaligned)),
        store_(tasks * stride_, std::numeric_limits<T>::quiet_NaN()) {
    table_.regions[static_cast<int>(Region::task)] = {reinterpret_cast<unsigned char*>(store_.data()),
                                                      stride_ * static_cast<int64_t>(sizeof(T))};
  }
  void draw_from(uint64_t seed, int64_t first_task) {
    table_.regions[static_cast<int>(Region::random)] = {reinterpret_cast<unsigned char*>(seed), first_task};
  }
  T* take(int64_t elements) {
    T* at = place<T>(Region::task, used_);
    gaps_.push_back(used_ + elements);
    used_ += whole(elements) + kGap;
    if (used_ > stride_) std::abort();
    return at;
  }
  T* real(T* symbolic, int64_t task) { return resolve(symbolic, memory_of(table_).memory(), task); }
  void fill(T* symbolic, int64_t task, const std::vector<double>& values) {
    T* to = real(symbolic, task);
    for (size_t i = 0; i < values.size(); ++i) to[i] = static_cast<T>(values[i]);
  }
  void poison(T* symbolic, int64_t elements) {
    for (int64_t t = 0; t < tasks_; ++t) {
      std::fill_n(real(symbolic, t), elements, std::numeric_limits<T>::quiet_NaN());
    }
  }
  bool gaps_untouched() const {
    for (int64_t t = 0; t < tasks_; ++t) {
      for (const int64_t gap : gaps_) {
        for (int64_t i = 0; i < kGap; ++i) {
          if (!std::isnan(store_[t * stride_ + gap + i])) return false;
        }
      }
    }
    return true;
  }
  Launcher launcher() const { return {nullptr, tasks_, memory_of(table_)}; }

 private:
  int64_t tasks_, stride_, used_ = misaligned;
  std::vector<T> store_;
  std::vector<int64_t> gaps_;
  Table table_{};
};

/// Which of a layer's tensors are present.
struct Present {
  bool gamma = true, beta = true;  // parameters
  bool x_dot = true, gamma_dot = true, beta_dot = true;
  bool grad_x = true, grad_gamma = true, grad_beta = true;
  bool add = false;         // gradients are added to the values already there
  bool statistics = false;  // a convolution has already computed the statistics
  bool second_dot = true;   // Kind::add: the tangent of the second input
};

inline std::string text_of(const Layer& l, const Present& p) {
  auto n = [](int64_t v) { return std::to_string(v); };
  const Window& k = l.window;
  std::string text = std::string(properties(l.kind).name) + " n " + n(l.n) + " in " + n(l.in.c) + "x" +
                     n(l.in.h) + "x" + n(l.in.w) + " out " + n(l.out.h) + "x" + n(l.out.w) + " window " +
                     n(k.kernel_h) + "x" + n(k.kernel_w) + "/" + n(k.stride_h) + "x" + n(k.stride_w) +
                     " pad " + n(k.pad_top) + "," + n(k.pad_left) + " f " + n(static_cast<int>(l.function)) +
                     (l.groups > 1 ? " groups " + n(l.groups) : "") + (l.pooled ? " pooled" : "");
  const bool flags[] = {p.gamma,      p.beta,      p.x_dot, p.gamma_dot,  p.beta_dot,  p.grad_x,
                        p.grad_gamma, p.grad_beta, p.add,   p.statistics, p.second_dot};
  text += " present ";
  for (const bool flag : flags) text += flag ? '1' : '0';
  return text;
}

inline std::vector<double> random_values(std::mt19937& rng, int64_t count) {
  std::normal_distribution<double> normal;
  std::vector<double> values(count);
  for (double& v : values) v = normal(rng);
  return values;
}

/// The entries [tiles, 2 or 3, c] that a convolution would compute of a (and b), folded ones included.
inline std::vector<double> tile_moments(int64_t m, int64_t c, const std::vector<double>& a,
                                        const std::vector<double>* b) {
  std::vector<double> entries;
  const StatisticsEntries of = statistics_entries(m, c);
  for (int64_t first = 0; first < m; first += kStatisticsRows) {
    const bool folded = first % of.rows == 0;
    const int64_t last = std::min<int64_t>(m, first + (folded ? of.rows : kStatisticsRows));
    std::vector<double> mean_a(c), mean_b(c), product(c);
    const std::vector<double>& other = b ? *b : a;
    for (int64_t ch = 0; ch < c; ++ch) {
      for (int64_t i = first; i < last; ++i) {
        mean_a[ch] += a[i * c + ch] / static_cast<double>(last - first);
        mean_b[ch] += other[i * c + ch] / static_cast<double>(last - first);
      }
      for (int64_t i = first; i < last; ++i) {
        product[ch] += (a[i * c + ch] - mean_a[ch]) * (other[i * c + ch] - mean_b[ch]);
      }
    }
    entries.insert(entries.end(), mean_a.begin(), mean_a.end());
    if (b) entries.insert(entries.end(), mean_b.begin(), mean_b.end());
    entries.insert(entries.end(), product.begin(), product.end());
  }
  return entries;
}

inline double worst = 0;  // the largest error relative to its tolerance, over all comparisons

template <class T>
void compare(const T* got, const std::vector<double>& want, double tolerance, const std::string& what) {
  double scale = 1, error = 0;
  for (const double w : want) scale = std::max(scale, std::fabs(w));
  for (size_t i = 0; i < want.size(); ++i) {
    const double e = std::fabs(static_cast<double>(got[i]) - want[i]) / scale;
    error = e <= error ? error : std::isnan(e) ? std::numeric_limits<double>::infinity() : e;
  }
  worst = std::max(worst, error / tolerance);
  expect(error <= tolerance, what + ": error " + std::to_string(error / tolerance) + " of the tolerance");
}

inline std::vector<double> part(const std::vector<Dual<double>>& from, bool dot) {
  std::vector<double> to;
  for (const auto& v : from) to.push_back(dot ? v.d : v.v);
  return to;
}

inline std::vector<Dual<double>> dual(const std::vector<double>& v, const std::vector<double>& d,
                                      bool moves) {
  std::vector<Dual<double>> to;
  for (size_t i = 0; i < v.size(); ++i) to.emplace_back(v[i], moves ? d[i] : 0.0);
  return to;
}

/// <g, y_dot> = <grad_x, x_dot> + <grad_w, w_dot>
inline bool is_adjoint(const Values<Dual<double>>& v) {
  double left = 0, right = 0, scale = 1;
  auto add_product = [&](const auto& a, const auto& b, double& sum) {
    for (size_t i = 0; i < a.size(); ++i) sum += a[i].v * b[i].d, scale += std::fabs(a[i].v * b[i].d);
  };
  add_product(v.g, v.y, left);
  for (int j = 0; j < 2; ++j) {
    add_product(v.grad_x[j], v.x[j], right);
    if (!v.w[j].empty()) add_product(v.grad_w[j], v.w[j], right);
  }
  return std::fabs(left - right) <= 1e-12 * scale;
}

/// Which code computes the passes: the kind's kernels; a block that interprets a program (small_run.h); or
/// blocks that share the first instruction of a program, a forward pass, after which a copy is the second.
enum class By { kernels, one_block, blocks };

/// Runs all passes for `tasks` tasks, compares every output with the reference, and returns the bits of all
/// outputs.
template <class T>
std::vector<T> check_passes(By by, const Layer& l, const Present& p, int64_t tasks, unsigned seed) {
  const std::string name = text_of(l, p) + (sizeof(T) == 4 ? " float" : " double") +
                           (by == By::one_block ? " by one block"
                            : by == By::blocks  ? " by blocks of a run"
                                                : "");
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  const bool normalises = l.kind == Kind::batch_norm || l.kind == Kind::running_norm ||
                          l.kind == Kind::group_norm || l.kind == Kind::norm_block;
  const int inputs = l.kind == Kind::add ? 2 : 1, parameters = normalises ? 2 : 0;
  const bool has[2] = {p.gamma, p.beta};
  const bool x_moves[2] = {p.x_dot, p.second_dot};
  const bool w_moves[2] = {p.gamma && p.gamma_dot, p.beta && p.beta_dot};
  const bool w_wanted[2] = {p.gamma && p.grad_gamma, p.beta && p.grad_beta};
  const bool moves = p.x_dot || (inputs == 2 && p.second_dot) || (normalises && (w_moves[0] || w_moves[1]));
  const int64_t in = count_in(l), out = count_out(l), c = l.in.c;
  const Footprint needs = footprint(l);
  const int64_t tiles = (rows_in(l) + kStatisticsRows - 1) / kStatisticsRows;

  TestMemory<T> memory(tasks, 12 * in + 10 * out + 16 * c + needs.saved + needs.saved_dot + needs.scratch +
                                  5 * tiles * c + 60 * kGap);
  Tensors<T> all;
  for (int j = 0; j < inputs; ++j) {
    all.x[j] = memory.take(in);
    all.grad_x[j] = p.grad_x ? memory.take(in) : nullptr;
    all.x_dot[j] = x_moves[j] ? memory.take(in) : nullptr;
    all.grad_x_dot[j] = p.grad_x ? memory.take(in) : nullptr;
    all.add_x[j] = p.add;
  }
  for (int j = 0; j < parameters; ++j) {
    all.w[j] = has[j] ? memory.take(c) : nullptr;
    all.w_dot[j] = w_moves[j] ? memory.take(c) : nullptr;
    all.grad_w[j] = w_wanted[j] ? memory.take(c) : nullptr;
    all.grad_w_dot[j] = w_wanted[j] ? memory.take(c) : nullptr;
    all.add_w[j] = p.add;
  }
  if (l.kind == Kind::running_norm) all.w[2] = memory.take(c), all.w[3] = memory.take(c);
  all.y = memory.take(out);
  all.grad_y = memory.take(out);
  all.y_dot = memory.take(out);
  all.grad_y_dot = memory.take(out);
  all.saved = memory.take(needs.saved);
  all.saved_dot = memory.take(needs.saved_dot);
  all.scratch = memory.take(needs.scratch);
  T *const copied = memory.take(out), *const copied_dot = memory.take(out);
  if (p.statistics) {
    all.statistics = memory.take(2 * tiles * c);
    if (p.x_dot) all.statistics_dot = memory.take(3 * tiles * c);
  }

  std::mt19937 rng(seed);
  std::vector<Values<Dual<double>>> truth(tasks);
  const double held = 0.75;  // the value that gradients are added to
  auto input = [&](const T* symbolic, int64_t task, int64_t count) {
    auto values = random_values(rng, count);
    for (double& v : values) v = static_cast<double>(static_cast<T>(v));
    if (symbolic) memory.fill(const_cast<T*>(symbolic), task, values);
    return values;
  };
  for (int64_t task = 0; task < tasks; ++task) {
    Values<Dual<double>>& v = truth[task];
    std::vector<double> x0, x0_dot;
    for (int j = 0; j < inputs; ++j) {
      const auto x = input(all.x[j], task, in), x_dot = input(all.x_dot[j], task, in);
      v.x[j] = dual(x, x_dot, x_moves[j]);
      if (j == 0) x0 = x, x0_dot = x_dot;
    }
    for (int j = 0; j < parameters; ++j) {
      const auto w = input(all.w[j], task, c), w_dot = input(all.w_dot[j], task, c);
      if (has[j]) v.w[j] = dual(w, w_dot, w_moves[j]);
    }
    if (l.kind == Kind::running_norm) {
      std::vector<double> mean(c), var(c);
      for (int64_t ch = 0; ch < c; ++ch) mean[ch] = running_mean(ch), var[ch] = running_var(ch);
      memory.fill(const_cast<T*>(all.w[2]), task, mean);
      memory.fill(const_cast<T*>(all.w[3]), task, var);
    }
    const auto g = input(all.grad_y, task, out), g_dot = input(all.grad_y_dot, task, out);
    v.g = dual(g, g_dot, true);
    reference(l, v);
    expect(is_adjoint(v), name + ": the reference's backward pass is not the adjoint of its tangent");
    if (all.statistics) memory.fill(all.statistics, task, tile_moments(rows_in(l), c, x0, nullptr));
    if (all.statistics_dot) memory.fill(all.statistics_dot, task, tile_moments(rows_in(l), c, x0, &x0_dot));
    if (p.add) {
      for (T* to : {all.grad_x[0], all.grad_x[1], all.grad_x_dot[0], all.grad_x_dot[1]}) {
        if (to) memory.fill(to, task, std::vector<double>(in, held));
      }
      for (T* to : {all.grad_w[0], all.grad_w[1], all.grad_w_dot[0], all.grad_w_dot[1]}) {
        if (to) memory.fill(to, task, std::vector<double>(c, held));
      }
    }
  }

  // Each pass gets the tensors that the algorithm would give it, and no others.
  const Launcher launch = memory.launcher();
  auto run = [&](Op op, const Tensors<T>& tensors) {
    memory.poison(all.scratch, needs.scratch);
    if (by != By::kernels) {
      Instruction<T> instructions[2]{};
      instructions[0].tensors = tensors, instructions[0].layer = l, instructions[0].op = op;
      Tensors<T>& copy = instructions[1].tensors;
      instructions[1].op = Op::copy, instructions[1].size = out;
      if (op == Op::forward) copy.x[0] = tensors.y, copy.y = copied;
      if (op == Op::forward_tangent) copy.x[0] = tensors.y_dot, copy.y = copied_dot;
      DevicePlan plan{};
      plan.program = instructions;
      const bool shared = by == By::blocks && copy.y;
      return launch_small_run<T>(launch, plan, {0, shared ? 2 : 1, 0, shared ? 3 : 1}, nullptr);
    }
    const LaunchPasses<T>& passes = passes_of<T>(l.kind);
    const auto pass = op == Op::forward           ? passes.forward
                      : op == Op::backward        ? passes.backward
                      : op == Op::forward_tangent ? passes.forward_tangent
                                                  : passes.backward_tangent;
    pass(launch, l, tensors);
  };
  Tensors<T> t = all;
  t.y_dot = t.grad_x[0] = t.grad_x[1] = t.grad_w[0] = t.grad_w[1] = nullptr;
  t.grad_x_dot[0] = t.grad_x_dot[1] = t.grad_w_dot[0] = t.grad_w_dot[1] = nullptr;
  t.grad_y = t.grad_y_dot = t.x_dot[0] = t.x_dot[1] = t.w_dot[0] = t.w_dot[1] = nullptr;
  const Tensors<T> forward_only = t;
  run(Op::forward, t);
  t.grad_y = all.grad_y;
  for (int j = 0; j < 2; ++j) t.grad_x[j] = all.grad_x[j], t.grad_w[j] = all.grad_w[j];
  if (moves) run(Op::backward, t);
  t = forward_only;
  t.y_dot = all.y_dot;
  for (int j = 0; j < 2; ++j) t.x_dot[j] = all.x_dot[j], t.w_dot[j] = all.w_dot[j];
  if (moves) run(Op::forward_tangent, t);
  t.grad_y = moves ? all.grad_y : nullptr;
  t.grad_y_dot = all.grad_y_dot;
  for (int j = 0; j < 2; ++j) t.grad_x_dot[j] = all.grad_x_dot[j], t.grad_w_dot[j] = all.grad_w_dot[j];
  run(Op::backward_tangent, t);

  std::vector<T> bits;
  auto check = [&](T* symbolic, int64_t task, const std::vector<Dual<double>>& want, bool dot, bool added,
                   const char* what) {
    if (!symbolic) return;
    std::vector<double> values = part(want, dot);
    if (added) {
      for (double& v : values) v += held;
    }
    const T* got = memory.real(symbolic, task);
    compare(got, values, tolerance, name + ", task " + std::to_string(task) + ", " + what);
    bits.insert(bits.end(), got, got + values.size());
  };
  for (int64_t task = 0; task < tasks; ++task) {
    const Values<Dual<double>>& v = truth[task];
    check(all.y, task, v.y, false, false, "y");
    if (moves) check(all.y_dot, task, v.y, true, false, "y_dot");
    if (by == By::blocks) check(copied, task, v.y, false, false, "copy of y");
    if (by == By::blocks && moves) check(copied_dot, task, v.y, true, false, "copy of y_dot");
    for (int j = 0; j < inputs; ++j) {
      if (moves) check(all.grad_x[j], task, v.grad_x[j], false, p.add, "grad_x");
      check(all.grad_x_dot[j], task, v.grad_x[j], true, p.add, "grad_x_dot");
    }
    for (int j = 0; j < parameters; ++j) {
      if (moves) check(all.grad_w[j], task, v.grad_w[j], false, p.add, j ? "grad_beta" : "grad_gamma");
      check(all.grad_w_dot[j], task, v.grad_w[j], true, p.add, j ? "grad_beta_dot" : "grad_gamma_dot");
    }
  }
  expect(memory.gaps_untouched(), name + ": wrote beyond a tensor");
  return bits;
}

/// Checks the kernels, and where one block can compute the layer, that too; and a run that begins with a
/// normalisation whose statistics are there.
template <class T>
std::vector<T> check_layer(const Layer& l, const Present& p, int64_t tasks = 2, unsigned seed = 1) {
  if (has_block_passes(l)) check_passes<T>(By::one_block, l, p, tasks, seed);
  if (has_block_passes(l) && p.statistics) check_passes<T>(By::blocks, l, p, tasks, seed);
  return check_passes<T>(By::kernels, l, p, tasks, seed);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() <= b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/// Runs `check` in the schedules that the arguments name, or in all three without arguments. The race
/// detector finds the same in each of them, so it runs one.
template <class Check>
void in_schedules(int argc, char** argv, Check check) {
  const std::pair<std::string, emulation::Schedule> schedules[] = {
      {"forward", emulation::Schedule::forward},
      {"backward", emulation::Schedule::backward},
      {"shuffled", emulation::Schedule::shuffled}};
  for (const auto& [name, schedule] : schedules) {
    if (argc > 1 && std::find(argv + 1, argv + argc, name) == argv + argc) continue;
    emulation::set_schedule(schedule, 11);
    check();
    std::printf("schedule %s: %d wrong, worst error %.2g of its tolerance\n", name.c_str(), failures, worst);
  }
}

/// Prints the number of failures; returns the exit status.
inline int report() {
  expect(counters_are_zero(), "counters that a launch has not left at zero");
  std::printf("%d wrong\n", failures);
  return failures != 0;
}

}  // namespace maml::cuda
