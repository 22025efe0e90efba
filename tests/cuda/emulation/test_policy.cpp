// The kernels for policies: both losses with their tangents and metrics against formulas in dual numbers, and
// the layer that appends log_std to the mean, in every schedule of the emulation.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/loss.h"
#include "emulation.h"
#include "layer_harness.h"

namespace maml::cuda {
namespace {

constexpr int64_t kTasks = 2;

/// Returns one sample's term of the loss, and computes grad_z.
template <class S>
S sample_loss(Loss kind, const std::vector<S>& z, const double* action, double scale, const double* old,
              std::vector<S>& grad_z) {
  const auto c = static_cast<int64_t>(z.size()), dims = c / 2;
  S log_prob(0);
  std::vector<S> slope(c);  // of log_prob
  if (kind == Loss::gaussian_policy) {
    for (int64_t j = 0; j < dims; ++j) {
      const S precision = exp(S(0) - z[dims + j]), e = (S(action[j]) - z[j]) * precision;
      log_prob += S(-0.5) * e * e - z[dims + j] - S(kLogRoot2Pi);
      slope[j] = e * precision;
      slope[dims + j] = e * e - S(1);
    }
  } else {
    S sum(0);
    for (const S& logit : z) sum += exp(logit);
    const auto a = static_cast<int64_t>(action[0]);
    log_prob = z[a] - log(sum);
    for (int64_t j = 0; j < c; ++j) slope[j] = S(j == a ? 1 : 0) - exp(z[j]) / sum;
  }
  const S k = old ? S(scale) * exp(log_prob - S(*old)) : S(scale);
  for (const S& s : slope) grad_z.push_back(S(0) - k * s);
  return S(0) - (old ? k : k * log_prob);
}

/// F z_dot for one sample, with F the Fisher matrix.
std::vector<double> sample_metric(Loss kind, const std::vector<double>& z, const std::vector<double>& dot,
                                  double scale) {
  const auto c = static_cast<int64_t>(z.size()), dims = c / 2;
  std::vector<double> w(c);
  double sum = 0, mean = 0;
  for (int64_t j = 0; j < c; ++j) sum += std::exp(z[j]);
  for (int64_t j = 0; j < c; ++j) mean += std::exp(z[j]) / sum * dot[j];
  for (int64_t j = 0; j < c; ++j) {
    const bool is_mean = j < dims;
    w[j] = kind == Loss::categorical_policy ? scale * std::exp(z[j]) / sum * (dot[j] - mean)
           : is_mean                        ? scale * std::exp(-2 * z[dims + j]) * dot[j]
                                            : 2 * scale * dot[j];
  }
  return w;
}

template <class T>
void check_loss(Loss kind, int64_t n, int64_t c, bool ratio) {
  const bool gaussian = kind == Loss::gaussian_policy;
  const int64_t dims = gaussian ? c / 2 : 2;  // elements of an action: an int64 is as large as two floats
  const std::string name = std::string(gaussian ? "gaussian" : "categorical") +
                           (ratio ? " ratio" : " score") + " n " + std::to_string(n) + " c " +
                           std::to_string(c);
  const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-12;
  TestMemory<T> memory(kTasks, 6 * n * c + n * dims + 2 * n + 24 * kGap);
  T *z = memory.take(n * c), *z_dot = memory.take(n * c), *grad_z = memory.take(n * c),
    *saved = memory.take(n * c), *grad_z_dot = memory.take(n * c), *metric = memory.take(n * c),
    *loss = memory.take(1), *actions = memory.take(n * dims), *scale = memory.take(n), *old = memory.take(n);
  std::mt19937 rng(7);
  std::vector<double> losses(kTasks);
  std::vector<std::vector<Dual<double>>> gradients(kTasks);
  std::vector<std::vector<double>> metrics(kTasks);
  auto rounded = [&](T* to, int64_t task, int64_t count) {
    auto values = random_values(rng, count);
    for (double& v : values) v = static_cast<double>(static_cast<T>(0.5 * v));
    memory.fill(to, task, values);
    return values;
  };
  for (int64_t task = 0; task < kTasks; ++task) {
    const auto zs = rounded(z, task, n * c), dots = rounded(z_dot, task, n * c), olds = rounded(old, task, n);
    auto scales = rounded(scale, task, n);
    if (n > 1) scales[n / 2] = 0;  // padding, whose old log-probability would overflow if it were used
    memory.fill(scale, task, scales);
    if (n > 1) memory.real(old, task)[n / 2] = T(-1e30);
    std::vector<double> goal;
    if (gaussian) {
      goal = rounded(actions, task, n * dims);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const auto action = static_cast<int64_t>(rng() % c);
        goal.insert(goal.end(), {static_cast<double>(action), 0.0});
        std::memcpy(reinterpret_cast<char*>(memory.real(actions, task)) + 8 * i, &action, 8);
      }
    }
    Dual<double> total(0);
    for (int64_t i = 0; i < n; ++i) {
      const std::vector<double> row(zs.begin() + i * c, zs.begin() + (i + 1) * c);
      const std::vector<double> dot(dots.begin() + i * c, dots.begin() + (i + 1) * c);
      total += sample_loss(kind, dual(row, dot, true), &goal[i * dims], scales[i], ratio ? &olds[i] : nullptr,
                           gradients[task]);
      const auto w = sample_metric(kind, row, dot, scales[i]);
      metrics[task].insert(metrics[task].end(), w.begin(), w.end());
    }
    losses[task] = total.v;
  }
  const Launcher launch = memory.launcher();
  const LossPart whole{kind, n, c, n, false};
  const Target<T> target{actions, scale, ratio ? old : nullptr};
  launch_loss<T>(launch, whole, z, target, loss, grad_z, saved);
  launch_loss_tangent<T>(launch, whole, z, target, z_dot, saved, grad_z_dot);
  launch_metric<T>(launch, whole, z, target, z_dot, metric);
  for (int64_t task = 0; task < kTasks; ++task) {
    compare(memory.real(loss, task), {losses[task]}, tolerance, name + ", value");
    compare(memory.real(grad_z, task), part(gradients[task], false), tolerance, name + ", grad_z");
    compare(memory.real(grad_z_dot, task), part(gradients[task], true), tolerance, name + ", grad_z_dot");
    compare(memory.real(metric, task), metrics[task], tolerance, name + ", metric");
  }
  launch_loss<T>(launch, whole, z, target, loss, nullptr, nullptr);
  for (int64_t task = 0; task < kTasks; ++task)
    compare(memory.real(loss, task), {losses[task]}, tolerance, name + ", value alone");
  expect(memory.gaps_untouched(), name + " writes nowhere else");
}

void check_losses() {
  for (const bool ratio : {false, true}) {
    for (const int64_t n : {1, 5, 75}) {
      for (const int64_t c : {2, 4, 34}) {
        check_loss<double>(Loss::gaussian_policy, n, c, ratio);
        check_loss<float>(Loss::gaussian_policy, n, c, ratio);
      }
      for (const int64_t c : {1, 4, 9, 33}) {
        check_loss<double>(Loss::categorical_policy, n, c, ratio);
        check_loss<float>(Loss::categorical_policy, n, c, ratio);
      }
    }
  }
  for (const int64_t bad : {int64_t{-1}, int64_t{5}}) {
    TestMemory<double> memory(1, 200);
    double *z = memory.take(15), *actions = memory.take(3), *scale = memory.take(3), *loss = memory.take(1);
    memory.fill(z, 0, std::vector<double>(15, 0.5));
    memory.fill(scale, 0, std::vector<double>(3, 1.0));
    const int64_t given[3] = {0, 1, bad};
    std::memcpy(memory.real(actions, 0), given, sizeof given);
    bool refused = false;
    try {
      launch_loss<double>(memory.launcher(), {Loss::categorical_policy, 3, 5, 3, false}, z, {actions, scale},
                          loss, nullptr, nullptr);
    } catch (const std::exception&) {
      refused = true;
    }
    expect(refused, "an action of " + std::to_string(bad) + " of 5 is refused");
  }
}

void check_append(int64_t n, int64_t in, int64_t behind, bool moves, bool add) {
  const std::string name = "append n " + std::to_string(n) + " in " + std::to_string(in) + " behind " +
                           std::to_string(behind) + (moves ? "" : ", fixed") + (add ? ", added" : "");
  const int64_t out = in + behind;
  TestMemory<double> memory(kTasks, 4 * n * in + 4 * n * out + 4 * behind + 30 * kGap);
  double *x = memory.take(n * in), *x_dot = memory.take(n * in), *w = memory.take(behind),
         *w_dot = memory.take(behind), *y = memory.take(n * out), *y_dot = memory.take(n * out),
         *g = memory.take(n * out), *grad_x = memory.take(n * in), *grad_w = memory.take(behind);
  Layer l{};
  l.kind = Kind::append, l.n = n, l.in = {in, 1, 1}, l.out = {out, 1, 1}, l.a = -0.2;
  std::mt19937 rng(9);
  struct Want {
    std::vector<double> y, y_dot, grad_x, grad_w;
  };
  std::vector<Want> want(kTasks);
  for (int64_t task = 0; task < kTasks; ++task) {
    const auto xs = random_values(rng, n * in), x_dots = random_values(rng, n * in);
    const auto ws = random_values(rng, behind), w_dots = random_values(rng, behind);
    const auto gs = random_values(rng, n * out);
    memory.fill(x, task, xs), memory.fill(x_dot, task, x_dots), memory.fill(w, task, ws);
    memory.fill(w_dot, task, w_dots), memory.fill(g, task, gs);
    memory.fill(grad_x, task, std::vector<double>(n * in, 1.0));
    memory.fill(grad_w, task, std::vector<double>(behind, 1.0));
    Want& t = want[task];
    t.grad_w.assign(behind, add ? 1 : 0);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < in; ++j) {
        t.y.push_back(xs[i * in + j]);
        t.y_dot.push_back(moves ? x_dots[i * in + j] : 0);
        t.grad_x.push_back(gs[i * out + j] + (add ? 1 : 0));
      }
      for (int64_t j = 0; j < behind; ++j) {
        const bool above = ws[j] >= l.a;
        t.y.push_back(above ? ws[j] : l.a);
        t.y_dot.push_back(above && moves ? w_dots[j] : 0);
        t.grad_w[j] += above ? gs[i * out + in + j] : 0;
      }
    }
  }
  const Launcher launch = memory.launcher();
  Tensors<double> t;
  t.x[0] = x, t.w[0] = w, t.y = y, t.y_dot = y_dot, t.grad_x[0] = t.grad_x_dot[0] = grad_x;
  t.grad_y = t.grad_y_dot = g, t.grad_w[0] = t.grad_w_dot[0] = grad_w, t.add_x[0] = t.add_w[0] = add;
  if (moves) t.x_dot[0] = x_dot, t.w_dot[0] = w_dot;
  const auto passes = passes_of<double>(Kind::append);
  passes.forward(launch, l, t);
  passes.forward_tangent(launch, l, t);
  (moves ? passes.backward_tangent : passes.backward)(launch, l, t);
  for (int64_t task = 0; task < kTasks; ++task) {
    compare(memory.real(y, task), want[task].y, 1e-14, name + ", y");
    compare(memory.real(y_dot, task), want[task].y_dot, 1e-14, name + ", y_dot");
    compare(memory.real(grad_x, task), want[task].grad_x, 1e-14, name + ", grad_x");
    compare(memory.real(grad_w, task), want[task].grad_w, 1e-13, name + ", grad_w");
  }
  expect(memory.gaps_untouched(), name + " writes nowhere else");
}

}  // namespace
}  // namespace maml::cuda

using namespace maml::cuda;

/// Runs the schedules named by the arguments; without arguments, all.
int main(int argc, char** argv) {
  in_schedules(argc, argv, [] {
    check_losses();
    for (const int64_t n : {1, 33, 200}) {
      for (const bool moves : {false, true}) {
        check_append(n, 2, 2, moves, false);
        check_append(n, 5, 3, moves, true);
        check_append(n, 17, 40, moves, false);
      }
    }
  });
  return report();
}
