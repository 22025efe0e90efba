// The stem against the layers that it fuses: the same four passes through conv2d, batch_norm, max_pool and
// pointwise in float64. Several tasks, odd shapes, every function, every optional tensor absent, in every
// schedule of the emulation; and each precision against float64.
#include <random>
#include <string>
#include <vector>

#include "emulation.h"
#include "layer_harness.h"
#include "layers/patch_moments.h"

namespace maml::cuda {
namespace {

constexpr int64_t kTasks = 2;

/// One chain from x to y: the tensors of its layers, and those of its parameters.
template <class T>
class Chain {
 public:
  Chain(const Layer& stem, bool moves, bool adds)
      : stem_(stem), memory_(kTasks, 1 << 19), moves_(moves), adds_(adds) {
    const int64_t sizes[] = {patch_size(stem.window, stem.in) * stem.out.c, stem.out.c, stem.out.c,
                             stem.out.c};
    for (int j = 0; j < 4; ++j) {
      w_[j] = memory_.take(sizes[j]), w_dot_[j] = memory_.take(sizes[j]);
      outputs_.push_back({memory_.take(sizes[j]), sizes[j]});
      outputs_.push_back({memory_.take(sizes[j]), sizes[j]});
    }
    const int64_t y = stem.n * size(stem.out);
    x_ = memory_.take(stem.n * size(stem.in));
    grad_y_ = memory_.take(y), grad_y_dot_ = memory_.take(y);
    for (int i = 0; i < 2; ++i) outputs_.push_back({memory_.take(y), y});
    std::mt19937 rng(5);
    for (int64_t task = 0; task < kTasks; ++task) {
      for (int j = 0; j < 4; ++j) {
        memory_.fill(w_[j], task, random_values(rng, sizes[j]));
        memory_.fill(w_dot_[j], task, random_values(rng, sizes[j]));
        if (!adds) continue;
        for (int i = 0; i < 2; ++i) memory_.fill(outputs_[2 * j + i].at, task, random_values(rng, sizes[j]));
      }
      memory_.fill(x_, task, random_values(rng, stem.n * size(stem.in)));
      memory_.fill(grad_y_, task, random_values(rng, y));
      memory_.fill(grad_y_dot_, task, random_values(rng, y));
    }
  }

  /// One layer of the chain, with the chain's parameters [first, first + count).
  struct Part {
    Layer layer;
    Tensors<T> tensors;
  };
  /// `out_size`: of its output; 0 for the last layer, whose output is y.
  Part part(Kind kind, int64_t out_size, int first, int count) {
    Part p{stem_, {}};
    p.layer.kind = kind;
    for (int j = 0; j < count; ++j) {
      p.tensors.w[j] = w_[first + j];
      p.tensors.w_dot[j] = moves_ ? w_dot_[first + j] : nullptr;
      p.tensors.grad_w[j] = outputs_[2 * (first + j)].at;
      p.tensors.grad_w_dot[j] = outputs_[2 * (first + j) + 1].at;
      p.tensors.add_w[j] = adds_;
    }
    if (out_size > 0) {
      p.tensors.y = memory_.take(out_size), p.tensors.y_dot = memory_.take(out_size);
      p.tensors.grad_y = memory_.take(out_size), p.tensors.grad_y_dot = memory_.take(out_size);
    } else {
      p.tensors.y = outputs_[8].at, p.tensors.y_dot = outputs_[9].at;
      p.tensors.grad_y = grad_y_, p.tensors.grad_y_dot = grad_y_dot_;
    }
    return p;
  }
  /// Makes the output of one layer the input of the next.
  void connect(const Part& from, Part& to) const {
    to.tensors.x[0] = from.tensors.y;
    to.tensors.x_dot[0] = moves_ ? from.tensors.y_dot : nullptr;
    to.tensors.grad_x[0] = const_cast<T*>(from.tensors.grad_y);
    to.tensors.grad_x_dot[0] = const_cast<T*>(from.tensors.grad_y_dot);
  }
  void own_memory(Part& p) {
    const Footprint f = footprint(p.layer);
    p.tensors.saved = f.saved ? memory_.take(f.saved) : nullptr;
    p.tensors.saved_dot = f.saved_dot ? memory_.take(f.saved_dot) : nullptr;
    p.tensors.scratch = f.scratch ? memory_.take(f.scratch) : nullptr;
  }

