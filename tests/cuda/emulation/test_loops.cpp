// The CUDA layers on tensors of any shape, on the CPU: every pass of every kind against its reference
// (loop_references.h), on random views (permuted, sliced, reversed, broadcast; with samples and without),
// with every optional tensor absent, with the same value as two inputs, and the same bits in every schedule
// of the emulation.
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "emulation.h"
#include "loop_harness.h"

namespace maml::cuda {
namespace {

// ---- random loops and views

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

constexpr std::array<bool, kMostAxes> kAll = {true, true, true, true, true, true, true, true};

/// A layer of one nest of loops.
LoopLayer random_layer(Random& random, Kind kind, int inputs) {
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

/// y consists of parts along one axis, with zeros between some of them.
LoopLayer random_move(Random& random) {
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

// ---- expressions

std::vector<Formula> formulas() {
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

// ---- the cases

/// Which operands move and are wanted, and whether cotangents add.
LoopPresent random_presence(Random& random) {
  LoopPresent p;
  for (bool& moves : p.moves) moves = random.with(0.8);
  for (bool& wanted : p.wanted) wanted = random.with(0.8);
  p.add = random.with(0.3);
  return p;
}

template <class T>
void check_random(int seeds) {
  for (int seed = 0; seed < seeds; ++seed) {
    Random random(seed);
    check_loops<T>(random_move(random), random_presence(random));
    for (const Kind kind : {Kind::softmax, Kind::log_softmax, Kind::stop}) {
      check_loops<T>(random_layer(random, kind, 1), random_presence(random));
    }
    for (int r = 0; r < static_cast<int>(Reduction::count); ++r) {
      const auto reduction = static_cast<Reduction>(r);
      const bool sums = reduction == Reduction::sum || reduction == Reduction::mean;
      LoopLayer l = random_layer(random, sums ? Kind::reduce : Kind::extreme, 1);
      l.layer.reduction = reduction;
      check_loops<T>(l, random_presence(random));
    }
    check_loops<T>(random_layer(random, Kind::contract, 2), random_presence(random));
  }
}

/// Every expression: on random views, without broadcasts, with one operand fixed, and with one value as two
/// operands.
template <class T>
void check_maps() {
  Random random(5);
  for (const Formula& formula : formulas()) {
    auto layer = [&] {
      LoopLayer l = random_layer(random, Kind::map, formula.e.operands);
      l.formula = formula;
      return l;
    };
    check_loops<T>(layer(), {});
    check_loops<T>(layer(), random_presence(random));
    LoopPresent fixed;
    fixed.moves[random.below(formula.e.operands)] = false;
    check_loops<T>(layer(), fixed);
    if (formula.e.operands != 2) continue;
    LoopLayer twice = layer();
    twice.loops[0].x[1] = twice.loops[0].x[0];
    LoopPresent same;
    same.same = true, same.add = random.with(0.5);
    check_loops<T>(twice, same);
  }
}

/// Loops over axes of these sizes, in which each operand has its strides.
Loops loops_over(const std::vector<int64_t>& sizes, const std::vector<View>& x, const View& y) {
  Loops l;
  l.axes = static_cast<int>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), l.size);
  std::copy(x.begin(), x.end(), l.x);
  l.y = y;
  return l;
}

/// y = x x', of each sample and over all samples, with enough elements for several blocks.
template <class T>
std::vector<std::vector<T>> check_products_with_itself() {
  constexpr int64_t L = 17, C = 5, size = L * C;
  LoopPresent same;
  same.same = true;
  LoopLayer each;
  each.layer.kind = Kind::contract, each.layer.n = 3, each.inputs = 2;
  each.loops = {loops_over({kSamples, L, L, C},
                           {{size, true, false, 0, {size, C, 0, 1}}, {size, true, false, 0, {size, 0, C, 1}}},
                           {L * L, true, true, 0, {L * L, L, 1, 0}})};
  LoopLayer over = each;
  over.loops = {loops_over({L, L, kSamples, C},
                           {{size, true, false, 0, {C, 0, size, 1}}, {size, true, false, 0, {0, C, size, 1}}},
                           {L * L, false, true, 0, {L, 1, 0, 0}})};
  return {check_loops<T>(each, same), check_loops<T>(over, same), check_loops<T>(over, same, 1)};
}

/// The same bits in every schedule, and for a task whatever its neighbours are.
void check_bits() {
  std::vector<std::vector<std::vector<float>>> all;
  for (const auto schedule :
       {emulation::Schedule::forward, emulation::Schedule::backward, emulation::Schedule::shuffled}) {
    emulation::set_schedule(schedule, 7);
    all.push_back(check_products_with_itself<float>());
    expect(same_bits(all.back()[2], all.back()[1]), "contract: a task depends on its neighbours");
    Random random(3);
    for (const Kind kind : {Kind::softmax, Kind::reduce, Kind::extreme}) {
      all.back().push_back(check_loops<float>(random_layer(random, kind, 1), {}));
    }
    LoopLayer map = random_layer(random, Kind::map, 3);
    map.formula = formulas()[0];
    all.back().push_back(check_loops<float>(map, {}));
    for (size_t i = 0; i < all.back().size(); ++i) {
      expect(same_bits(all[0][i], all.back()[i]), "loops: the bits depend on the schedule");
    }
  }
}

}  // namespace
}  // namespace maml::cuda

using namespace maml::cuda;

int main(int argc, char** argv) {
  in_schedules(argc, argv, [] {
    check_random<double>(40);
    check_random<float>(10);
    check_maps<double>();
    check_maps<float>();
    check_products_with_itself<double>();
  });
  if (argc == 1) check_bits();
  return report();
}
