// Cross entropy and mse on the CUDA backend: value, gradient and tangent against formulas in dual numbers,
// and labels that are refused. In every schedule of the emulation.
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

/// scale: of each row, in place of 1 / n; empty: there is none.
template <class S>
void loss_reference(Loss kind, int64_t n, int64_t c, const std::vector<S>& z,
                    const std::vector<double>& target, const std::vector<double>& scale, S& loss,
                    std::vector<S>& grad_z) {
  grad_z.assign(n * c, S(0));
  loss = S(0);
  for (int64_t i = 0; i < n; ++i) {
    const S rows(scale.empty() ? static_cast<double>(n) : 1 / scale[i]);
    const S elements = rows * S(static_cast<double>(c));
    if (kind == Loss::mse) {
      for (int64_t j = i * c; j < (i + 1) * c; ++j) {
        loss += (z[j] - S(target[j])) * (z[j] - S(target[j])) / elements;
        grad_z[j] = S(2) * (z[j] - S(target[j])) / elements;
      }
      continue;
    }
    const auto label = static_cast<int64_t>(target[i]);
    S sum(0);
    for (int64_t j = 0; j < c; ++j) sum += exp(z[i * c + j]);
    loss += (log(sum) - z[i * c + label]) / rows;
    for (int64_t j = 0; j < c; ++j) {
      grad_z[i * c + j] = (exp(z[i * c + j]) / sum - S(j == label ? 1 : 0)) / rows;
    }
  }
}

template <class T>
void check_loss(Loss kind, int64_t n, int64_t c, bool want_loss, bool want_grad, bool scaled = false) {
  const std::string name = std::string(kind == Loss::mse ? "mse" : "cross_entropy") + " n " +
                           std::to_string(n) + " c " + std::to_string(c) + (want_loss ? "" : ", no loss") +
                           (want_grad ? "" : ", no gradient") + (scaled ? ", scaled" : "");
  const double tolerance = sizeof(T) == 4 ? 2e-6 : 1e-13;
  constexpr int64_t kTasks = 3;
  TestMemory<T> memory(kTasks, 6 * n * c + 3 * n + 17 * kGap);
  T *z = memory.take(n * c), *z_dot = memory.take(n * c), *grad_z = memory.take(n * c),
    *saved = memory.take(n * c), *grad_z_dot = memory.take(n * c), *loss = memory.take(1),
    *target = memory.take(std::max(n * c, 2 * n)), *scale = memory.take(n);
  std::mt19937 rng(5);
  std::vector<Dual<double>> losses(kTasks);
  std::vector<std::vector<Dual<double>>> gradients(kTasks);
  for (int64_t task = 0; task < kTasks; ++task) {
    auto rounded = [&](T* to) {
      auto v = random_values(rng, n * c);
      for (double& e : v) e = static_cast<double>(static_cast<T>(4 * e));
      memory.fill(to, task, v);
      return v;
    };
    const auto values = rounded(z), dots = rounded(z_dot);
    std::vector<double> goal;
    if (kind == Loss::mse) {
      goal = rounded(target);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const auto label = static_cast<int64_t>(rng() % c);
        goal.push_back(static_cast<double>(label));
        std::memcpy(reinterpret_cast<char*>(memory.real(target, task)) + 8 * i, &label, 8);
      }
    }
    std::vector<double> scales;
    for (int64_t i = 0; scaled && i < n; ++i) {
      scales.push_back(static_cast<double>(static_cast<T>(0.1 + 0.8 * static_cast<double>(rng() % 7) / 7)));
    }
    if (scaled) memory.fill(scale, task, scales);
    loss_reference(kind, n, c, dual(values, dots, true), goal, scales, losses[task], gradients[task]);
  }
  const Launcher launch = memory.launcher();
  const LossPart whole{kind, n, c, n, false};
  const Target<T> goal{target, scaled ? scale : nullptr};
  launch_loss<T>(launch, whole, z, goal, want_loss ? loss : nullptr, want_grad ? grad_z : nullptr,
                 want_grad ? saved : nullptr);
  if (want_grad) launch_loss_tangent<T>(launch, whole, z, goal, z_dot, saved, grad_z_dot);
  for (int64_t task = 0; task < kTasks; ++task) {
    if (want_loss) compare(memory.real(loss, task), {losses[task].v}, tolerance, name + ", value");
    if (!want_grad) continue;
    compare(memory.real(grad_z, task), part(gradients[task], false), tolerance, name + ", grad_z");
    compare(memory.real(grad_z_dot, task), part(gradients[task], true), tolerance, name + ", grad_z_dot");
  }
}

void check_losses() {
  for (const Loss kind : {Loss::cross_entropy, Loss::mse}) {
    for (const int64_t n : {1, 5, 75}) {
      for (const int64_t c : {1, 2, 5, 9, 20, 64, 300}) {
        check_loss<double>(kind, n, c, true, true);
        check_loss<float>(kind, n, c, true, true);
        check_loss<double>(kind, n, c, true, true, true);
        check_loss<float>(kind, n, c, true, true, true);
      }
      check_loss<double>(kind, n, 5, false, true);
      check_loss<double>(kind, n, 5, true, false);
    }
  }
  for (const int64_t bad : {int64_t{-1}, int64_t{5}, int64_t{-100}, int64_t{1} << 40}) {
    TestMemory<double> memory(2, 200);
    double *z = memory.take(15), *labels = memory.take(3), *loss = memory.take(1);
    for (int64_t task = 0; task < 2; ++task) {
      memory.fill(z, task, std::vector<double>(15, 0.5));
      const int64_t given[3] = {0, 1, task == 1 ? bad : 4};
      std::memcpy(memory.real(labels, task), given, sizeof given);
    }
    bool refused = false;
    try {
      launch_loss<double>(memory.launcher(), {Loss::cross_entropy, 3, 5, 3, false}, z, {labels}, loss,
                          nullptr, nullptr);
    } catch (const std::exception&) {
      refused = true;
    }
    expect(refused, "a label of " + std::to_string(bad) + " for 5 classes is refused");
  }
}

}  // namespace
}  // namespace maml::cuda

using namespace maml::cuda;

int main(int argc, char** argv) {
  in_schedules(argc, argv, check_losses);
  return report();
}
