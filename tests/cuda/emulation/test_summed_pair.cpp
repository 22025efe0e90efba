// A convolution whose gradients' kernel adds up what it writes for the normalisation before it
// (run/summed_pair.h), on the CPU: the normalisation's gradients against plain loops in double, and the same
// bits for any number of tasks and in every schedule of the emulation.
#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "conv2d_reference.h"
#include "cuda/run/summed_pair.h"
#include "emulation.h"
#include "layer_harness.h"

namespace maml::cuda {
namespace {

Layer normalisation(Kind kind, int64_t n, Image in, Function f = Function::relu) {
  Layer l{};
  l.kind = kind;
  l.n = n;
  l.in = l.out = in;
  l.eps = 0.1;
  return with(l, f);
}

/// With a max-pool; not all pixels are in a window, and some are in two.
Layer pooled(Layer l, Window k) {
  l.window = k;
  l.pooled = true;
  l.out.h = (l.in.h - k.kernel_h) / k.stride_h + 1;
  l.out.w = (l.in.w - k.kernel_w) / k.stride_w + 1;
  return l;
}

/// A convolution of the normalisation's output.
Layer convolution(const Layer& norm, int64_t out, Window k, Precision precision = Precision::float32) {
  Layer l{};
  l.kind = Kind::conv2d;
  l.n = norm.n;
  l.in = norm.out;
  l.window = k;
  l.out = {out, (l.in.h + 2 * k.pad_top - k.kernel_h) / k.stride_h + 1,
           (l.in.w + 2 * k.pad_left - k.kernel_w) / k.stride_w + 1};
  l.precision = precision;
  return l;
}

/// Which tensors are there, besides those that always are.
struct Has {
  bool affine = true, x_moves = true, w_moves = true, weight = true;
};

template <class T>
std::vector<T> check_pair(const Layer& norm, const Layer& conv, Has has, int64_t tasks, double tolerance) {
  std::string name = text_of(norm, {}) + ", conv kernel " + std::to_string(conv.window.kernel_h) + "/" +
                     std::to_string(conv.window.stride_h) + " out " + std::to_string(conv.out.c) + " float" +
                     std::to_string(8 * sizeof(T)) + " precision " +
                     std::to_string(static_cast<int>(conv.precision)) + (has.affine ? "" : " plain") +
                     (has.x_moves ? "" : " x fixed") + (has.w_moves ? "" : " w fixed");
  const int64_t in = count_in(norm), mid = count_out(norm), out = conv.n * size(conv.out), c = norm.in.c;
  const int64_t weights = conv2d_reference::weights(conv);
  const Footprint of_norm = footprint(norm), of_conv = footprint(conv);
  const int64_t scratch = std::max(of_norm.scratch, of_conv.scratch);
  TestMemory<T> memory(tasks, 4 * in + 4 * mid + 2 * out + 4 * weights + 4 * conv.out.c + 8 * c +
                                  of_norm.saved + scratch + 100 * kGap);
  Tensors<T> n, k;
  n.x[0] = memory.take(in), n.grad_x[0] = memory.take(in), n.grad_x_dot[0] = memory.take(in);
  n.x_dot[0] = has.x_moves ? memory.take(in) : nullptr;
  for (int j = 0; j < 2 && has.affine; ++j) {
    n.w[j] = memory.take(c), n.w_dot[j] = memory.take(c);
    n.grad_w[j] = memory.take(c), n.grad_w_dot[j] = memory.take(c);
  }
  n.y = memory.take(mid), n.y_dot = memory.take(mid);
  T *g = memory.take(mid), *g_dot = memory.take(mid);
  n.grad_y = g, n.grad_y_dot = g_dot, k.grad_x[0] = g, k.grad_x_dot[0] = g_dot;
  n.saved = memory.take(of_norm.saved);
  n.scratch = k.scratch = memory.take(scratch);
  k.x[0] = n.y, k.x_dot[0] = n.y_dot;
  k.w[0] = memory.take(weights), k.w_dot[0] = has.w_moves ? memory.take(weights) : nullptr;
  if (has.weight) {
    k.grad_w[0] = memory.take(weights), k.grad_w_dot[0] = memory.take(weights);
    k.grad_w[1] = memory.take(conv.out.c), k.grad_w_dot[1] = memory.take(conv.out.c);
  }
  k.grad_y = memory.take(out), k.grad_y_dot = memory.take(out);

  std::mt19937 rng(7);
  auto input = [&](const T* symbolic, int64_t task, int64_t count) {
    auto values = random_values(rng, count);
    for (double& v : values) v = symbolic ? static_cast<double>(static_cast<T>(v)) : 0.0;
    if (symbolic) memory.fill(const_cast<T*>(symbolic), task, values);
    return values;
  };
  std::vector<Values<Dual<double>>> truth(tasks);
  for (int64_t task = 0; task < tasks; ++task) {
    Values<Dual<double>>& v = truth[task];
    const auto x = input(n.x[0], task, in), x_dot = input(n.x_dot[0], task, in);
    v.x[0] = dual(x, x_dot, true);
    for (int j = 0; j < 2 && has.affine; ++j) {
      const auto w = input(n.w[j], task, c), w_dot = input(n.w_dot[j], task, c);
      v.w[j] = dual(w, w_dot, true);
    }
    const auto w = input(k.w[0], task, weights), w_dot = input(k.w_dot[0], task, weights);
    const auto of_y = input(k.grad_y, task, out), of_y_dot = input(k.grad_y_dot, task, out);
    std::vector<double> own(mid), moving(mid);
    conv2d_reference::add_input_gradient(conv, of_y, w, own);
    conv2d_reference::add_input_gradient(conv, of_y_dot, w, moving);
    conv2d_reference::add_input_gradient(conv, of_y, w_dot, moving);
    v.g = dual(own, moving, true);
    reference(norm, v);
  }

  const Launcher launch = memory.launcher();
  passes_of<T>(norm.kind).forward(launch, norm, n);
  auto pair = [&](Op op) {
    memory.poison(n.scratch, scratch);
    Instruction<T> first{}, second{};
    first.op = second.op = op;
    first.layer = conv, first.tensors = k, second.layer = norm, second.tensors = n;
    expect(is_summed_pair(first, second), name + ": is not launched together");
    launch_summed_pair(launch, first, second, 0);
    first.tensors.add_x[0] = true;
    expect(!is_summed_pair(first, second), name + ": is launched together though another layer has added");
  };
  pair(Op::backward);
  passes_of<T>(norm.kind).forward_tangent(launch, norm, n);
  pair(Op::backward_tangent);

  std::vector<T> bits;
  auto check = [&](T* symbolic, int64_t task, const std::vector<Dual<double>>& want, bool dot,
                   const char* what) {
    if (!symbolic) return;
    const T* got = memory.real(symbolic, task);
    compare(got, part(want, dot), tolerance, name + ", task " + std::to_string(task) + ", " + what);
    bits.insert(bits.end(), got, got + want.size());
  };
  for (int64_t task = 0; task < tasks; ++task) {
    const Values<Dual<double>>& v = truth[task];
    check(n.grad_x[0], task, v.grad_x[0], false, "grad_x");
    check(n.grad_x_dot[0], task, v.grad_x[0], true, "grad_x_dot");
    for (int j = 0; j < 2; ++j) {
      check(n.grad_w[j], task, v.grad_w[j], false, j ? "grad_beta" : "grad_gamma");
      check(n.grad_w_dot[j], task, v.grad_w[j], true, j ? "grad_beta_dot" : "grad_gamma_dot");
    }
  }
  expect(memory.gaps_untouched(), name + ": wrote beyond a tensor");
  return bits;
}

const Window kThree{3, 3, 1, 1, 1, 1}, kStrided{3, 3, 2, 2, 1, 1}, kUneven{2, 3, 3, 2, 0, 1}, kOne{};

/// Every shape, and what it shows. There must be more rows than one tile of the normalisation has.
void check_all() {
  static std::map<std::string, std::vector<double>> before;  // of the first schedule
  int number = 0;
  auto both = [&](const Layer& norm, const Layer& conv, Has has = {}) {
    const auto first = check_pair<double>(norm, conv, has, 1, 1e-12);
    expect(same_bits(first, check_pair<double>(norm, conv, has, 3, 1e-12)),
           "the bits depend on the number of tasks");
    auto [at, is_new] = before.try_emplace(std::to_string(number++), first);
    expect(is_new || same_bits(at->second, first), "the bits depend on the schedule");
  };
  const Layer images = normalisation(Kind::norm_block, 5, {9, 7, 6});
  const Layer windows = pooled(normalisation(Kind::norm_block, 4, {12, 13, 14}), {3, 2, 2, 2, 0, 0});
  both(images, convolution(images, 8, kThree));
  both(images, convolution(images, 40, kStrided));  // four parity classes
  both(images, convolution(images, 5, kUneven));    // classes without taps
  both(windows, convolution(windows, 8, kThree));
  both(windows, convolution(windows, 12, kStrided), {.weight = false});
  const Layer leaky =
      pooled(normalisation(Kind::norm_block, 4, {8, 13, 12}, Function::leaky_relu), {2, 2, 2, 2, 0, 0});
  both(leaky, convolution(leaky, 4, kThree), {.affine = false});
  const Layer plain = normalisation(Kind::batch_norm, 3, {33, 7, 8});  // two columns of tiles
  both(plain, convolution(plain, 8, kThree), {.x_moves = false});
  both(plain, convolution(plain, 8, kThree), {.w_moves = false});
  const Layer rows = normalisation(Kind::batch_norm, 300, {40, 1, 1});  // a linear layer
  both(rows, convolution(rows, 7, kOne));
  const Layer many = normalisation(Kind::norm_block, 3, {32, 22, 21});  // sums of sums
  both(many, convolution(many, 8, kThree));
  both(many, convolution(many, 4, kStrided));
  for (const Precision precision : {Precision::float32, Precision::bf16x3}) {
    const Layer long_ = normalisation(Kind::batch_norm, 9, {36, 13, 14});
    check_pair<float>(long_, convolution(long_, 8, kThree, precision), {}, 2, 1e-4);
  }
}

}  // namespace
}  // namespace maml::cuda

int main(int argc, char** argv) {
  using namespace maml::cuda;
  in_schedules(argc, argv, check_all);
  return report();
}
