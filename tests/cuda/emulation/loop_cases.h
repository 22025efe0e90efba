// Random layers on tensors of any shape, and the expressions of the maps among them.
#pragma once

#include <array>
#include <random>
#include <utility>
#include <vector>

#include "loop_references.h"

namespace maml {

class Random {
 public:
  explicit Random(unsigned seed) : rng_(seed) {}
  int64_t below(int64_t limit) { return static_cast<int64_t>(rng_() % static_cast<unsigned>(limit)); }
  bool with(double probability) { return static_cast<double>(rng_()) < probability * 4294967296.0; }

  /// Loops over 1 to 4 axes, of which one may be that of the samples.
  Loops loops() {
    Loops l;
    l.axes = static_cast<int>(1 + below(4));
    for (int a = 0; a < l.axes; ++a) l.size[a] = 1 + below(4);
    if (with(0.7)) l.size[below(l.axes)] = kSamples;
    return l;
  }

  /// An operand with the axes for which has[axis]; the others are broadcast. Its axes are in any order in
  /// memory, the samples first. `sliced`: it may be a part of its value, with steps forward or backward.
  View view(const Loops& loops, int64_t n, const std::array<bool, kMostAxes>& has, bool sliced) {
    View v;
    std::vector<int> order;
    int samples = -1;
    for (int a = 0; a < loops.axes; ++a) {
      if (has[a] && loops.size[a] == kSamples) samples = a;
      if (has[a] && loops.size[a] != kSamples) order.insert(order.begin() + below(order.size() + 1), a);
    }
    v.size = 1;
    for (const int a : order) {
      const int64_t step = sliced && with(0.4) ? 2 : 1, before = sliced ? below(2) : 0,
                    after = sliced ? below(2) : 0;
      const bool reversed = sliced && with(0.3);
      v.offset += (before + (reversed ? (loops.size[a] - 1) * step : 0)) * v.size;
      v.stride[a] = (reversed ? -step : step) * v.size;
      v.size *= before + (loops.size[a] - 1) * step + 1 + after;
    }
    v.samples = samples >= 0;
    if (v.samples) v.stride[samples] = v.size;
    std::vector<int> visits(count_of(v, n));
    each_index(loops, n, [&](const auto& i) { ++visits[at(v, i)]; });
    v.whole = std::all_of(visits.begin(), visits.end(), [](int count) { return count == 1; });
    return v;
  }

  std::array<bool, kMostAxes> axes(double probability) {
    std::array<bool, kMostAxes> has;
    for (bool& h : has) h = with(probability);
    return has;
  }

