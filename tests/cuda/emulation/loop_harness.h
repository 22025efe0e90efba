// Runs the four passes of a CUDA layer on tensors of any shape for several tasks, and compares every output
// with its reference. Outputs, scratch and the gaps between tensors start as NaN.
#pragma once

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "layer_harness.h"
#include "loop_references.h"

namespace maml::cuda {

/// The number of the first task of a chunk, in the call.
inline constexpr int64_t kFirstTask = 5;

struct LoopPresent {
  bool moves[kMostInputs] = {true, true, true, true}, wanted[kMostInputs] = {true, true, true, true};
  bool add = false;
  bool same = false;  // the second input is the first
};

inline std::string text_of(const LoopLayer& l, const LoopPresent& p) {
  auto n = [](int64_t v) { return std::to_string(v); };
  auto of = [&](const View& v) {
    std::string text = " size " + n(v.size) + (v.samples ? "n" : "") + " + " + n(v.offset) + " [";
    for (int a = 0; a < l.loops[0].axes; ++a) text += n(v.stride[a]) + " ";
    return text + "]";
  };
  std::string text = std::string(properties(l.layer.kind).name) + " n " + n(l.layer.n) + " reduction " +
                     n(static_cast<int>(l.layer.reduction)) + " axes";
  for (int a = 0; a < l.loops[0].axes; ++a) text += " " + n(l.loops[0].size[a]);
  text += ", y" + of(l.y());
  for (int j = 0; j < l.inputs; ++j) {
    text += ", x" + of(l.x(j)) + (p.moves[j] ? "" : " fixed") + (p.wanted[j] ? "" : " unwanted");
  }
  return text + (p.add ? ", adds" : "") + (p.same ? ", same input" : "");
}

inline bool is_lookup(Kind kind) { return kind == Kind::gather || kind == Kind::scatter; }
/// A place in [0, size) from a random number.
inline double index_from(double number, int64_t size) {
  return std::floor(std::fabs(number) * 7) - std::floor(std::floor(std::fabs(number) * 7) / size) * size;
}

/// <g, y_dot> = the sum of <grad_x, x_dot>
inline bool is_adjoint(const LoopValues& v) {
  double left = 0, right = 0, scale = 1;
  auto add_product = [&](const std::vector<D>& a, const std::vector<D>& b, double& sum) {
    for (size_t i = 0; i < a.size(); ++i) sum += a[i].v * b[i].d, scale += std::fabs(a[i].v * b[i].d);
  };
  add_product(v.g, v.y, left);
  for (int j = 0; j < kMostInputs; ++j) add_product(v.grad_x[j], v.x[j], right);
  return std::fabs(left - right) <= 1e-12 * scale;
}

/// Runs all passes for `tasks` tasks, compares every output with the reference, and returns the bits of all
/// outputs.
template <class T>
std::vector<T> check_loops(LoopLayer l, const LoopPresent& p, int64_t tasks = 2, unsigned seed = 1) {
  Layer& layer = l.layer;
  layer.loops = l.loops.data();
  layer.expression = &l.formula.e;
  layer.mask = &l.mask;
  const std::string name = text_of(l, p) + (sizeof(T) == 4 ? " float" : " double");
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  const int64_t n = layer.n, out = count_of(l.y(), n);
  const Footprint needs = footprint(layer);
  bool any_moves = false;
  int64_t in[kMostInputs] = {}, total = 4 * out + needs.saved + needs.saved_dot + needs.scratch + 40 * kGap;
  for (int j = 0; j < l.inputs; ++j) {
    any_moves |= p.moves[j];
    in[j] = count_of(l.x(j), n);
    total += 4 * in[j] + 8 * kGap;
  }

  TestMemory<T> memory(tasks, total);
  memory.draw_from(kSeed, kFirstTask);
  Tensors<T> all;
  for (int j = 0; j < l.inputs; ++j) {
    const bool again = p.same && j == 1;
    all.x[j] = again ? all.x[0] : memory.take(in[j]);
    all.x_dot[j] = again ? all.x_dot[0] : p.moves[j] ? memory.take(in[j]) : nullptr;
    all.grad_x[j] = again ? all.grad_x[0] : p.wanted[j] ? memory.take(in[j]) : nullptr;
    all.grad_x_dot[j] = again ? all.grad_x_dot[0] : p.wanted[j] ? memory.take(in[j]) : nullptr;
    all.add_x[j] = again || p.add;
  }
  all.y = memory.take(out), all.grad_y = memory.take(out);
  all.y_dot = memory.take(out), all.grad_y_dot = memory.take(out);
  all.saved = memory.take(needs.saved), all.saved_dot = memory.take(needs.saved_dot);
  all.scratch = memory.take(needs.scratch);

  std::mt19937 rng(seed);
  std::vector<LoopValues> truth(tasks);
  const double held = 0.75;  // the value that cotangents are added to
  auto input = [&](const T* symbolic, int64_t task, int64_t count) {
    auto values = random_values(rng, count);
    for (double& v : values) v = static_cast<double>(static_cast<T>(v));
    if (symbolic) memory.fill(const_cast<T*>(symbolic), task, values);
    return values;
  };
  for (int64_t task = 0; task < tasks; ++task) {
    LoopValues& v = truth[task];
    v.task = static_cast<uint32_t>(kFirstTask + task);
    for (int j = 0; j < l.inputs; ++j) {
      if (p.same && j == 1) {
        v.x[1] = v.x[0];
        continue;
      }
      auto x = input(nullptr, task, in[j]);
      if (l.formula.positive) x = made_positive(x);
      for (double& e : x) {
        if (layer.kind == Kind::extreme || layer.kind == Kind::sort) e = std::round(2 * e);  // many are equal
        if (j == 1 && is_lookup(layer.kind)) e = index_from(e, l.loops[0].axis.size);
        e = static_cast<double>(static_cast<T>(e));
      }
      memory.fill(const_cast<T*>(all.x[j]), task, x);
      v.x[j] = dual(x, input(all.x_dot[j], task, in[j]), p.moves[j]);
      if (p.add && p.wanted[j]) {
        memory.fill(all.grad_x[j], task, std::vector<double>(in[j], held));
        memory.fill(all.grad_x_dot[j], task, std::vector<double>(in[j], held));
      }
    }
    const auto g = input(all.grad_y, task, out), g_dot = input(all.grad_y_dot, task, out);
    v.g = dual(g, g_dot, true);
    loop_reference(l, v);
    const bool stops = layer.kind == Kind::stop || layer.kind == Kind::sort;
    expect(stops || is_adjoint(v),
           name + ": the reference's backward pass is not the adjoint of its tangent");
    for (int j = 0; j < l.inputs && stops; ++j) v.grad_x[j].assign(in[j], D(0));
    for (size_t i = 0; p.same && i < v.grad_x[0].size(); ++i) v.grad_x[0][i] += v.grad_x[1][i];
  }

  // Each pass gets the tensors that the algorithm would give it, and no others.
  const LaunchPasses<T> passes = passes_of<T>(layer.kind);
  const Launcher launch = memory.launcher();
  auto run = [&](void (*pass)(const Launcher&, const Layer&, const Tensors<T>&), const Tensors<T>& t) {
    memory.poison(all.scratch, needs.scratch);
    pass(launch, layer, t);
  };
  Tensors<T> t;
  std::copy_n(all.x, kMostInputs, t.x);
  std::copy_n(all.add_x, kMostInputs, t.add_x);
  t.y = all.y, t.saved = all.saved, t.saved_dot = all.saved_dot, t.scratch = all.scratch;
  run(passes.forward, t);
  Tensors<T> back = t;
  back.grad_y = all.grad_y;
  std::copy_n(all.grad_x, kMostInputs, back.grad_x);
  if (any_moves) run(passes.backward, back);
  t.y_dot = any_moves ? all.y_dot : nullptr;
  std::copy_n(all.x_dot, kMostInputs, t.x_dot);
  if (any_moves) run(passes.forward_tangent, t);
  t.grad_y = any_moves ? all.grad_y : nullptr;
  t.grad_y_dot = all.grad_y_dot;
  std::copy_n(all.grad_x_dot, kMostInputs, t.grad_x_dot);
  run(passes.backward_tangent, t);

  std::vector<T> bits;
  auto check = [&](T* symbolic, int64_t task, const std::vector<D>& want, bool dot, bool added,
                   const std::string& what) {
    if (!symbolic) return;
    std::vector<double> values = part(want, dot);
    for (double& v : values) v += added ? held : 0;
    const T* got = memory.real(symbolic, task);
    compare(got, values, tolerance, name + ", task " + std::to_string(task) + ", " + what);
    bits.insert(bits.end(), got, got + values.size());
  };
  for (int64_t task = 0; task < tasks; ++task) {
    const LoopValues& v = truth[task];
    check(all.y, task, v.y, false, false, "y");
    if (any_moves) check(all.y_dot, task, v.y, true, false, "y_dot");
    for (int j = 0; j < (p.same ? 1 : l.inputs); ++j) {
      if (any_moves) check(all.grad_x[j], task, v.grad_x[j], false, p.add, "grad_x " + std::to_string(j));
      check(all.grad_x_dot[j], task, v.grad_x[j], true, p.add, "grad_x_dot " + std::to_string(j));
    }
  }
  expect(memory.gaps_untouched(), name + ": wrote beyond a tensor");
  return bits;
}

}  // namespace maml::cuda
