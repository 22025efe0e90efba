// The kernel of the chunked executor (run/chunk.h) against plain loops in dual numbers: every pass, loss,
// function and arithmetic, with several chunks, and every parameter on either side of `adapted` and `limit`.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/run/chunked.h"
#include "emulation.h"
#include "layer_harness.h"

namespace maml::cuda {
namespace {

using D = Dual<double>;
constexpr int64_t kTasks = 2;

/// compare(), relative to the largest number.
template <class T>
void compare_all(const T* got, const std::vector<double>& want, double tolerance, const std::string& what) {
  double largest = 0;
  for (const double w : want) largest = std::max(largest, std::fabs(w));
  std::vector<double> scaled_got, scaled_want;
  for (size_t i = 0; i < want.size(); ++i) {
    scaled_got.push_back(static_cast<double>(got[i]) / (largest + 1e-300));
    scaled_want.push_back(want[i] / (largest + 1e-300));
  }
  compare(scaled_got.data(), scaled_want, tolerance, what);
}

struct Net {
  std::vector<int> widths;
  Function function = Function::tanh;
  Loss loss = Loss::mse;
  int appended = 0;
  bool bias = true, functions = true, ratio = true;
  Precision precision = Precision::float32;
  int adapted_layers = 99;  // the others are of the outer loop only
};

struct Packed {
  Chain chain;
  int64_t size = 0;
  explicit Packed(const Net& net) {
    auto take = [&](int64_t elements) {
      const int64_t at = size;
      size += whole(elements);
      return at;
    };
    const int layers = static_cast<int>(net.widths.size()) - 1;
    if (net.appended) chain.appended = net.appended, chain.append = take(net.appended), chain.floor = -0.3;
    for (int l = 0; l < layers; ++l) {
      if (l == net.adapted_layers) chain.adapted = size;
      const int in = net.widths[l], out = net.widths[l + 1];
      const int64_t weight = take(int64_t{in} * out);
      chain.add(in, out, weight, net.bias ? take(out) : -1);
      if (l + 1 == layers || !net.functions) continue;
      ChainLayer& layer = chain.layers[l];
      layer.has_function = true, layer.function = net.function;
      layer.constants = with(Layer{}, net.function);
    }
    if (net.adapted_layers >= layers) chain.adapted = size;
    chain.precision = net.precision;
  }
};

/// f(x) and f'(x) of a function; duals of duals carry the derivative of f' along.
std::pair<D, D> derivatives(const ChainLayer& layer, D x) {
  if (!layer.has_function) return {x, D(1)};
  Layer l{};
  static_cast<Constants&>(l) = layer.constants;
  l.function = layer.function;
  const Dual<D> y = f_of(l, Dual<D>(x, D(1)));
  return {y.v, y.d};
}

/// The cotangent of one sample's prediction, and its term of the loss.
D sample_loss(const Net& net, const std::vector<D>& z, const double* y, double scale, double old, int64_t n,
              std::vector<D>& grad) {
  const auto c = static_cast<int64_t>(z.size()), dims = c / 2;
  grad.assign(c, D(0));
  if (net.loss == Loss::mse) {
    D sum(0);
    for (int64_t j = 0; j < c; ++j) {
      const D e = z[j] - D(y[j]);
      sum += e * e / D(double(n * c));
      grad[j] = D(2) * e / D(double(n * c));
    }
    return sum;
  }
  D log_prob(0);
  std::vector<D> slope(c);
  if (net.loss == Loss::gaussian_policy) {
    for (int64_t j = 0; j < dims; ++j) {
      const D precision = exp(D(0) - z[dims + j]), e = (D(y[j]) - z[j]) * precision;
      log_prob += D(-0.5) * e * e - z[dims + j] - D(kLogRoot2Pi);
      slope[j] = e * precision, slope[dims + j] = e * e - D(1);
    }
  } else {
    D sum(0);
    for (const D& logit : z) sum += exp(logit);
    const auto a = static_cast<int64_t>(y[0]);
    log_prob = z[a] - log(sum);
    for (int64_t j = 0; j < c; ++j) slope[j] = D(j == a ? 1 : 0) - exp(z[j]) / sum;
  }
  const bool policy = is_policy(net.loss);
  const D k = !policy ? D(1.0 / double(n)) : net.ratio ? D(scale) * exp(log_prob - D(old)) : D(scale);
  for (int64_t j = 0; j < c; ++j) grad[j] = D(0) - k * slope[j];
  return D(0) - (policy && net.ratio ? k : k * log_prob);
}

std::vector<double> sample_metric(const Net& net, const std::vector<D>& z, double scale) {
  const auto c = static_cast<int64_t>(z.size()), dims = c / 2;
  std::vector<double> w(c);
  double sum = 0, mean = 0;
  for (int64_t j = 0; j < c; ++j) sum += std::exp(z[j].v);
  for (int64_t j = 0; j < c; ++j) mean += std::exp(z[j].v) / sum * z[j].d;
  for (int64_t j = 0; j < c; ++j) {
    w[j] = net.loss == Loss::categorical_policy ? scale * std::exp(z[j].v) / sum * (z[j].d - mean)
           : j < dims                           ? scale * std::exp(-2 * z[dims + j].v) * z[j].d
                                                : 2 * scale * z[j].d;
  }
  return w;
}

struct Truth {
  D loss{0};
  std::vector<D> gradient;         // dual: along the direction
  std::vector<double> metric;      // J^T F J direction
  std::vector<double> prediction;  // [n, c]
};

/// One task: parameters as duals, x [n, in].
Truth truth_of(const Net& net, const Packed& packed, const std::vector<D>& w, const std::vector<double>& x,
               const std::vector<double>& y, int64_t width, const std::vector<double>& scale,
               const std::vector<double>& old) {
  const Chain& chain = packed.chain;
  const int64_t n = static_cast<int64_t>(x.size()) / net.widths[0];
  Truth truth;
  truth.gradient.assign(packed.size, D(0));
  truth.metric.assign(packed.size, 0);
  for (int64_t i = 0; i < n; ++i) {
    std::vector<std::vector<D>> a(chain.count + 1), df(chain.count);
    for (int j = 0; j < net.widths[0]; ++j) a[0].push_back(D(x[i * net.widths[0] + j]));
    for (int l = 0; l < chain.count; ++l) {
      const ChainLayer& layer = chain.layers[l];
      for (int j = 0; j < layer.out; ++j) {
        D z = layer.bias < 0 ? D(0) : w[layer.bias + j];
        for (int k = 0; k < layer.in; ++k) z += a[l][k] * w[layer.weight + k * layer.out + j];
        const auto [f, slope] = derivatives(layer, z);
        a[l + 1].push_back(f), df[l].push_back(slope);
      }
    }
    std::vector<D> z = a[chain.count];
    for (int j = 0; j < chain.appended; ++j) {
      const D p = w[chain.append + j];
      z.push_back(p.v < chain.floor ? D(chain.floor) : p);
    }
    for (const D& v : z) truth.prediction.push_back(v.v);
    std::vector<D> grad;
    truth.loss += sample_loss(net, z, &y[i * width], scale[i], old[i], n, grad);
    std::vector<std::vector<D>> cotangents{grad};
    if (is_policy(net.loss)) {
      cotangents.emplace_back();
      for (const double v : sample_metric(net, z, scale[i])) cotangents[1].push_back(D(v));
    }
    for (size_t which = 0; which < cotangents.size(); ++which) {
      auto add = [&](int64_t at, D v) {
        if (which == 0) truth.gradient[at] += v;
        if (which == 1) truth.metric[at] += v.v;
      };
      std::vector<D> g = cotangents[which];
      const int last = chain.layers[chain.count - 1].out;
      for (int j = 0; j < chain.appended; ++j) {
        if (w[chain.append + j].v >= chain.floor) add(chain.append + j, g[last + j]);
      }
      g.resize(last);
      for (int l = chain.count - 1; l >= 0; --l) {
        const ChainLayer& layer = chain.layers[l];
        std::vector<D> below(layer.in);
        for (int j = 0; j < layer.out; ++j) {
          const D d = g[j] * df[l][j];
          if (layer.bias >= 0) add(layer.bias + j, d);
          for (int k = 0; k < layer.in; ++k) {
            add(layer.weight + k * layer.out + j, a[l][k] * d);
            below[k] += d * w[layer.weight + k * layer.out + j];
          }
        }
        g = below;
      }
    }
  }
  return truth;
}

template <class T>
void check(const Net& net, int64_t n, double tolerance) {
  const Packed packed(net);
  const Chain& chain = packed.chain;
  const int64_t c = chain.width(), in = net.widths[0], size = packed.size;
  const bool classes = takes_classes(net.loss);
  const int64_t width = classes ? 2 : Target<T>::width(net.loss, c);  // an int64 is as large as two floats
  std::string name = "chain";
  for (const int w : net.widths) name += " " + std::to_string(w);
  name += " + " + std::to_string(net.appended) + ", n " + std::to_string(n) + ", f " +
          std::to_string(static_cast<int>(net.function)) + ", loss " +
          std::to_string(static_cast<int>(net.loss)) + (net.ratio ? ", ratio" : "") + ", precision " +
          std::to_string(static_cast<int>(net.precision)) + ", " + std::to_string(sizeof(T)) + " bytes";
  const int64_t parts = chunks_of(n) > 1 ? chunks_of(n) * part_size(size) : 0;
  TestMemory<T> memory(kTasks, n * in + n * width + 3 * n * c + 2 * n + 8 * size + parts + 40 * kGap);
  T *x = memory.take(n * in), *y = memory.take(n * width), *scale = memory.take(n), *old = memory.take(n),
    *theta = memory.take(size), *phi = memory.take(size), *direction = memory.take(size),
    *value = memory.take(1), *logits = memory.take(n * c), *cotangent = memory.take(n * c),
    *gradient = memory.take(size), *product = memory.take(size), *metric = memory.take(size),
    *from_cotangent = memory.take(size), *part = memory.take(parts);
  std::mt19937 rng(5);
  std::vector<Truth> truth;
  auto rounded = [&](T* to, int64_t task, int64_t count, double factor) {
    auto values = random_values(rng, count);
    for (double& v : values) v = static_cast<double>(static_cast<T>(factor * v));
    memory.fill(to, task, values);
    return values;
  };
  for (int64_t task = 0; task < kTasks; ++task) {
    const auto xs = rounded(x, task, n * in, 1), olds = rounded(old, task, n, 0.5);
    auto scales = rounded(scale, task, n, 1.0 / double(n));
    if (n > 1) scales[n / 2] = 0;
    memory.fill(scale, task, scales);
    std::vector<double> ys;
    if (classes) {
      for (int64_t i = 0; i < n; ++i) {
        const auto label = static_cast<int64_t>(rng() % c);
        ys.insert(ys.end(), {static_cast<double>(label), 0.0});
        std::memcpy(reinterpret_cast<char*>(memory.real(y, task)) + 8 * i, &label, 8);
      }
    } else {
      ys = rounded(y, task, n * width, 1);
    }
    const double spread = 0.6 / std::sqrt(double(net.widths[net.widths.size() / 2]));
    const auto thetas = rounded(theta, task, size, spread), phis = rounded(phi, task, size, spread),
               directions = rounded(direction, task, size, spread);
    std::vector<D> w;
    for (int64_t i = 0; i < size; ++i) {
      const bool moves = i < chain.adapted;
      w.push_back(D(moves ? phis[i] : thetas[i], moves ? directions[i] : 0));
    }
    truth.push_back(truth_of(net, packed, w, xs, ys, width, scales, olds));
    rounded(cotangent, task, n * c, 1);
    for (T* out : {gradient, product, metric, from_cotangent})  // gaps between parameters are never written
      memory.fill(out, task, std::vector<double>(size, 0.0));
  }
  const Launcher launch = memory.launcher();
  const LossPart whole_set{net.loss, n, c, n, false};
  ChunkTensors<T> t{};
  t.x = x, t.theta = theta, t.phi = phi, t.parts = part;
  t.target = {y, is_policy(net.loss) ? scale : nullptr, is_policy(net.loss) && net.ratio ? old : nullptr};
  const Target<T> target = t.target;
  t.value = value, t.logits = logits, t.gradient = gradient, t.limit = chain.adapted;
  launch_chunks<T>(launch, Pass::gradient, chain, whole_set, t);
  auto each = [&](auto check) {
    for (int64_t task = 0; task < kTasks; ++task) check(task);
  };
  each([&](int64_t task) {
    compare(memory.real(value, task), {truth[task].loss.v}, tolerance, name + ", loss");
    compare_all(memory.real(logits, task), truth[task].prediction, tolerance, name + ", prediction");
    auto want = maml::cuda::part(truth[task].gradient, false);
    std::fill(want.begin() + chain.adapted, want.end(), 0.0);  // beyond the limit
    compare_all(memory.real(gradient, task), want, tolerance, name + ", gradient of what is adapted");
  });
  t.limit = size, t.value = t.logits = nullptr;
  launch_chunks<T>(launch, Pass::gradient, chain, whole_set, t);
  t.gradient = product, t.direction = direction;
  launch_chunks<T>(launch, Pass::product, chain, whole_set, t);
  if (is_policy(net.loss)) {
    t.gradient = metric, t.target.y = nullptr;  // it has no actions
    launch_chunks<T>(launch, Pass::metric, chain, whole_set, t);
  }
  each([&](int64_t task) {
    const Truth& of = truth[task];
    compare_all(memory.real(gradient, task), maml::cuda::part(of.gradient, false), tolerance,
                name + ", gradient");
    compare_all(memory.real(product, task), maml::cuda::part(of.gradient, true), tolerance,
                name + ", product");
    if (is_policy(net.loss)) compare_all(memory.real(metric, task), of.metric, tolerance, name + ", metric");
    memory.poison(value, 1), memory.poison(logits, n * c);
  });
  ChunkTensors<T> only{};  // the loss alone, then the prediction alone
  only.x = x, only.theta = theta, only.phi = phi, only.parts = part, only.target = target, only.value = value;
  launch_chunks<T>(launch, Pass::gradient, chain, whole_set, only);
  only.target = {}, only.value = nullptr, only.logits = logits;
  launch_chunks<T>(launch, Pass::gradient, chain, whole_set, only);
  each([&](int64_t task) {
    compare(memory.real(value, task), {truth[task].loss.v}, tolerance, name + ", loss alone");
    compare_all(memory.real(logits, task), truth[task].prediction, tolerance, name + ", prediction alone");
  });
  expect(memory.gaps_untouched(), name + " writes nowhere else");
}

void check_all() {
  // Of samples: one, a part of a tile, and several chunks (of 64 samples with small tiles).
  const int64_t several = kSmallTiles ? 150 : 450;
  for (const Loss loss : {Loss::mse, Loss::cross_entropy, Loss::gaussian_policy, Loss::categorical_policy}) {
    const int appended = loss == Loss::gaussian_policy ? 2 : 0;
    for (const int64_t n : {int64_t{1}, int64_t{33}, several}) {
      check<float>({{3, 9, 17, 2}, Function::tanh, loss, appended}, n, 2e-5);
      check<double>({{3, 9, 17, 2}, Function::tanh, loss, appended}, n, 1e-12);
    }
    for (const bool ratio : {false, true}) {
      Net net{{2, 20, 2}, Function::sigmoid, loss, appended};
      net.ratio = ratio, net.adapted_layers = 1;
      check<float>(net, 40, 2e-5);
    }
  }
  for (int f = 0; f < static_cast<int>(Function::sin); ++f) {
    const double tolerance = 5e-5;
    check<float>({{4, 33, 40, 3}, static_cast<Function>(f)}, 37, tolerance);
  }
  Net plain{{5, 3}};
  plain.bias = false;
  check<float>(plain, 70, 2e-5);
  check<double>(plain, 70, 1e-12);
  Net linear{{6, 7, 8, 5, 9, 2, 4}};
  linear.functions = false, linear.adapted_layers = 3;
  check<float>(linear, 35, 2e-5);
  const std::pair<Precision, double> tolerances[] = {{Precision::float32, 5e-5},
                                                     {Precision::bf16x3, 3e-4},
                                                     {Precision::tf32, 1e-2},
                                                     {Precision::bfloat16, 8e-2}};
  for (const auto& [precision, tolerance] : tolerances) {
    Net policy{{2, 100, 100, 2}, Function::tanh, Loss::gaussian_policy, 2};
    policy.precision = precision;
    check<float>(policy, 70, tolerance);
    Net wide{{30, 128, 11, 40}, Function::silu, Loss::cross_entropy};
    wide.precision = precision;
    check<float>(wide, 34, tolerance);
  }
}

}  // namespace
}  // namespace maml::cuda

using namespace maml::cuda;

int main(int argc, char** argv) {
  in_schedules(argc, argv, check_all);
  return report();
}