 private:
  std::mt19937 rng_;
};

inline constexpr std::array<bool, kMostAxes> kAll = {true, true, true, true, true, true, true, true};

/// A layer of one nest of loops.
inline LoopLayer random_layer(Random& random, Kind kind, int inputs) {
  LoopLayer l;
  l.layer.kind = kind;
  l.layer.n = 1 + random.below(4);
  l.inputs = inputs;
  Loops loops = random.loops();
  const bool reduces = kind == Kind::reduce || kind == Kind::extreme || kind == Kind::contract;
  loops.y = random.view(loops, l.layer.n, reduces ? random.axes(0.5) : kAll, false);
  for (int j = 0; j < inputs; ++j) {
    loops.x[j] = random.view(loops, l.layer.n, random.axes(0.75), random.with(0.5));
  }
  l.loops = {loops};
  return l;
}

/// A product of matrices that are large enough for tiles: a batch, m, n and k of one or two axes in any
/// order.
inline LoopLayer random_contraction(Random& random) {
  LoopLayer l;
  l.layer.kind = Kind::contract;
  l.layer.n = 1 + random.below(12);
  l.inputs = 2;
  enum Group { m, n, k, batch, groups };
  constexpr bool has_y[] = {true, true, false, true}, has_x0[] = {true, false, true, true},
                 has_x1[] = {false, true, true, true};
  Loops loops;
  std::vector<int> axes = {m, n, k};
  for (int64_t more = random.below(3); more > 0; --more) axes.push_back(random.below(groups));
  for (size_t a = 0; a < axes.size(); ++a) std::swap(axes[a], axes[random.below(axes.size())]);
  loops.axes = static_cast<int>(axes.size());
  std::array<bool, kMostAxes> of_y{}, of_x0{}, of_x1{};
  for (int a = 0; a < loops.axes; ++a) {
    constexpr int64_t kSizes[] = {3, 4, 8, 12, 20};
    loops.size[a] = axes[a] == batch ? 1 + random.below(3) : kSizes[random.below(5)];
    if (axes[a] == k && random.with(0.2)) loops.size[a] = 2 * loops.size[a] + 64;
    of_y[a] = has_y[axes[a]], of_x0[a] = has_x0[axes[a]], of_x1[a] = has_x1[axes[a]];
  }
  if (random.with(0.7)) loops.size[random.below(loops.axes)] = kSamples;
  loops.y = random.view(loops, l.layer.n, of_y, false);
  loops.x[0] = random.view(loops, l.layer.n, of_x0, random.with(0.3));
  loops.x[1] = random.view(loops, l.layer.n, of_x1, random.with(0.3));
  l.loops = {loops};
  return l;
}

/// Attention over up to 3 axes of a batch, with a bias or without, and operands without some of their axes.
inline LoopLayer random_attention(Random& random) {
  LoopLayer l;
  l.layer.kind = Kind::attention;
  l.layer.n = 1 + random.below(3);
  l.layer.a = 0.5, l.layer.b = random.with(0.5);
  l.inputs = random.with(0.5) ? 4 : 3;
  Loops loops;
  const int batch = static_cast<int>(random.below(4));
  loops.axes = batch + 4;
  for (int a = 0; a < loops.axes; ++a) loops.size[a] = 1 + random.below(a < batch ? 3 : 5);
  if (random.with(0.2)) loops.size[batch + random.below(4)] = 20 + random.below(60);  // several tiles
  if (batch > 0 && random.with(0.7)) loops.size[0] = kSamples;
  // Of the batch; queries, keys, depth and width.
  const auto having = [&](double probability, std::array<bool, 4> own) {
    std::array<bool, kMostAxes> has = random.axes(probability);
    for (int a = 0; a < 4; ++a) has[batch + a] = own[a] && (probability == 1 || random.with(0.9));
    return has;
  };
  const std::array<bool, 4> of_x[] = {{true, false, true, false},
                                      {false, true, true, false},
                                      {false, true, false, true},
                                      {true, true, false, false}};
  loops.y = random.view(loops, l.layer.n, having(1, {true, false, false, true}), false);
  for (int j = 0; j < l.inputs; ++j) {
    loops.x[j] = random.view(loops, l.layer.n, having(0.75, of_x[j]), random.with(0.5));
  }
  l.loops = {loops};
  return l;
}

/// A mask whose elements are numbered along the axes that it has, one of which may be that of the samples.
inline LoopLayer random_dropout(Random& random) {
  LoopLayer l = random_layer(random, Kind::dropout, 1);
  l.layer.a = 1.25;
  l.layer.stream.pass = static_cast<uint32_t>(random.below(9));
  l.layer.stream.first_sample = random.below(3);
  l.layer.stream.samples = l.layer.stream.first_sample + l.layer.n + random.below(2);
  l.mask.number = static_cast<uint32_t>(random.below(4));
  l.mask.keep = random.below(5) * (int64_t{1} << 30);
  const Loops& loops = l.loops[0];
  bool outside = false;
  int64_t stride = 1;
  for (int a = loops.axes - 1; a >= 0; --a) {
    if (random.with(0.25)) continue;
    l.mask.stride[a] = stride, l.mask.times_samples[a] = outside;
    if (loops.size[a] == kSamples) {
      outside = true;
    } else {
      stride *= loops.size[a];
    }
  }
  return l;
}

/// The windows of x over 1 to 3 axes, some of which leave x.
inline LoopLayer random_windows(Random& random) {
  LoopLayer l;
  l.layer.kind = Kind::windows;
  l.layer.n = 1 + random.below(3);
  Loops loops;
  loops.slides = static_cast<int>(1 + random.below(kMostSlides));
  const int rest = loops.slides == kMostSlides ? 2 : 3;  // axes that x and y share
  loops.axes = rest + 2 * loops.slides;
  std::vector<int> axes(loops.axes);
  for (int a = 0; a < loops.axes; ++a) axes.insert(axes.begin() + random.below(a + 1), a), axes.pop_back();
  for (const int a : axes) loops.size[a] = 1 + random.below(3);
  if (random.with(0.7)) loops.size[axes[0]] = kSamples;
  loops.y = random.view(loops, l.layer.n, kAll, false);
  Loops of_x = loops;  // an axis of x where the positions are, none where the taps are
  std::array<bool, kMostAxes> has = kAll;
  for (int i = 0; i < loops.slides; ++i) {
    Slide& s = loops.slide[i];
    s.position = axes[rest + 2 * i], s.tap = axes[rest + 2 * i + 1];
    s.size = of_x.size[s.position] = 1 + random.below(5);
    s.stride = 1 + random.below(3), s.dilation = 1 + random.below(3), s.padding = random.below(5) - 1;
    has[s.tap] = false;
  }
  loops.x[0] = random.view(of_x, l.layer.n, has, random.with(0.5));
  for (int i = 0; i < loops.slides; ++i) {
    Slide& s = loops.slide[i];
    s.x_stride = std::exchange(loops.x[0].stride[s.position], 0);
  }
  loops.x[0].whole = false;
  l.loops = {loops};
  return l;
}

/// A gather from x, or a scatter into y, along one more axis.
inline LoopLayer random_lookup(Random& random, Kind kind) {
  LoopLayer l;
  l.layer.kind = kind;
  l.layer.n = 1 + random.below(4);
  l.inputs = 2;
  Loops loops = random.loops();
  Loops with_axis = loops;  // the further axis is the last one
  const int axis = with_axis.axes++;
  with_axis.size[axis] = 1 + random.below(4);
  auto has = random.axes(0.6);
  has[axis] = true;
  const bool gathers = kind == Kind::gather;
  View of = random.view(with_axis, l.layer.n, has, gathers && random.with(0.5));
  loops.axis = {with_axis.size[axis], std::exchange(of.stride[axis], 0)};
  of.whole = false;
  View other =
      random.view(loops, l.layer.n, gathers ? kAll : random.axes(0.75), !gathers && random.with(0.5));
  (gathers ? loops.x[0] : loops.y) = of;
  (gathers ? loops.y : loops.x[0]) = other;
  loops.x[1] = random.view(loops, l.layer.n, random.axes(0.75), random.with(0.5));
  l.loops = {loops};
  return l;
}

/// A convolution of each channel by itself over 1 to 3 axes, with an axis of a batch, or none.
inline LoopLayer random_depthwise(Random& random) {
  LoopLayer l;
  l.layer.kind = Kind::depthwise;
  l.layer.n = 1 + random.below(3);
  l.inputs = 2;
  Loops loops;
  loops.slides = static_cast<int>(1 + random.below(kMostSlides));
  const int batch = random.with(0.8), channels = batch + 2 * loops.slides;
  loops.axes = channels + 1;
  for (int a = 0; a < loops.axes; ++a) loops.size[a] = 1 + random.below(a == channels ? 5 : 3);
  if (batch > 0 && random.with(0.7)) loops.size[0] = kSamples;
  // The views of x, w and y over the axes that each has, the channels last in memory.
  const auto view = [&](Loops of, std::array<bool, kMostAxes> has, bool sliced) {
    has[channels] = false;
    View v = random.view(of, l.layer.n, has, sliced);
    const int64_t size = of.size[channels];
    v.size *= size, v.offset *= size;
    for (int64_t& stride : v.stride) stride *= size;
    v.stride[channels] = 1;
    return v;
  };
  std::array<bool, kMostAxes> of_x = kAll, of_w{}, of_y = kAll;
  Loops over_x = loops;
  for (int i = 0; i < loops.slides; ++i) {
    Slide& s = loops.slide[i];
    s.position = batch + i, s.tap = batch + loops.slides + i;
    s.size = over_x.size[s.position] = 1 + random.below(5);
    s.stride = 1 + random.below(3), s.dilation = 1 + random.below(3), s.padding = random.below(5) - 1;
    of_x[s.tap] = of_y[s.tap] = false, of_w[s.tap] = true;
  }
  loops.x[0] = view(over_x, of_x, random.with(0.5));
  loops.x[1] = view(loops, of_w, random.with(0.5));
  loops.y = view(loops, of_y, false);
  for (int i = 0; i < loops.slides; ++i) {
    Slide& s = loops.slide[i];
    s.x_stride = std::exchange(loops.x[0].stride[s.position], 0);
  }
  loops.x[0].whole = loops.x[1].whole = loops.y.whole = false;
  l.loops = {loops};
  return l;
}

/// y consists of parts along one axis, with zeros between some of them.
inline LoopLayer random_move(Random& random) {
  LoopLayer l;
  l.layer.kind = Kind::move;
  l.layer.n = 1 + random.below(4);
  Loops all = random.loops();
  const int axis = static_cast<int>(random.below(all.axes));
  l.inputs = all.size[axis] == kSamples ? 1 : static_cast<int>(1 + random.below(kMostInputs));
  std::vector<int64_t> starts, sizes;
  int64_t end = 0;
  for (int j = 0; j < l.inputs; ++j) {
    end += random.with(0.3);
    starts.push_back(end);
    sizes.push_back(1 + random.below(3));
    end += sizes.back();
  }
  if (all.size[axis] != kSamples) all.size[axis] = end + random.with(0.3);
  all.y = random.view(all, l.layer.n, kAll, false);
  for (int j = 0; j < l.inputs; ++j) {
    Loops part = all;
    if (all.size[axis] != kSamples) {
      part.size[axis] = sizes[j];
      part.y.offset += starts[j] * all.y.stride[axis];
      part.y.whole = sizes[j] == all.size[axis];
    }
    part.x[0] = random.view(part, l.layer.n, random.axes(0.8), random.with(0.5));
    l.loops.push_back(part);
  }
  return l;
}

/// Expressions of several instructions, and each function and combination alone.
inline std::vector<Formula> formulas() {
  using F = Function;
  using C = Combination;
  using X = const std::vector<Twice>&;
  const Twice one(1);
  const auto sigmoid = [=](Twice x) { return one / (one + exp(-x)); };
  std::vector<Formula> all = {
      {expression(3, {combined(C::mul, 0, 1), combined(C::add, 3, 2)}),
       [](X x) { return x[0] * x[1] + x[2]; }},
      {expression(2, {unary(F::silu, 0), combined(C::mul, 2, 1)}),
       [=](X x) { return x[0] * sigmoid(x[0]) * x[1]; }},
      {expression(3, {combined(C::sub, 0, 1), combined(C::mul, 2, 2), unary(F::affine, 4, 1, 0.5),
                      unary(F::sqrt, 5), combined(C::div, 3, 6)}),
       [](X x) { return (x[0] - x[1]) / sqrt(x[2] * x[2] + Twice(0.5)); }},
      {expression(2, {combined(C::gt, 0, 1), combined(C::mul, 0, 1), unary(F::sin, 3), unary(F::tanh, 1),
                      combined(C::where, 2, 4, 5)}),
       [=](X x) {
         return value_of(x[0]) > value_of(x[1]) ? sin(x[0] * x[1])
                                                : Twice(2) * sigmoid(Twice(2) * x[1]) - one;
       }},
      {expression(2, {unary(F::exp, 0), combined(C::pow, 2, 1)}), [](X x) { return exp(x[0] * x[1]); }},
      {expression(4, {combined(C::mul, 0, 1), combined(C::mul, 2, 3), combined(C::sub, 4, 5),
                      combined(C::mul, 6, 6), combined(C::mul, 7, 0)}),
       [](X x) {
         const Twice d = x[0] * x[1] - x[2] * x[3];
         return d * d * x[0];
       }},
      {expression(1, {combined(C::mul, 0, 0), combined(C::mul, 1, 0), unary(F::cos, 2)}),
       [](X x) { return cos(x[0] * x[0] * x[0]); }},
      {expression(2, {combined(C::maximum, 0, 1), combined(C::minimum, 0, 1), combined(C::mul, 2, 2),
                      combined(C::mul, 4, 3)}),
       [](X x) {
         const bool first = value_of(x[0]) > value_of(x[1]);
         const Twice &large = x[first ? 0 : 1], &small = x[first ? 1 : 0];
         return large * large * small;
       }},
  };
  // As many instructions as there may be.
  std::vector<ExpressionStep> steps;
  for (int i = 0; i < kMostInstructions; ++i) {
    steps.push_back(i % 2 == 0 ? unary(F::sin, i) : unary(F::affine, i, 1.1, 0.2));
  }
  all.push_back({expression(1, steps), [](X x) {
                   Twice v = x[0];
                   for (int i = 0; i < kMostInstructions; ++i) {
                     v = i % 2 == 0 ? sin(v) : Twice(1.1) * v + Twice(0.2);
                   }
                   return v;
                 }});
  for (int f = 0; f < static_cast<int>(F::count); ++f) {
    const Layer l = with(Layer{}, static_cast<F>(f));
    all.push_back({expression(1, {unary(l.function, 0, l.a, l.b, l.c)}), [=](X x) { return f_of(l, x[0]); },
                   takes_positive(l.function)});
  }
  for (int c = 0; c < static_cast<int>(C::where); ++c) {  // where() is in a formula above
    const auto combination = static_cast<C>(c);
    all.push_back({expression(2, {combined(combination, 0, 1)}),
                   [=](X x) { return combination_of(combination, x[0], x[1]); }, true});
  }
  return all;
}

}  // namespace maml
