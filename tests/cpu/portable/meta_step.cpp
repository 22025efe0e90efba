// One second-order meta-step of the CPU core without Python, for machines that are only emulated:
//   meta_step conv|mlp < numbers > numbers
// Reads doubles: all parameters in the user's order, then for the support and the query set of all tasks x
// and the labels. Writes: the losses of the tasks, then the meta-gradient. test_aarch64.py has the same two
// nets.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/run/backend.h"
#include "layers/functions.h"
#include "layers/kinds.h"

using namespace maml;

namespace {

constexpr int64_t kTasks = 5, kSupport = 6, kQuery = 7, kClasses = 3;
constexpr int kSteps = 2;
constexpr double kLearningRate = 0.1;

/// A graph that grows at its end.
struct Net {
  Graph graph;
  std::vector<int64_t> sample;
  int value = 0;  // the last one

  Node& append(Kind kind) {
    Node node{};
    node.layer.kind = kind;
    node.name = "node " + std::to_string(value);
    node.inputs = {value++};
    graph.nodes.push_back(node);
    return graph.nodes.back();
  }
  int parameter(int64_t size, int64_t rows, int64_t taps) {
    graph.parameters.push_back({size, rows, taps, Role::adapted});
    return static_cast<int>(graph.parameters.size()) - 1;
  }
  void product(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, SampleLayout layout) {
    Node& node = append(Kind::conv2d);
    node.layer.window = {kernel, kernel, stride, stride, pad, pad};
    node.pad_end = {pad, pad};
    node.in_features = in, node.out_features = out, node.layouts = {layout};
    node.parameters = {parameter(in * out * kernel * kernel, out, kernel * kernel), parameter(out, 1, 1)};
  }
  void batch_norm(int64_t channels) {
    Node& node = append(Kind::batch_norm);
    node.layer.eps = 1e-5;
    node.in_features = channels, node.layouts = {SampleLayout::image};
    node.parameters = {parameter(channels, 1, 1), parameter(channels, 1, 1)};
  }
  void function(Function f) { append(Kind::pointwise).layer.function = f; }
  void max_pool() {
    Node& node = append(Kind::max_pool);
    node.layer.window = {2, 2, 2, 2, 0, 0};
    node.layouts = {SampleLayout::image};
  }
  void flatten() { append(Kind::flatten).out_layout = SampleLayout::features; }
};

Net conv() {
  Net net;
  net.sample = {2, 9, 8};
  net.append(Kind::channels_last);
  net.product(2, 5, 3, 1, 1, SampleLayout::image);
  net.batch_norm(5);
  net.function(Function::tanh);
  net.max_pool();
  net.product(5, 19, 3, 2, 1, SampleLayout::image);
  net.batch_norm(19);
  net.function(Function::silu);
  net.flatten();
  net.product(19 * 2 * 2, kClasses, 1, 1, 0, SampleLayout::features);
  net.flatten();
  return net;
}

Net mlp() {
  Net net;
  net.sample = {3};
  net.product(3, 21, 1, 1, 0, SampleLayout::features);
  net.function(Function::gelu);
  net.product(21, kClasses, 1, 1, 0, SampleLayout::features);
  net.flatten();
  return net;
}

std::vector<double> read(int64_t count) {
  std::vector<double> numbers(static_cast<size_t>(count));
  if (std::fread(numbers.data(), sizeof(double), numbers.size(), stdin) != numbers.size()) std::exit(2);
  return numbers;
}

void write(const std::vector<double>& numbers) {
  std::fwrite(numbers.data(), sizeof(double), numbers.size(), stdout);
}

}  // namespace

int main(int count, char** words) {
  Net net = count == 2 && std::strcmp(words[1], "mlp") == 0 ? mlp() : conv();
  net.graph.prediction = net.value;
  Update update;
  update.hyper[kRate].constant = kLearningRate;
  const std::vector<Update> updates(net.graph.parameters.size(), update);
  const cpu::Backend& backend = cpu::backend();
  const Problem problem(net.graph, Operation::meta_gradient, updates, {}, net.sample, kSupport, kQuery,
                        kSteps, false, {}, false, sizeof(double), backend.traits);
  Call<double> call;
  call.tasks = kTasks;
  call.at_once = 2;
  std::vector<std::vector<double>> parameters;
  int64_t size = 0, sample = 1;
  for (const Parameter& p : problem.graph.parameters) {
    parameters.push_back(read(p.size));
    size += p.size;
  }
  for (const auto& p : parameters) call.parameters.push_back(p.data());
  for (int64_t d : net.sample) sample *= d;
  std::vector<double> x[2];
  std::vector<int64_t> y[2];
  for (int set = 0; set < 2; ++set) {
    const int64_t n = kTasks * (set == 0 ? kSupport : kQuery);
    x[set] = read(n * sample);
    for (double label : read(n)) y[set].push_back(static_cast<int64_t>(label));
  }
  std::vector<double> losses(kTasks), support_losses(kTasks * kSteps), gradient(static_cast<size_t>(size));
  std::vector<double> logits(kTasks * kQuery * kClasses);
  double loss = 0;
  std::vector<double> workspace(
      static_cast<size_t>(backend.workspace_double(problem, call.tasks, call.at_once)));
  call.x_support = x[0].data(), call.y_support.y = y[0].data();
  call.x_query = x[1].data(), call.y_query.y = y[1].data();
  call.loss = &loss, call.task_losses = losses.data(), call.logits = logits.data();
  call.support_losses = support_losses.data(), call.gradient = gradient.data();
  call.workspace = workspace.data();
  backend.run_double(problem, call);
  write(losses);
  write(gradient);
}
