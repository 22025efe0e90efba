// The CUDA layers other than the convolution, on the CPU: every pass of every layer against its reference
// (layer_references.h), with odd shapes, several tasks and every optional tensor absent, and the same bits in
// every schedule of the emulation.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/add.h"
#include "cuda/channels.h"
#include "cuda/loss.h"
#include "cuda/pointwise.h"
#include "emulation.h"
#include "layer_harness.h"

namespace maml::cuda {
namespace {

Layer layer(Kind kind, int64_t n, Image in) {
  Layer l{};
  l.kind = kind;
  l.n = n;
  l.in = l.out = in;
  l.eps = 0.1;
  return l;
}

/// The layer over a window; pad_end rows and columns behind the image too.
Layer over(Layer l, Window k, int64_t pad_end = 0) {
  l.window = k;
  l.pooled = l.kind == Kind::norm_block;
  l.out.h = (l.in.h + k.pad_top + pad_end - k.kernel_h) / k.stride_h + 1;
  l.out.w = (l.in.w + k.pad_left + pad_end - k.kernel_w) / k.stride_w + 1;
  return l;
}

Layer grouped(int64_t n, Image in, int64_t groups) {
  Layer l = layer(Kind::group_norm, n, in);
  l.groups = groups;
  return l;
}

std::vector<Function> activations() {
  std::vector<Function> all;
  for (int f = 0; f < static_cast<int>(Function::of_maps); ++f) all.push_back(static_cast<Function>(f));
  return all;
}

const Window kWindows[] = {{2, 2, 2, 2, 0, 0}, {3, 3, 2, 2, 1, 1}, {3, 2, 1, 1, 1, 0},
                           {2, 3, 3, 4, 0, 1}, {5, 4, 2, 3, 2, 2}, {1, 1, 1, 1, 0, 0}};

/// What may be absent of a layer with parameters, one after the other.
std::vector<Present> presences() {
  std::vector<Present> all(1);
  auto vary = [&](auto change) {
    Present p;
    change(p);
    all.push_back(p);
  };
  vary([](Present& p) { p.gamma = p.beta = false; });
  vary([](Present& p) { p.beta = false; });
  vary([](Present& p) { p.x_dot = false; });
  vary([](Present& p) { p.x_dot = p.gamma_dot = false; });
  vary([](Present& p) { p.gamma_dot = p.beta_dot = false; });
  vary([](Present& p) { p.x_dot = p.gamma_dot = p.beta_dot = false; });  // does not move
  vary([](Present& p) { p.grad_x = false; });
  vary([](Present& p) { p.grad_gamma = p.grad_beta = false; });
  vary([](Present& p) { p.add = true; });
  vary([](Present& p) { p.statistics = true; });
  vary([](Present& p) { p.statistics = p.add = true, p.x_dot = false; });
  return all;
}

void check_normalisation() {
  for (const Image& in : {Image{1, 1, 1}, Image{5, 1, 1}, Image{8, 3, 4}, Image{17, 5, 3}, Image{33, 2, 2}}) {
    for (const int64_t n : {2, 3, 9}) check_layer<double>(layer(Kind::batch_norm, n, in), {}, 3);
  }
  for (const int64_t n : {15, 16, 17, 32, 33, 64, 65, 300, 700}) {  // one tile, two, and folds
    check_layer<double>(layer(Kind::batch_norm, n, {3, 1, 1}), {});
    Present p;
    p.statistics = true;
    check_layer<double>(layer(Kind::batch_norm, n, {3, 1, 1}), p);
  }
  for (const int64_t n : {1, 2, 15, 16, 17, 33, 65, 300}) {  // one tile, two, and folds
    check_layer<double>(layer(Kind::running_norm, n, {3, 1, 1}), {});
    check_layer<double>(layer(Kind::running_norm, n, {9, 2, 1}), {}, 3);
  }
  check_layer<float>(layer(Kind::running_norm, 50, {9, 2, 2}), {});
  for (const int64_t n : {1, 2, 7, 33}) {  // blocks of one cell and of many; one tile of rows, two, and folds
    for (const int64_t groups : {1, 3, 18}) {
      for (const int64_t side : {1, 2, 5}) check_layer<double>(grouped(n, {18, side, side}, groups), {}, 3);
    }
    check_layer<double>(grouped(n, {150, 1, 1}, 1), {});
  }
  check_layer<float>(grouped(5, {12, 9, 8}, 4), {});
  for (const Present& p : presences()) {
    check_layer<double>(layer(Kind::running_norm, 7, {9, 5, 5}), p);
    for (const int64_t groups : {1, 3, 9}) check_layer<double>(grouped(7, {9, 5, 5}, groups), p);
    check_layer<double>(grouped(5, {6, 1, 1}, 2), p);
    check_layer<double>(layer(Kind::batch_norm, 7, {9, 5, 5}), p);
    for (const Function f : {Function::relu, Function::silu}) {
      check_layer<double>(with(layer(Kind::norm_block, 7, {9, 5, 5}), f), p);
      check_layer<double>(with(over(layer(Kind::norm_block, 7, {9, 5, 5}), kWindows[0]), f), p);
      check_layer<double>(with(over(layer(Kind::norm_block, 3, {5, 7, 6}), kWindows[1], 1), f), p);
    }
  }
  for (const Function f : activations()) {
    check_layer<double>(with(layer(Kind::norm_block, 3, {10, 4, 3}), f), {});
    for (const Window& k : kWindows) {
      check_layer<double>(with(over(layer(Kind::norm_block, 3, {5, 7, 6}), k, k.pad_top), f), {});
    }
    check_layer<float>(with(over(layer(Kind::norm_block, 4, {3, 6, 6}), kWindows[0]), f), {});
  }
  check_layer<double>(with(over(layer(Kind::norm_block, 40, {3, 6, 6}), kWindows[0]), Function::tanh),
                      {});  // folds
  check_layer<float>(layer(Kind::batch_norm, 50, {9, 2, 2}), {});
}

void check_the_others() {
  Present plain, added, none, fixed, second;
  added.add = true;
  none.grad_x = false;
  fixed.x_dot = fixed.second_dot = false;
  second.x_dot = false;
  Layer scaled = layer(Kind::scale, 3, {5, 7, 6});
  scaled.a = -1.7;
  for (const Present& p : {plain, added, none, fixed}) {
    for (const Function f : activations()) {
      check_layer<double>(with(layer(Kind::pointwise, 5, {7, 3, 3}), f), p);
    }
    for (const Kind kind : {Kind::channels_last, Kind::flatten}) {
      for (const Image& in :
           {Image{1, 4, 5}, Image{3, 7, 7}, Image{9, 3, 3}, Image{8, 4, 4}, Image{17, 5, 5}}) {
        check_layer<double>(layer(kind, 3, in), p);
      }
    }
    for (const Window& k : kWindows) {
      check_layer<double>(over(layer(Kind::max_pool, 3, {5, 7, 6}), k, k.pad_top), p);
      Layer mean = over(layer(Kind::avg_pool, 3, {5, 7, 6}), k, k.pad_top);
      check_layer<double>(mean, p);
      mean.count_padding = false;
      check_layer<double>(mean, p);
    }
    for (const Image& in : {Image{1, 1, 1}, Image{3, 5, 4}, Image{19, 2, 7}}) {
      Layer mean = layer(Kind::mean_pool, 3, in);
      mean.out = {in.c, 1, 1};
      check_layer<double>(mean, p);
    }
    check_layer<double>(layer(Kind::add, 3, {5, 3, 3}), p);
    check_layer<double>(scaled, p);
  }
  check_layer<double>(layer(Kind::add, 3, {5, 3, 3}), second);
  check_layer<float>(scaled, {});
  check_layer<float>(layer(Kind::flatten, 3, {9, 5, 5}), {});
  check_layer<float>(over(layer(Kind::max_pool, 3, {5, 7, 6}), kWindows[1], 1), {});
  check_layer<float>(over(layer(Kind::avg_pool, 3, {5, 7, 6}), kWindows[1], 1), {});
  for (const Function f : activations()) {
    check_layer<float>(with(layer(Kind::pointwise, 5, {7, 3, 3}), f), {});
  }
}

/// Rows of whole vectors and others, and the same bits whether tensors start at aligned addresses or not.
template <class T>
void check_access(int64_t c) {
  const Image in{c, 5, 4};
  Layer scaled = layer(Kind::scale, 3, in), mean = layer(Kind::mean_pool, 3, in);
  scaled.a = -1.7, mean.out = {c, 1, 1};
  const Layer layers[] = {layer(Kind::batch_norm, 3, in),
                          with(layer(Kind::norm_block, 3, in), Function::silu),
                          with(over(layer(Kind::norm_block, 3, in), kWindows[0]), Function::relu),
                          with(over(layer(Kind::norm_block, 1, in), kWindows[1], 1), Function::tanh),
                          layer(Kind::running_norm, 3, in),
                          over(layer(Kind::max_pool, 3, in), kWindows[1], 1),
                          over(layer(Kind::avg_pool, 3, in), kWindows[1], 1),
                          mean,
                          with(layer(Kind::pointwise, 3, in), Function::silu),
                          layer(Kind::add, 3, in),
                          scaled};
  for (const Layer& l : layers) {
    for (const bool add : {false, true}) {
      Present p;
      p.add = add;
      const auto bits = check_layer<T>(l, p, 2);
      for (misaligned = 1; misaligned < 4; misaligned += 2) {
        expect(same_bits(bits, check_layer<T>(l, p, 2)), text_of(l, p) + ": the bits depend on the address");
      }
      misaligned = 0;
    }
  }
}

/// The same bits in every schedule, and for a task whatever its neighbours are.
void check_bits() {
  const Layer layers[] = {with(over(layer(Kind::norm_block, 9, {9, 7, 7}), kWindows[1], 1), Function::gelu),
                          layer(Kind::batch_norm, 300, {3, 1, 1}),
                          layer(Kind::running_norm, 300, {3, 1, 1}),
                          grouped(9, {12, 5, 4}, 4),
                          grouped(40, {7, 1, 1}, 1),
                          over(layer(Kind::max_pool, 3, {5, 7, 6}), kWindows[2]),
                          layer(Kind::channels_last, 2, {9, 3, 5})};
  for (const Layer& l : layers) {
    emulation::set_schedule(emulation::Schedule::forward);
    const auto first = check_layer<float>(l, {}, 1);
    const auto several = check_layer<float>(l, {}, 3);
    expect(same_bits(first, several), text_of(l, {}) + ": a task depends on its neighbours");
    for (const auto schedule : {emulation::Schedule::backward, emulation::Schedule::shuffled}) {
      emulation::set_schedule(schedule, 7);
      expect(same_bits(several, check_layer<float>(l, {}, 3)),
             text_of(l, {}) + ": the bits depend on the schedule");
    }
  }
}

/// Ties, NaN and infinity: the first maximum, any NaN; relu passes NaN on.
void check_special_values() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  TestMemory<double> memory(1, 1000);
  Layer pool = over(layer(Kind::max_pool, 1, {1, 2, 4}), kWindows[0]);
  Tensors<double> t;
  t.x[0] = memory.take(8), t.y = memory.take(2), t.saved = memory.take(2);
  memory.fill(const_cast<double*>(t.x[0]), 0, {1, 3, nan, 2, 3, 3, 5, nan});
  passes_of<double>(Kind::max_pool).forward(memory.launcher(), pool, t);
  const auto* places = reinterpret_cast<int32_t*>(memory.real(t.saved, 0));
  expect(memory.real(t.y, 0)[0] == 3 && places[0] == 1, "max_pool: the first of equal values");
  expect(std::isnan(memory.real(t.y, 0)[1]) && places[1] == 7, "max_pool: the last NaN");

