// The CUDA kernels of recurrence, on the CPU: every pass of every cell against a step-by-step loop in dual
// numbers of dual numbers, in which each gradient is the derivative of <g, y> by one element, and its
// tangent. With views of the sequence, with and without states and biases, with optional tensors absent, and
// the same bits in every schedule of the emulation.
#include <string>
#include <vector>

#include "emulation.h"
#include "layer_harness.h"
#include "layers/recurrence.h"

namespace maml::cuda {
namespace {

using D = Dual<double>;
using Twice = Dual<D>;

constexpr int kTensors = 7;  // x, h_0, c_0, W_ih, W_hh, b_ih, b_hh

struct Case {
  Cell cell = Cell::lstm;
  int64_t n = 2, length = 3, in = 2, hidden = 3;
  bool reversed = false;  // in time
  bool part = false;      // the sequence is a part of its value
  bool shared = false;    // the initial states are the same for all samples
  bool given[kTensors] = {true, true, true, true, true, true, true};
  bool moves[kTensors] = {true, true, true, true, true, true, true};
  bool wanted[kTensors] = {true, true, true, true, true, true, true};
  bool add = false;

  int64_t gates() const { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
  int64_t of_sample() const { return (length + (cell == Cell::lstm)) * hidden; }
  bool has(int k) const { return given[k] && (k != 2 || cell == Cell::lstm); }
  bool moving() const {
    bool any = false;
    for (int k = 0; k < kTensors; ++k) any |= has(k) && moves[k];
    return any;
  }

  std::vector<Loops> loops() const {
    Loops x;
    x.axes = 3;
    x.size[0] = kSamples, x.size[1] = length, x.size[2] = in;
    const int64_t step = part ? in + 1 : in, size = length * step + (part ? 2 : 0);
    x.x[0] = {size, true, !part && !reversed, part ? 2 : 0, {size, step, 1}};
    if (reversed) x.x[0].offset += (length - 1) * step, x.x[0].stride[1] = -step;
    x.y = {of_sample(), true, cell != Cell::lstm, 0, {of_sample(), hidden, 0}};
    std::vector<Loops> all = {x};
    for (int k = 1; k <= 2 && has(k); ++k) {
      Loops state;
      state.axes = 2;
      state.size[0] = kSamples, state.size[1] = hidden;
      state.x[0] = {hidden, !shared, true, 0, {shared ? 0 : hidden, 1}};
      state.y = {of_sample(), true, false, 0, {of_sample(), 1}};
      all.push_back(state);
    }
    return all;
  }
  int64_t elements(int k) const {
    const std::vector<Loops> l = loops();
    if (k < 3) return has(k) ? maml::elements(l[k].x[0], n) : 0;
    return (k == 3 ? in : k == 4 ? hidden : 1) * gates() * hidden;
  }
  std::string text() const {
    std::string text = std::string(name_of(cell));
    for (const int64_t v : {n, length, in, hidden}) text += " " + std::to_string(v);
    for (const bool flag : {reversed, part, shared, add}) text += flag ? " 1" : " 0";
    for (const bool* flags : {given, moves, wanted}) {
      text += " ";
      for (int k = 0; k < kTensors; ++k) text += flags[k] ? '1' : '0';
    }
    return text;
  }
};

Twice sigmoid(Twice x) { return Twice(1) / (Twice(1) + exp(-x)); }
Twice hyperbolic(Twice x) { return Twice(2) * sigmoid(Twice(2) * x) - Twice(1); }

/// The output for one task.
std::vector<Twice> evaluated(const Case& c, const std::vector<std::vector<Twice>>& of) {
  const std::vector<Loops> loops = c.loops();
  const View& x = loops[0].x[0];
  const int64_t H = c.hidden, width = c.gates() * H;
  std::vector<Twice> y(c.n * c.of_sample());
  for (int64_t s = 0; s < c.n; ++s) {
    std::vector<Twice> h(H, Twice(0)), cell(H, Twice(0));
    for (int64_t j = 0; j < H; ++j) {
      if (c.has(1)) h[j] = of[1][(c.shared ? 0 : s * H) + j];
      if (c.has(2)) cell[j] = of[2][(c.shared ? 0 : s * H) + j];
    }
    for (int64_t t = 0; t < c.length; ++t) {
      std::vector<Twice> a(width, Twice(0)), u(width, Twice(0)), next(H);
      for (int64_t g = 0; g < width; ++g) {
        if (c.has(5)) a[g] = of[5][g];
        if (c.has(6)) u[g] = of[6][g];
        for (int64_t i = 0; i < c.in; ++i) {
          a[g] += of[0][x.offset + s * x.stride[0] + t * x.stride[1] + i] * of[3][i * width + g];
        }
        for (int64_t i = 0; i < H; ++i) u[g] += h[i] * of[4][i * width + g];
      }
      for (int64_t j = 0; j < H; ++j) {
        auto both = [&](int64_t gate) { return a[gate * H + j] + u[gate * H + j]; };
        if (c.cell == Cell::lstm) {
          cell[j] = sigmoid(both(1)) * cell[j] + sigmoid(both(0)) * hyperbolic(both(2));
          next[j] = sigmoid(both(3)) * hyperbolic(cell[j]);
        } else if (c.cell == Cell::gru) {
          const Twice r = sigmoid(both(0)), z = sigmoid(both(1));
          next[j] = (Twice(1) - z) * hyperbolic(a[2 * H + j] + r * u[2 * H + j]) + z * h[j];
        } else if (c.cell == Cell::rnn_tanh) {
          next[j] = hyperbolic(both(0));
        } else {
          next[j] = value_of(both(0)) > 0 ? both(0) : Twice(0);
        }
        y[s * c.of_sample() + t * H + j] = next[j];
      }
      h = next;
    }
    for (int64_t j = 0; c.cell == Cell::lstm && j < H; ++j) y[s * c.of_sample() + c.length * H + j] = cell[j];
  }
  return y;
}

/// Values and directions of one task, and what the passes must give.
struct Truth {
  std::vector<std::vector<D>> of;  // the tensors
  std::vector<D> g, y;
  std::vector<std::vector<D>> gradient;
};

void compute(const Case& c, Truth& v) {
  auto seeded = [&](int tensor, size_t element) {
    std::vector<std::vector<Twice>> all(kTensors);
    for (int k = 0; k < kTensors; ++k) {
      for (size_t i = 0; i < v.of[k].size(); ++i) {
        all[k].push_back({v.of[k][i], D(k == tensor && i == element ? 1 : 0)});
      }
    }
    return evaluated(c, all);
  };
  for (const Twice& y : seeded(-1, 0)) v.y.push_back(y.v);
  v.gradient.resize(kTensors);
  for (int k = 0; k < kTensors; ++k) {
    for (size_t i = 0; i < v.of[k].size(); ++i) {
      const std::vector<Twice> y = seeded(k, i);
      D sum(0);
      for (size_t o = 0; o < y.size(); ++o) sum += v.g[o] * y[o].d;
      v.gradient[k].push_back(sum);
    }
  }
}

/// Runs all passes for `tasks` tasks, compares every output with the reference, and returns the bits of all.
template <class T>
std::vector<T> check(const Case& c, int64_t tasks = 2, unsigned seed = 1) {
  const std::string name = "recurrence " + c.text() + (sizeof(T) == 4 ? " float" : " double");
  const double tolerance = sizeof(T) == 4 ? 3e-5 : 1e-12, held = 0.75;
  const std::vector<Loops> loops = c.loops();
  Layer layer{};
  layer.kind = Kind::recurrence, layer.cell = c.cell, layer.n = c.n, layer.loops = loops.data();
  const Footprint needs = footprint(layer);
  const int64_t out = c.n * c.of_sample();
  int64_t total = 4 * (out + 2 * kGap) + needs.saved + needs.saved_dot + needs.scratch + 6 * kGap;
  for (int k = 0; k < kTensors; ++k) total += 4 * (c.elements(k) + 2 * kGap);
  TestMemory<T> memory(tasks, total);
  T *value[kTensors] = {}, *dot[kTensors] = {}, *grad[kTensors] = {}, *grad_dot[kTensors] = {};
  for (int k = 0; k < kTensors; ++k) {
    if (!c.has(k)) continue;
    const int64_t count = c.elements(k);
    value[k] = memory.take(count);
    if (c.moves[k]) dot[k] = memory.take(count);
    if (c.wanted[k]) grad[k] = memory.take(count), grad_dot[k] = memory.take(count);
  }
  T *y = memory.take(out), *y_dot = memory.take(out), *g = memory.take(out), *g_dot = memory.take(out);
  T *saved = memory.take(needs.saved), *saved_dot = memory.take(needs.saved_dot),
    *scratch = memory.take(needs.scratch);

  std::mt19937 rng(seed);
  std::vector<Truth> truth(tasks);
  auto input = [&](T* symbolic, int64_t task, int64_t count) {
    auto values = random_values(rng, count);
    for (double& v : values) v = static_cast<double>(static_cast<T>(v));
    if (symbolic) memory.fill(symbolic, task, values);
    return values;
  };
  for (int64_t task = 0; task < tasks; ++task) {
    Truth& v = truth[task];
    v.of.resize(kTensors);
    for (int k = 0; k < kTensors; ++k) {
      if (!c.has(k)) continue;
      const auto values = input(value[k], task, c.elements(k));
      v.of[k] = dual(values, input(dot[k], task, c.elements(k)), c.moves[k]);
      for (T* to : {grad[k], grad_dot[k]}) {
        if (c.add && to) memory.fill(to, task, std::vector<double>(c.elements(k), held));
      }
    }
    const auto of_y = input(g, task, out);
    v.g = dual(of_y, input(g_dot, task, out), true);
    compute(c, v);
  }

  const LaunchPasses<T> passes = passes_of<T>(Kind::recurrence);
  auto run = [&](void (*pass)(const Launcher&, const Layer&, const Tensors<T>&), const Tensors<T>& t) {
    memory.poison(scratch, needs.scratch);
    pass(memory.launcher(), layer, t);
  };
  auto assign = [&](T* const* from, auto** inputs, auto** parameters) {
    std::copy_n(from, 3, inputs), std::copy_n(from + 3, 4, parameters);
  };
  Tensors<T> t;
  assign(value, t.x, t.w);
  std::fill_n(t.add_x, 3, c.add), std::fill_n(t.add_w, 4, c.add);
  t.y = y, t.saved = saved, t.scratch = scratch;
  run(passes.forward, t);
  Tensors<T> back = t;
  back.grad_y = g;
  assign(grad, back.grad_x, back.grad_w);
  run(passes.backward, back);
  if (c.moving()) {
    t.y_dot = y_dot, t.saved_dot = saved_dot, t.grad_y = g;
    assign(dot, t.x_dot, t.w_dot);
    run(passes.forward_tangent, t);
  }
  t.grad_y_dot = g_dot;
  assign(grad_dot, t.grad_x_dot, t.grad_w_dot);
  run(passes.backward_tangent, t);

  std::vector<T> bits;
  auto same = [&](T* symbolic, int64_t task, const std::vector<D>& want, bool of_dot,
                  const std::string& what) {
    if (!symbolic) return;
    std::vector<double> values = part(want, of_dot);
    if (what[0] == 'g') {
      for (double& v : values) v += c.add ? held : 0;
    }
    const T* got = memory.real(symbolic, task);
    compare(got, values, tolerance, name + ", task " + std::to_string(task) + ", " + what);
    bits.insert(bits.end(), got, got + values.size());
  };
  for (int64_t task = 0; task < tasks; ++task) {
    const Truth& v = truth[task];
    same(y, task, v.y, false, "y");
    if (c.moving()) same(y_dot, task, v.y, true, "y_dot");
    for (int k = 0; k < kTensors; ++k) {
      same(grad[k], task, v.gradient[k], false, "gradient " + std::to_string(k));
      same(grad_dot[k], task, v.gradient[k], true, "gradient_dot " + std::to_string(k));
    }
  }
  expect(memory.gaps_untouched(), name + ": wrote beyond a tensor");
  return bits;
}

template <class T>
void check_all(int seeds) {
  for (int number = 0; number < static_cast<int>(Cell::count); ++number) {
    Case c;
    c.cell = static_cast<Cell>(number);
    check<T>(c);
    c.length = 1, c.n = 1;
    check<T>(c);
    c.given[1] = c.given[2] = false;
    check<T>(c);
    std::mt19937 rng(number);
    auto with = [&](double probability) { return rng() < probability * 4294967296.0; };
    for (int seed = 0; seed < seeds; ++seed) {
      Case random;
      random.cell = c.cell;
      random.n = 1 + rng() % 3, random.length = 1 + rng() % 4;
      random.in = 1 + rng() % 4, random.hidden = 1 + rng() % 4;
      random.reversed = with(0.4), random.part = with(0.4), random.shared = with(0.4), random.add = with(0.4);
      random.given[1] = random.given[2] = with(0.6);
      random.given[5] = with(0.7), random.given[6] = with(0.7);
      for (int k = 0; k < kTensors; ++k) random.moves[k] = with(0.6), random.wanted[k] = with(0.7);
      check<T>(random);
    }
    Case tiled;  // large enough for tiles of matrix products
    tiled.cell = c.cell, tiled.n = 3, tiled.in = 8, tiled.hidden = 8;
    check<T>(tiled, 1);
    Case fixed;  // no tangent: the Hessian-vector product of parameters that are not adapted
    fixed.cell = c.cell;
    std::fill_n(fixed.moves, kTensors, false);
    check<T>(fixed);
  }
}

/// The same bits in every schedule, and for a task whatever its neighbours are; more units than threads.
void check_bits() {
  Case c;
  c.hidden = 35, c.in = 1, c.n = 2, c.length = 2;
  std::fill_n(c.wanted + 3, 2, false);
  std::vector<std::vector<float>> all;
  for (const auto schedule :
       {emulation::Schedule::forward, emulation::Schedule::backward, emulation::Schedule::shuffled}) {
    emulation::set_schedule(schedule, 7);
    all.push_back(check<float>(c));
    expect(same_bits(all[0], all.back()), "recurrence: the bits depend on the schedule");
  }
  expect(same_bits(check<float>(c, 1), all[0]), "recurrence: a task depends on its neighbours");
}

}  // namespace
}  // namespace maml::cuda

using namespace maml::cuda;

int main(int argc, char** argv) {
  in_schedules(argc, argv, [] {
    check_all<double>(20);
    check_all<float>(5);
  });
  if (argc == 1) check_bits();
  return report();
}