  void run(std::vector<Part>& parts) {
    for (Part& p : parts) own_memory(p);
    const Launcher launch = memory_.launcher();
    auto passes = [](const Part& p) { return passes_of<T>(p.layer.kind); };
    for (const Part& p : parts) passes(p).forward(launch, p.layer, p.tensors);
    for (size_t i = parts.size(); i-- > 0 && moves_;) {
      passes(parts[i]).backward(launch, parts[i].layer, parts[i].tensors);
    }
    for (size_t i = 0; i < parts.size() && moves_; ++i) {
      passes(parts[i]).forward_tangent(launch, parts[i].layer, parts[i].tensors);
    }
    for (size_t i = parts.size(); i-- > 0;) {
      Tensors<T> t = parts[i].tensors;
      if (!moves_) t.grad_y = nullptr, t.saved_dot = nullptr;
      passes(parts[i]).backward_tangent(launch, parts[i].layer, t);
    }
  }

  struct Output {
    T* at;
    int64_t size;
  };
  T* x() const { return x_; }
  const std::vector<Output>& outputs() const { return outputs_; }
  TestMemory<T>& memory() { return memory_; }

 private:
  Layer stem_;
  TestMemory<T> memory_;
  bool moves_, adds_;
  T *x_, *w_[4], *w_dot_[4], *grad_y_, *grad_y_dot_;
  std::vector<Output> outputs_;  // grad_w, grad_w_dot of each parameter, y, y_dot
};

/// The chain as layers of their own: convolution, BatchNorm, max-pool and function.
void run_plain(const Layer& l, Chain<double>& chain) {
  const bool f = l.function != Function::leaky_relu || l.a != 1;
  const int64_t between = l.n * size(l.between), out = l.n * size(l.out);
  std::vector<Chain<double>::Part> parts;
  auto add = [&](Kind kind, int64_t out_size, int first, int count, const Image& in, const Image& to) {
    auto p = chain.part(kind, out_size, first, count);
    p.layer.in = in, p.layer.out = to;
    p.layer.pooled = false;
    p.layer.precision = Precision::float32;
    if (parts.empty()) {
      p.tensors.x[0] = chain.x();
    } else {
      chain.connect(parts.back(), p);
    }
    parts.push_back(p);
  };
  add(Kind::conv2d, between, 0, 2, l.in, l.between);
  add(Kind::batch_norm, l.pooled || f ? between : 0, 2, 2, l.between, l.between);
  if (l.pooled) {
    add(Kind::max_pool, f ? out : 0, 0, 0, l.between, l.out);
    parts.back().layer.window = {2, 2, 2, 2, 0, 0};
  }
  if (f) add(Kind::pointwise, 0, 0, 0, l.out, l.out);
  chain.run(parts);
}

template <class T>
void check_stem(const Layer& l, bool moves, bool adds, double tolerance) {
  Chain<T> fused(l, moves, adds);
  Chain<double> plain(l, moves, adds);
  auto gram = fused.part(Kind::patch_gram, patch_gram_size(patch_size(l.window, l.in)), 0, 0);
  auto stem = fused.part(Kind::stem, 0, 0, 4);
  gram.tensors.x[0] = stem.tensors.x[0] = fused.x();
  stem.tensors.x[1] = gram.tensors.y;
  std::vector<typename Chain<T>::Part> one{gram, stem};
  fused.run(one);
  run_plain(l, plain);

  const std::string name = "stem n " + std::to_string(l.n) + " in " + std::to_string(l.in.c) + "x" +
                           std::to_string(l.in.h) + "x" + std::to_string(l.in.w) + " out " +
                           std::to_string(l.out.c) + " f " + std::to_string(static_cast<int>(l.function)) +
                           (l.pooled ? " pooled" : "") + (moves ? "" : " still") + (adds ? " adds" : "") +
                           " precision " + std::to_string(static_cast<int>(l.precision));
  for (size_t i = 0; i < fused.outputs().size(); ++i) {
    const bool tangent = i % 2 == 1, y = i >= 8;
    if (!moves && tangent == y) continue;  // gradients, and the tangent of y
    const auto& output = fused.outputs()[i];
    for (int64_t task = 0; task < kTasks; ++task) {
      const double* want = plain.memory().real(plain.outputs()[i].at, task);
      compare(fused.memory().real(output.at, task), std::vector<double>(want, want + output.size), tolerance,
              name + ", output " + std::to_string(i));
    }
  }
  expect(fused.memory().gaps_untouched(), name + " wrote behind a tensor");
}

struct Case {
  int64_t n;
  Image in;
  int64_t filters;
  Window window;
  int64_t pad_end;
};

Layer stem_of(const Case& c, bool pooled, Function function, const Constants& constants) {
  Layer l{};
  static_cast<Constants&>(l) = constants;
  l.kind = Kind::stem;
  l.function = function;
  l.n = c.n;
  l.in = c.in;
  l.window = c.window;
  l.eps = 0.1;
  l.pooled = pooled;
  l.between = {c.filters, (c.in.h + c.window.pad_top + c.pad_end - c.window.kernel_h) / c.window.stride_h + 1,
               (c.in.w + c.window.pad_left + c.pad_end - c.window.kernel_w) / c.window.stride_w + 1};
  l.out = l.between;
  if (pooled) l.out.h /= 2, l.out.w /= 2;
  return l;
}

const Constants kNone{1, 0, 1};  // of leaky_relu: the identity

void check_shapes() {
  const Case cases[] = {{3, {1, 5, 6}, 5, {3, 3, 1, 1, 1, 1}, 1},
                        {2, {3, 9, 8}, 36, {3, 3, 1, 1, 1, 1}, 1},   // rows of whole vectors
                        {2, {3, 9, 7}, 36, {3, 3, 1, 1, 1, 1}, 1},   // others
                        {1, {2, 25, 26}, 3, {3, 3, 1, 1, 0, 0}, 0},  // several tiles across and down
                        {7, {2, 8, 9}, 17, {3, 2, 2, 1, 0, 1}, 0},
                        {1, {1, 17, 19}, 70, {5, 5, 2, 1, 2, 0}, 2},
                        {2, {2, 19, 23}, 4, {2, 1, 5, 4, 0, 0}, 0},  // strides beyond the kernel
                        {2, {1, 40, 3}, 6, {27, 1, 1, 1, 3, 0}, 0},  // a tall kernel
                        {40, {5, 3, 4}, 2, {1, 1, 1, 1, 0, 0}, 0}};
  for (const Case& c : cases) {
    for (const bool pooled : {true, false}) {
      const Layer relu = stem_of(c, pooled, Function::relu, {});
      check_stem<double>(relu, true, false, 1e-10);
      check_stem<double>(relu, false, false, 1e-10);
      check_stem<double>(stem_of(c, pooled, Function::leaky_relu, kNone), true, true, 1e-10);
      check_stem<double>(stem_of(c, pooled, Function::tanh, {}), true, false, 1e-10);
    }
  }
}

void check_functions() {
  const Case c{2, {2, 6, 7}, 5, {3, 3, 1, 1, 1, 1}, 1};
  const std::pair<Function, Constants> functions[] = {{Function::leaky_relu, {0.1, 0, 1}},
                                                      {Function::leaky_relu, {-0.3, 0, 1}},
                                                      {Function::elu, {0.7, 1, 1}},
                                                      {Function::silu, {}},
                                                      {Function::gelu, {}},
                                                      {Function::gelu_tanh, {}},
                                                      {Function::softplus, {1, 20, 1}},
                                                      {Function::sigmoid, {}},
                                                      {Function::hardtanh, {-0.5, 0.8, 1}}};
  for (const auto& [function, constants] : functions) {
    for (const bool pooled : {true, false}) {
      const Layer l = stem_of(c, pooled, function, constants);
      check_stem<double>(l, true, false, 1e-10);
      check_stem<double>(l, false, true, 1e-10);
    }
  }
}

/// Rounding moves a few maxima to another pixel, so that the gradients behind a pool agree less.
void check_precisions() {
  const std::pair<Precision, double> precisions[] = {{Precision::float32, 1e-5},
                                                     {Precision::bf16x3, 1e-4},
                                                     {Precision::tf32, 4e-3},
                                                     {Precision::bfloat16, 4e-2}};
  const Case cases[] = {{2, {1, 9, 12}, 36, {3, 3, 1, 1, 1, 1}, 1},
                        {2, {3, 10, 11}, 7, {3, 3, 1, 1, 1, 1}, 1}};
  for (const Case& c : cases) {
    for (const auto& [precision, tolerance] : precisions) {
      for (const bool pooled : {true, false}) {
        Layer l = stem_of(c, pooled, Function::tanh, {});
        l.precision = precision;
        check_stem<float>(l, true, false,
                          pooled && precision != Precision::float32 ? 20 * tolerance : tolerance);
      }
    }
  }
}

void check_stems() {
  check_shapes();
  check_functions();
  check_precisions();
}

}  // namespace
}  // namespace maml::cuda

using namespace maml::cuda;

int main(int argc, char** argv) {
  in_schedules(argc, argv, check_stems);
  return report();
}