  Layer relu = layer(Kind::pointwise, 1, {1, 1, 4});
  Tensors<double> r;
  r.x[0] = memory.take(4), r.y = memory.take(4);
  memory.fill(const_cast<double*>(r.x[0]), 0, {nan, -0.0, -1, INFINITY});
  passes_of<double>(Kind::pointwise).forward(memory.launcher(), relu, r);
  const double* y = memory.real(r.y, 0);
  expect(std::isnan(y[0]) && y[1] == 0 && y[2] == 0 && y[3] == INFINITY, "relu of NaN, -0, -1 and infinity");

  // A block of relu whose windows are all below zero chooses each first pixel, and hands nothing back.
  Layer block_layer = over(layer(Kind::norm_block, 2, {1, 2, 2}), kWindows[0]);
  Tensors<double> b;
  const Footprint needs = footprint(block_layer);
  b.x[0] = memory.take(8), b.y = memory.take(2), b.saved = memory.take(needs.saved);
  b.scratch = memory.take(needs.scratch), b.w[0] = memory.take(1), b.w[1] = memory.take(1);
  memory.fill(const_cast<double*>(b.x[0]), 0, {1, 2, 3, 4, 5, 6, 7, 8});
  memory.fill(const_cast<double*>(b.w[0]), 0, {1});
  memory.fill(const_cast<double*>(b.w[1]), 0, {-100});
  passes_of<double>(Kind::norm_block).forward(memory.launcher(), block_layer, b);
  const auto* chosen = reinterpret_cast<int32_t*>(memory.real(b.saved, 0) + 6);
  expect(memory.real(b.y, 0)[0] == 0 && chosen[0] == 0 && chosen[1] == 0, "block: the first of equal zeros");

