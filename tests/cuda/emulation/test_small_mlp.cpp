// The kernel of small multilayer perceptrons: losses, logits and the meta-gradient of several tasks against
// plain loops, whose Hessian-vector products are derivatives in dual numbers. In every schedule of the
// emulation.
#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "cuda/run/small_mlp.h"
#include "emulation.h"
#include "layer_harness.h"

namespace maml::cuda {
namespace {

struct Net {
  std::vector<int> widths;
  std::vector<Function> functions;  // one a hidden layer
  std::vector<bool> biases;
  Loss loss;
  int support, query, steps;
  bool first_order = false;

  int layers() const { return static_cast<int>(widths.size()) - 1; }
  int outputs() const { return widths.back(); }
  Layer function(int l) const {
    Layer layer{};
    layer.kind = Kind::pointwise;
    return with(layer, functions[l]);
  }
  std::string name() const {
    std::string text = loss == Loss::mse ? "mse" : "cross entropy";
    for (const int width : widths) text += " " + std::to_string(width);
    for (const Function f : functions) text += " f" + std::to_string(static_cast<int>(f));
    return text + " n " + std::to_string(support) + ", " + std::to_string(query) + " K " +
           std::to_string(steps) + (first_order ? " first order" : "");
  }
};

/// The parameters of all layers, each w [in, out] and then b [out] (zeros where there is none).
template <class S>
using Parameters = std::vector<S>;

struct Samples {
  int n;
  std::vector<double> x, y;  // labels, or targets [n, out]
};

template <class S>
struct Answer {
  S loss = S(0);
  std::vector<S> z;
  Parameters<S> gradient;
};

template <class S>
Answer<S> answer_of(const Net& net, const Parameters<S>& phi, const Samples& data) {
  Answer<S> answer;
  answer.gradient.assign(phi.size(), S(0));
  const int c = net.outputs();
  for (int i = 0; i < data.n; ++i) {
    std::vector<std::vector<S>> x(net.layers() + 1), slope(net.layers());
    for (int j = 0; j < net.widths[0]; ++j) x[0].push_back(S(data.x[i * net.widths[0] + j]));
    size_t at = 0;
    std::vector<size_t> start;
    for (int l = 0; l < net.layers(); ++l) {
      const int in = net.widths[l], out = net.widths[l + 1];
      start.push_back(at);
      for (int j = 0; j < out; ++j) {
        S z = phi[at + static_cast<size_t>(in * out + j)];
        for (int k = 0; k < in; ++k) z += x[l][k] * phi[at + static_cast<size_t>(k * out + j)];
        const bool last = l + 1 == net.layers();
        const Dual<S> f = last ? Dual<S>(z, S(1)) : f_of(net.function(l), Dual<S>(z, S(1)));
        x[l + 1].push_back(f.v), slope[l].push_back(f.d);
      }
      at += static_cast<size_t>((in + 1) * out);
    }
    const std::vector<S>& z = x.back();
    answer.z.insert(answer.z.end(), z.begin(), z.end());
    std::vector<S> d(c);
    S sum(0);
    for (int j = 0; j < c; ++j) sum += exp(z[j]);
    for (int j = 0; j < c; ++j) {
      if (net.loss == Loss::mse) {
        const S r = z[j] - S(data.y[i * c + j]), count(data.n * c);
        answer.loss += r * r / count, d[j] = S(2) * r / count;
      } else {
        const bool is_label = j == static_cast<int>(data.y[i]);
        if (is_label) answer.loss += (log(sum) - z[j]) / S(data.n);
        d[j] = (exp(z[j]) / sum - S(is_label ? 1 : 0)) / S(data.n);
      }
    }
    for (int l = net.layers() - 1; l >= 0; --l) {
      const int in = net.widths[l], out = net.widths[l + 1];
      std::vector<S> before(in, S(0));
      for (int j = 0; j < out; ++j) {
        d[j] = d[j] * slope[l][j];
        if (net.biases[l]) answer.gradient[start[l] + static_cast<size_t>(in * out + j)] += d[j];
        for (int k = 0; k < in; ++k) {
          const size_t w = start[l] + static_cast<size_t>(k * out + j);
          answer.gradient[w] += x[l][k] * d[j], before[k] += d[j] * phi[w];
        }
      }
      d = before;
    }
  }
  return answer;
}

struct Truth {
  std::vector<double> support_losses, z, gradient;
  double query_loss;
};

Truth meta_step(const Net& net, const Parameters<double>& theta, const Parameters<double>& rates,
                const Samples& support, const Samples& query) {
  Truth truth;
  std::vector<Parameters<double>> phi{theta};
  for (int k = 0; k < net.steps; ++k) {
    const auto a = answer_of(net, phi[k], support);
    truth.support_losses.push_back(a.loss);
    phi.push_back(phi[k]);
    for (size_t i = 0; i < theta.size(); ++i) phi[k + 1][i] -= rates[i] * a.gradient[i];
  }
  const auto a = answer_of(net, phi[net.steps], query);
  truth.z = a.z, truth.query_loss = a.loss, truth.gradient = a.gradient;
  for (int k = net.steps - 1; k >= 0 && !net.first_order; --k) {
    Parameters<Dual<double>> moving;
    for (size_t i = 0; i < theta.size(); ++i) moving.emplace_back(phi[k][i], rates[i] * truth.gradient[i]);
    const auto product = answer_of(net, moving, support).gradient;
    for (size_t i = 0; i < theta.size(); ++i) truth.gradient[i] -= product[i].d;
  }
  return truth;
}

/// The plan; the rate of parameter p is 0.1 + 0.02 p.
Problem problem_of(const Net& net, int64_t bytes) {
  Graph graph;
  graph.loss = net.loss;
  std::vector<Update> updates;
  auto parameter = [&](int64_t rows, int64_t size) {
    graph.parameters.push_back({size, rows, 1, Role::adapted});
    Update update;
    update.hyper[kRate].constant = 0.1 + 0.02 * static_cast<double>(updates.size());
    updates.push_back(update);
    return static_cast<int>(updates.size()) - 1;
  };
  auto append = [&](Layer layer, std::vector<int> parameters, int in, int out) {
    Node node{};
    node.layer = layer, node.name = "layer", node.in_features = in, node.out_features = out;
    node.inputs = {static_cast<int>(graph.nodes.size())};
    node.parameters = std::move(parameters);
    graph.nodes.push_back(node);
  };
  for (int l = 0; l < net.layers(); ++l) {
    const int in = net.widths[l], out = net.widths[l + 1];
    Layer linear{};
    linear.kind = Kind::conv2d;
    const int w = parameter(out, int64_t{1} * in * out), b = net.biases[l] ? parameter(1, out) : -1;
    append(linear, {w, b}, in, out);
    if (l + 1 < net.layers()) append(net.function(l), {}, 0, 0);
  }
  Layer flatten{};
  flatten.kind = Kind::flatten;
  append(flatten, {}, 0, 0);
  graph.prediction = static_cast<int>(graph.nodes.size());
  return Problem(graph, Operation::meta_gradient, updates, {}, {net.widths[0]}, net.support, net.query,
                 net.steps, net.first_order, {}, false, bytes,
                 {[](const Layer&) { return Footprint{}; }, Kind::norm_block});
}

template <class T>
void check(const Net& net) {
  const std::string name = net.name() + (sizeof(T) == 4 ? " float" : " double");
  const double tolerance = sizeof(T) == 4 ? 1e-4 : 1e-11;
  constexpr int kTasks = 2;
  const Problem problem = problem_of(net, sizeof(T));
  const std::optional<SmallMlp> small = small_mlp_of<T>(problem, 0);
  expect(small.has_value(), name + " is served");
  if (!small) return;
  std::mt19937 rng(3);
  auto rounded = [&](int count, double scale) {
    std::vector<double> values = random_values(rng, count);
    for (double& v : values) v = static_cast<double>(static_cast<T>(scale * v));
    return values;
  };
  const SpanOrder order(static_cast<int>(problem.graph.parameters.size()), 0, false, false);
  std::vector<Span> spans(order.count), table(order.count);
  std::vector<std::vector<T>> tensors;
  tensors.reserve(64);
  auto give = [&](int span, std::vector<T> values, size_t stride) {
    tensors.push_back(std::move(values));
    spans[span] = {reinterpret_cast<unsigned char*>(tensors.back().data()),
                   static_cast<int64_t>(stride * sizeof(T))};
    return tensors.back().data();
  };
  auto at = [](Region region) { return static_cast<int>(region); };
  Parameters<double> theta, rates;
  int p = 0;
  for (int l = 0; l < net.layers(); ++l) {
    const int in = net.widths[l], out = net.widths[l + 1];
    const std::vector<double> w = rounded(in * out, 1.2 / std::sqrt(in)), b = rounded(out, 0.5);
    std::vector<T> users(in * out);
    for (int i = 0; i < in; ++i) {
      for (int j = 0; j < out; ++j) users[j * in + i] = static_cast<T>(w[i * out + j]);
    }
    theta.insert(theta.end(), w.begin(), w.end());
    rates.insert(rates.end(), w.size(), problem.updates[p].rate().constant);
    give(order.parameters + p++, users, 0);
    for (const double v : b) theta.push_back(net.biases[l] ? v : 0);
    rates.insert(rates.end(), b.size(), net.biases[l] ? problem.updates[p].rate().constant : 0);
    if (net.biases[l]) give(order.parameters + p++, std::vector<T>(b.begin(), b.end()), 0);
  }
  std::vector<std::vector<int64_t>> labels;
  labels.reserve(2);
  auto draw = [&](int n, Region x_region, Region y_region) {
    std::vector<Samples> sets;
    std::vector<T> x, y;
    labels.emplace_back();
    for (int task = 0; task < kTasks; ++task) {
      Samples set{n, rounded(n * net.widths[0], 1), rounded(n * net.outputs(), 1)};
      for (int i = 0; net.loss == Loss::cross_entropy && i < n; ++i) {
        set.y[i] = static_cast<double>(rng() % static_cast<unsigned>(net.outputs()));
        labels.back().push_back(static_cast<int64_t>(set.y[i]));
      }
      x.insert(x.end(), set.x.begin(), set.x.end()), y.insert(y.end(), set.y.begin(), set.y.end());
      sets.push_back(set);
    }
    give(at(x_region), x, static_cast<size_t>(n * net.widths[0]));
    give(at(y_region), y, static_cast<size_t>(n * net.outputs()));
    if (net.loss == Loss::cross_entropy) {
      spans[at(y_region)] = {reinterpret_cast<unsigned char*>(labels.back().data()), n * 8};
    }
    return sets;
  };
  const auto support = draw(net.support, Region::x_support, Region::y_support);
  const auto query = draw(net.query, Region::x_query, Region::y_query);
  auto output = [&](Region region, size_t size) {
    return give(at(region), std::vector<T>(kTasks * size, std::numeric_limits<T>::quiet_NaN()), size);
  };
  const size_t outputs = static_cast<size_t>(net.query * net.outputs());
  const auto result_size = static_cast<size_t>(problem.result_size);
  const T *logits = output(Region::logits, outputs), *query_losses = output(Region::task_losses, 1),
          *support_losses = output(Region::support_losses, static_cast<size_t>(net.steps)),
          *results = output(Region::task, result_size);
  Table none{};
  launch_small_mlp<T>({nullptr, kTasks, memory_of(none)}, *small, spans.data(), order, table.data());
  for (int s = 0; s < order.count; ++s) {
    expect(table[s].start == spans[s].start && table[s].stride == spans[s].stride, name + ": the table");
  }
  for (int task = 0; task < kTasks; ++task) {
    const Truth truth = meta_step(net, theta, rates, support[task], query[task]);
    const std::string of_task = name + " task " + std::to_string(task);
    compare(support_losses + task * net.steps, truth.support_losses, tolerance, of_task + " support losses");
    compare(query_losses + task, {truth.query_loss}, tolerance, of_task + " loss");
    compare(logits + task * outputs, truth.z, tolerance, of_task + " logits");
    size_t from = 0;
    p = 0;
    for (int l = 0; l < net.layers(); ++l) {
      const int sizes[2] = {net.widths[l] * net.widths[l + 1], net.biases[l] ? net.widths[l + 1] : 0};
      for (const int size : sizes) {
        const std::vector<double> want(truth.gradient.begin() + from, truth.gradient.begin() + from + size);
        if (size) compare(results + task * result_size + problem.packing.at[p++], want, tolerance, of_task);
        from += size;
      }
      if (!net.biases[l]) from += net.widths[l + 1];
    }
  }
}

void check_all() {
  using F = Function;
  const std::vector<bool> all(4, true);
  const Net nets[] = {
      {{1, 40, 40, 1}, {F::relu, F::relu}, all, Loss::mse, 10, 10, 2},
      {{3, 17, 9, 4}, {F::tanh, F::silu}, all, Loss::cross_entropy, 5, 4, 2},
      {{2, 41, 6}, {F::gelu}, all, Loss::cross_entropy, 3, 7, 1},
      {{5, 7, 8, 6, 2}, {F::softplus, F::leaky_relu, F::elu}, {true, false, true, false}, Loss::mse, 6, 3, 3},
      {{4, 11, 3}, {F::sigmoid}, all, Loss::mse, 9, 1, 2, true},
      {{64, 19, 64}, {F::hardtanh}, all, Loss::cross_entropy, 2, 3, 1},
      {{6, 5, 70}, {F::gelu_tanh}, all, Loss::cross_entropy, 4, 5, 2, true},
      {{5, 3}, {}, all, Loss::mse, 3, 5, 2},
      {{1, 1, 1}, {F::tanh}, {false, false}, Loss::mse, 1, 1, 1},
  };
  for (const Net& net : nets) {
    check<float>(net);
    check<double>(net);
  }
}

}  // namespace
}  // namespace maml::cuda

using namespace maml::cuda;

int main(int argc, char** argv) {
  in_schedules(argc, argv, check_all);
  return report();
}
