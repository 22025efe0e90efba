// The stem against the layers that it fuses: the same four passes through conv2d, batch_norm and max_pool in
// float64. Several tasks, odd shapes, every optional tensor absent, in every schedule of the emulation.
#include <random>
#include <string>
#include <vector>

#include "emulation.h"
#include "layer_harness.h"
#include "layers/patch_moments.h"

namespace maml::cuda {
namespace {

using T = double;
constexpr int64_t kTasks = 2;

/// One chain from x to y: the tensors of its layers, and those of its parameters.
class Chain {
 public:
  Chain(const Layer& stem, bool moves, bool adds) : stem_(stem), memory_(kTasks, 1 << 19) {
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
    moves_ = moves, adds_ = adds;
  }

  /// One layer of the chain, with the chain's parameters [first, first + count).
  struct Part {
    Layer layer;
    Tensors<T> tensors;
  };
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
  void own_memory(Part& p, Footprint f) {
    p.tensors.saved = f.saved ? memory_.take(f.saved) : nullptr;
    p.tensors.scratch = f.scratch ? memory_.take(f.scratch) : nullptr;
  }

  void run(std::vector<Part>& parts) {
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
      if (!moves_) t.grad_y = nullptr;
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

void check_stem(const Layer& l, bool moves, bool adds) {
  Chain fused(l, moves, adds), plain(l, moves, adds);
  auto gram = fused.part(Kind::patch_gram, patch_gram_size(patch_size(l.window, l.in)), 0, 0);
  auto stem = fused.part(Kind::stem, 0, 0, 4);
  gram.tensors.x[0] = stem.tensors.x[0] = fused.x();
  stem.tensors.x[1] = gram.tensors.y;
  fused.own_memory(gram, footprint(gram.layer));
  fused.own_memory(stem, footprint(stem.layer));
  std::vector<Chain::Part> one{gram, stem};
  fused.run(one);

  const int64_t between = l.n * size(l.between);
  auto convolution = plain.part(Kind::conv2d, between, 0, 2);
  convolution.layer.out = l.between;
  convolution.layer.pooled = false;
  auto norm = plain.part(Kind::batch_norm, l.pooled ? between : 0, 2, 2);
  norm.layer.in = norm.layer.out = l.between;
  norm.layer.pooled = false;
  convolution.tensors.x[0] = plain.x();
  norm.tensors.x[0] = convolution.tensors.y;
  norm.tensors.x_dot[0] = moves ? convolution.tensors.y_dot : nullptr;
  norm.tensors.grad_x[0] = const_cast<T*>(convolution.tensors.grad_y);
  norm.tensors.grad_x_dot[0] = const_cast<T*>(convolution.tensors.grad_y_dot);
  plain.own_memory(convolution, footprint(convolution.layer));
  plain.own_memory(norm, footprint(norm.layer));
  std::vector<Chain::Part> three{convolution, norm};
  if (l.pooled) {
    auto pool = plain.part(Kind::max_pool, 0, 0, 0);
    pool.layer.in = l.between;
    pool.layer.window = {2, 2, 2, 2, 0, 0};
    pool.tensors.x[0] = norm.tensors.y;
    pool.tensors.x_dot[0] = norm.tensors.y_dot;
    pool.tensors.grad_x[0] = const_cast<T*>(norm.tensors.grad_y);
    pool.tensors.grad_x_dot[0] = const_cast<T*>(norm.tensors.grad_y_dot);
    plain.own_memory(pool, footprint(pool.layer));
    three.push_back(pool);
  }
  plain.run(three);

  const std::string name = "stem n " + std::to_string(l.n) + " in " + std::to_string(l.in.c) + "x" +
                           std::to_string(l.in.h) + "x" + std::to_string(l.in.w) + " out " +
                           std::to_string(l.out.c) + (l.pooled ? " pooled" : "") + (moves ? "" : " still") +
                           (adds ? " adds" : "");
  for (size_t i = 0; i < fused.outputs().size(); ++i) {
    const bool tangent = i % 2 == 1, y = i >= 8;
    if (!moves && tangent == y) continue;  // gradients, and the tangent of y
    const auto& output = fused.outputs()[i];
    for (int64_t task = 0; task < kTasks; ++task) {
      const T* want = plain.memory().real(plain.outputs()[i].at, task);
      compare(fused.memory().real(output.at, task), std::vector<double>(want, want + output.size), 1e-10,
              name + ", output " + std::to_string(i));
    }
  }
  expect(fused.memory().gaps_untouched(), name + " wrote behind a tensor");
}

void check_stems() {
  for (const bool pooled : {true, false}) {
    const struct {
      int64_t n;
      Image in;
      int64_t filters;
      Window window;
      int64_t pad_end;
    } cases[] = {{3, {1, 5, 6}, 5, {3, 3, 1, 1, 1, 1}, 1},
                 {2, {3, 9, 7}, 36, {3, 3, 1, 1, 1, 1}, 1},
                 {7, {2, 8, 9}, 17, {3, 2, 2, 1, 0, 1}, 0},
                 {1, {1, 17, 19}, 70, {5, 5, 2, 1, 2, 0}, 2},
                 {40, {5, 3, 4}, 2, {1, 1, 1, 1, 0, 0}, 0}};
    for (const auto& c : cases) {
      Layer l{};
      l.kind = Kind::stem;
      l.n = c.n;
      l.in = c.in;
      l.window = c.window;
      l.eps = 0.1;
      l.pooled = pooled;
      l.between = {c.filters,
                   (c.in.h + c.window.pad_top + c.pad_end - c.window.kernel_h) / c.window.stride_h + 1,
                   (c.in.w + c.window.pad_left + c.pad_end - c.window.kernel_w) / c.window.stride_w + 1};
      l.out = l.between;
      if (pooled) l.out.h /= 2, l.out.w /= 2;
      check_stem(l, true, false);
      check_stem(l, false, false);
      check_stem(l, true, true);
    }
  }
}

}  // namespace
}  // namespace maml::cuda

using namespace maml::cuda;

int main(int argc, char** argv) {
  in_schedules(argc, argv, check_stems);
  return report();
}