  // A mean far from zero costs no digits, of channels or of cells.
  Layer norm = layer(Kind::batch_norm, 500, {1, 1, 1});
  TestMemory<float> large(1, 20000);
  Tensors<float> f;
  const Footprint norm_needs = footprint(norm);
  f.x[0] = large.take(500), f.y = large.take(500), f.saved = large.take(norm_needs.saved);
  f.scratch = large.take(norm_needs.scratch);
  norm.eps = 0;
  std::vector<double> x(500);
  for (int i = 0; i < 500; ++i) x[i] = 4096 + (i % 2 ? 1 : -1);  // exact in float; x^2 is not
  large.fill(const_cast<float*>(f.x[0]), 0, x);
  passes_of<float>(Kind::batch_norm).forward(large.launcher(), norm, f);
  bool exact = true;
  for (int i = 0; i < 500; ++i) exact = exact && large.real(f.y, 0)[i] == (i % 2 ? 1 : -1);
  expect(exact, "batch_norm of 4096 +- 1 is +- 1");

  norm = grouped(1, {1, 500, 1}, 1);
  norm.eps = 0;
  f.y = large.take(500), f.saved = large.take(footprint(norm).saved);
  passes_of<float>(Kind::group_norm).forward(large.launcher(), norm, f);
  for (int i = 0; i < 500; ++i) exact = exact && large.real(f.y, 0)[i] == (i % 2 ? 1 : -1);
  expect(exact, "group_norm of 4096 +- 1 is +- 1");
}

// ---- the device functions, one block alone

/// L(f(x) + x) and what follows, in shared memory by one block, as a megakernel does it.
__global__ void one_block(Layer l, const double* x_, const double* target_, double* out_, Deferred deferred) {
  const Memory memory = deferred.ready();
  __shared__ double sums[kWarp];
  const int64_t count = l.n * size(l.in);
  const double *x = resolve(x_, memory, blockIdx.z), *target = resolve(target_, memory, blockIdx.z);
  double* out = resolve(out_, memory, blockIdx.z);
  auto* shared = reinterpret_cast<double*>(dynamic_shared());
  double *input = shared, *a = shared + count, *y = shared + 2 * count, *grad_y = shared + 3 * count,
         *grad_x = shared + 4 * count, *saved = shared + 5 * count, *loss = shared + 6 * count;
  const Team team = block_team();
  for (int64_t i = team.first(); i < count; i += team.step()) input[i] = x[i];
  __syncthreads();
  Tensors<double> t;
  t.x[0] = input, t.y = a;
  pointwise_forward(team, l, t);
  __syncthreads();
  Tensors<double> sum;
  sum.x[0] = a, sum.x[1] = input, sum.y = y;
  add_forward(team, l, sum);
  __syncthreads();
  loss_value(team, LossPart{Loss::mse, l.n, size(l.in), l.n, false}, y, Target<double>{target}, loss, grad_y,
             saved, sums);
  __syncthreads();
  t.grad_y = grad_y, t.grad_x[0] = grad_x;
  pointwise_backward(team, l, t);
  __syncthreads();
  sum.grad_y = grad_y, sum.grad_x[1] = grad_x, sum.add_x[1] = true;
  add_backward(team, l, sum);
  __syncthreads();
  for (int64_t i = team.first(); i < count; i += team.step()) out[i] = grad_x[i];
  if (threadIdx.x == 0) out[count] = *loss;
}

void check_one_block() {
  const Layer l = with(layer(Kind::pointwise, 7, {11, 1, 1}), Function::silu);
  const int64_t count = count_in(l);
  for (const int threads : {32, 96, 256}) {
    TestMemory<double> memory(2, 3 * count + 1 + 6 * kGap);
    double *x = memory.take(count), *target = memory.take(count), *out = memory.take(count + 1);
    std::mt19937 rng(3);
    std::vector<std::vector<double>> want(2);
    for (int64_t task = 0; task < 2; ++task) {
      const auto values = random_values(rng, count), goal = random_values(rng, count);
      memory.fill(x, task, values);
      memory.fill(target, task, goal);
      double loss = 0;
      for (int64_t i = 0; i < count; ++i) {
        const double d = f_of(l, values[i]) + values[i] - goal[i];
        loss += d * d / static_cast<double>(count);
        want[task].push_back(2 * d / static_cast<double>(count) * (df_of(l, values[i]) + 1));
      }
      want[task].push_back(loss);
    }
    const Launcher launch = memory.launcher();
    launch("one block", one_block, Grid{}, threads, (6 * count + 1) * sizeof(double), l, x, target, out,
           launch.memory);
    for (int64_t task = 0; task < 2; ++task) {
      compare(memory.real(out, task), want[task], 1e-13,
              "one block of " + std::to_string(threads) + " threads");
    }
  }
}

/// Sums of 1, 2, .. rows of x [rows, c] by one call after the other, which shares its memory with the last
/// one.
__global__ void sums_of_rows(int rows, int64_t c, const double* x_, double* out_, Deferred deferred) {
  const Memory memory = deferred.ready();
  const ChannelThreads threads = channel_threads(c);
  const double* x = resolve(x_, memory, blockIdx.z) + threads.channel;
  double* out = resolve(out_, memory, blockIdx.z) + threads.channel;
  for (int count = 1; count <= rows; ++count) {
    double sum[2];
    channel_sums(threads, count, sum, [&](int i, double (&s)[2]) { s[0] += x[i * c], s[1] += 1; });
    if (threads.active && threads.row == threads.rows - 1) out[(count - 1) * c] = sum[0] * sum[1];
  }
}

void check_channel_sums() {
  for (const int64_t c : {1, 2, 3, 8, 13}) {
    constexpr int kRows = 70;
    TestMemory<double> memory(2, 2 * kRows * c + 6 * kGap);
    double *x = memory.take(kRows * c), *out = memory.take(kRows * c);
    std::mt19937 rng(4);
    std::vector<std::vector<double>> want(2, std::vector<double>(kRows * c));
    for (int64_t task = 0; task < 2; ++task) {
      const auto values = random_values(rng, kRows * c);
      memory.fill(x, task, values);
      std::vector<double> sum(c);
      for (int i = 0; i < kRows; ++i) {
        for (int64_t j = 0; j < c; ++j) want[task][i * c + j] = (sum[j] += values[i * c + j]) * (i + 1);
      }
    }
    const Launcher launch = memory.launcher();
    launch("sums of rows", sums_of_rows, Grid{1, blocks_for(c, channel_width(c))}, kThreads, 0, kRows, c, x,
           out, launch.memory);
    for (int64_t task = 0; task < 2; ++task) {
      compare(memory.real(out, task), want[task], 1e-13,
              "channel sums of " + std::to_string(c) + " channels");
    }
  }
}

}  // namespace
}  // namespace maml::cuda

using namespace maml::cuda;

int main(int argc, char** argv) {
  in_schedules(argc, argv, [] {
    check_channel_sums();
    check_normalisation();
    check_the_others();
    for (const int64_t c : {1, 2, 3, 5, 6, 7, 8, 12}) check_access<float>(c);
    for (const int64_t c : {2, 3, 8}) check_access<double>(c);
    check_one_block();
    check_special_values();
  });
  if (argc == 1) check_bits();
  return report();
}
