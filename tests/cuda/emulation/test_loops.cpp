// The CUDA layers on tensors of any shape, on the CPU: every pass of every kind against its reference
// (loop_references.h), on random views (permuted, sliced, reversed, broadcast; with samples and without),
// with every optional tensor absent, with the same value as two inputs, and the same bits in every schedule
// of the emulation.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "emulation.h"
#include "loop_cases.h"
#include "loop_harness.h"

namespace maml::cuda {
namespace {

/// Which operands move and are wanted, and whether cotangents add.
LoopPresent random_presence(Random& random) {
  LoopPresent p;
  for (bool& moves : p.moves) moves = random.with(0.8);
  for (bool& wanted : p.wanted) wanted = random.with(0.8);
  p.add = random.with(0.3);
  return p;
}

/// An index has no derivative, so it neither moves nor is wanted; or it is, as what was sorted, and its
/// cotangent is 0.
template <class T>
void check_lookups(Random& random) {
  for (const Kind kind : {Kind::gather, Kind::scatter}) {
    LoopPresent p = random_presence(random);
    p.moves[1] = false;
    check_loops<T>(random_lookup(random, kind), p);
  }
  LoopLayer sorted = random_layer(random, Kind::sort, 1);
  while (sorted.loops[0].size[sorted.loops[0].axes - 1] == kSamples) {
    sorted = random_layer(random, Kind::sort, 1);
  }
  sorted.layer.a = random.with(0.5) ? 1 : 0;
  check_loops<T>(sorted, random_presence(random));
}

template <class T>
void check_random(int seeds) {
  for (int seed = 0; seed < seeds; ++seed) {
    Random random(seed);
    check_loops<T>(random_move(random), random_presence(random));
    check_loops<T>(random_windows(random), random_presence(random));
    check_loops<T>(random_dropout(random), random_presence(random));
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
    if (seed % 2 == 0) {
      Random own(seed);
      check_loops<T>(random_contraction(own), random_presence(own));
    }
    check_loops<T>(random_attention(random), random_presence(random));
    check_lookups<T>(random);
    check_loops<T>(random_depthwise(random), random_presence(random));
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

/// y = x_0' x_1 over so many samples that the sum is split over blocks.
template <class T>
std::vector<T> check_split_sums(int64_t tasks) {
  LoopLayer l;
  l.layer.kind = Kind::contract, l.layer.n = 150, l.inputs = 2;
  l.loops = {loops_over({kSamples, 4, 12, 8},
                        {{48, true, true, 0, {48, 12, 1, 0}}, {32, true, true, 0, {32, 8, 0, 1}}},
                        {96, false, true, 0, {0, 0, 8, 1}})};
  return check_loops<T>(l, {}, tasks);
}

struct Outputs {
  std::vector<double> y, y_dot, grad_x[2], grad_x_dot[2];
};

/// What the four passes give at these operands, one row of elements each. An operand with an empty x_dot does
/// not move. The cotangent g and its tangent are those of every element of y.
Outputs outputs_at(LoopLayer l, const std::vector<std::vector<double>>& x,
                   const std::vector<std::vector<double>>& x_dot, double g, double g_dot) {
  const auto count = static_cast<int64_t>(x[0].size());
  const int64_t out = l.layer.kind == Kind::extreme ? 1 : count;
  const View row{count, false, true, 0, {1}};
  l.layer.n = 1;
  l.loops = {loops_over({count}, {row, row}, {out, false, true, 0, {out == 1 ? 0 : 1}})};
  if (is_lookup(l.layer.kind)) {
    View& of = l.layer.kind == Kind::gather ? l.loops[0].x[0] : l.loops[0].y;
    l.loops[0].axis = {count, std::exchange(of.stride[0], 0)};
  }
  l.layer.loops = l.loops.data(), l.layer.expression = &l.formula.e;
  const Footprint needs = footprint(l.layer);
  TestMemory<double> memory(1, 20 * (count + 2 * kGap) + needs.saved + 2 * kGap);
  Tensors<double> t;
  for (size_t j = 0; j < x.size(); ++j) {
    auto given = [&](const std::vector<double>& values) {
      double* to = memory.take(count);
      memory.fill(to, 0, values);
      return to;
    };
    t.x[j] = given(x[j]);
    if (!x_dot[j].empty()) t.x_dot[j] = given(x_dot[j]);
    t.grad_x[j] = memory.take(count), t.grad_x_dot[j] = memory.take(count);
  }
  double *grad_y = memory.take(out), *grad_y_dot = memory.take(out);
  memory.fill(grad_y, 0, std::vector<double>(out, g));
  memory.fill(grad_y_dot, 0, std::vector<double>(out, g_dot));
  t.grad_y = grad_y, t.grad_y_dot = grad_y_dot;
  t.y = memory.take(out), t.y_dot = memory.take(out), t.saved = memory.take(needs.saved);
  const LaunchPasses<double> passes = passes_of<double>(l.layer.kind);
  for (const auto pass : {passes.forward, passes.backward, passes.forward_tangent, passes.backward_tangent}) {
    pass(memory.launcher(), l.layer, t);
  }
  auto values = [&](double* from, int64_t size) {
    return std::vector<double>(memory.real(from, 0), memory.real(from, 0) + size);
  };
  Outputs o{values(t.y, out), values(t.y_dot, out), {}, {}};
  for (size_t j = 0; j < x.size(); ++j) {
    o.grad_x[j] = values(t.grad_x[j], count), o.grad_x_dot[j] = values(t.grad_x_dot[j], count);
  }
  return o;
}

LoopLayer layer_of(Kind kind) {
  LoopLayer l;
  l.layer.kind = kind;
  return l;
}
LoopLayer map_of(const Expression& e) {
  LoopLayer l = layer_of(Kind::map);
  l.formula.e = e;
  return l;
}

/// Whether all are equal, a NaN to a NaN, and -0 only to -0.
bool equal(const std::vector<double>& got, const std::vector<double>& want) {
  return std::equal(got.begin(), got.end(), want.begin(), want.end(), [](double a, double b) {
    return (a == b && std::signbit(a) == std::signbit(b)) || (std::isnan(a) && std::isnan(b));
  });
}

/// Ties, kinks, NaN and infinity, as torch has them.
void check_special_values() {
  using F = Function;
  using C = Combination;
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  const std::vector<double> ones = {1, 1, 1, 1};
  auto is = [](const std::vector<double>& got, const std::vector<double>& want, const std::string& what) {
    expect(equal(got, want), what);
  };

  is(outputs_at(layer_of(Kind::move), {{-0.0, 0.0, nan, -inf}}, {ones}, 1, 1).y, {-0.0, 0.0, nan, -inf},
     "move: the same bits");

  LoopLayer extreme = layer_of(Kind::extreme);
  extreme.layer.reduction = Reduction::max;
  Outputs o = outputs_at(extreme, {{1, nan, 7, nan}}, {{1, 2, 3, 4}}, 3, 5);
  expect(equal(o.y, {nan}) && equal(o.y_dot, {2}) && equal(o.grad_x[0], {0, 3, 0, 0}) &&
             equal(o.grad_x_dot[0], {0, 5, 0, 0}),
         "max: the first NaN");
  o = outputs_at(extreme, {{-inf, 7, 7, 2}}, {{1, 2, 3, 4}}, 3, 5);
  expect(equal(o.y, {7}) && equal(o.y_dot, {2}) && equal(o.grad_x[0], {0, 3, 0, 0}), "max: the first tie");
  extreme.layer.reduction = Reduction::amin;
  o = outputs_at(extreme, {{-2, 7, -2, 2}}, {{1, 2, 4, 8}}, 3, 5);
  expect(equal(o.y, {-2}) && equal(o.y_dot, {2.5}) && equal(o.grad_x[0], {1.5, 0, 1.5, 0}) &&
             equal(o.grad_x_dot[0], {2.5, 0, 2.5, 0}),
         "amin: ties share");
  o = outputs_at(extreme, {{1, nan, 7, 2}}, {ones}, 3, 5);
  expect(equal(o.y, {nan}) && equal(o.grad_x[0], {nan, nan, nan, nan}), "amin: a NaN has no share");

  for (const Kind kind : {Kind::softmax, Kind::log_softmax}) {
    const std::string name = properties(kind).name;
    const bool log = kind == Kind::log_softmax;
    o = outputs_at(layer_of(kind), {{1000, -inf, 1000, -1e308}}, {{1, 2, 3, 4}}, 1, 0);
    is(o.y,
       log ? std::vector<double>{-std::log(2), -inf, -std::log(2), -1e308} : std::vector{0.5, 0.0, 0.5, 0.0},
       name + ": large elements");
    is(o.y_dot, log ? std::vector{-1.0, 0.0, 1.0, 2.0} : std::vector{-0.5, 0.0, 0.5, 0.0},
       name + ": tangents at a mask");
    is(o.grad_x_dot[0], log ? std::vector{2.0, 0.0, -2.0, 0.0} : std::vector{0.0, 0.0, 0.0, 0.0},
       name + ": cotangents at a mask");
    is(outputs_at(layer_of(kind), {{-inf, -inf}}, {{1, 1}}, 1, 1).y, {nan, nan}, name + ": a row of -inf");
  }

  const std::vector<double> numbers = {4, 5, 6, 7};
  for (const Kind kind : {Kind::gather, Kind::scatter}) {  // places outside
    LoopLayer lookup = layer_of(kind);
    o = outputs_at(lookup, {numbers, {3, -1, 4, nan}}, {ones, {}}, 2, 3);
    if (kind == Kind::gather) {
      expect(equal(o.y, {7, nan, nan, nan}) && equal(o.grad_x[0], {0, 0, 0, 2}), "gather: places outside");
    } else {
      expect(equal(o.y, {nan, 0, 0, 4}) && equal(o.grad_x[0], {2, nan, nan, nan}), "scatter: places outside");
    }
  }
  LoopLayer sort = layer_of(Kind::sort);
  is(outputs_at(sort, {{2, nan, -inf, 2}}, {ones}, 1, 1).y, {2, 0, 3, 1}, "sort: ties and NaN");
  sort.layer.a = 1;
  is(outputs_at(sort, {{2, nan, -inf, 2}}, {ones}, 1, 1).y, {1, 0, 3, 2}, "sort: descending");

  // A value that does not move has no tangent, though its derivative is infinite.
  const LoopLayer root = map_of(expression(2, {unary(F::sqrt, 0), combined(C::mul, 2, 1)}));
  o = outputs_at(root, {{0, 4}, {3, 3}}, {{}, {2, 2}}, 1, 5);
  expect(equal(o.y_dot, {0, 4}) && equal(o.grad_x[1], {0, 2}) && equal(o.grad_x_dot[1], {0, 10}),
         "map: the root of 0, which does not move");
  // The argument that where() does not take is never multiplied by 0.
  const LoopLayer where =
      map_of(expression(2, {unary(F::affine, 0, 0, 2), combined(C::gt, 0, 2), combined(C::where, 3, 0, 1)}));
  o = outputs_at(where, {{3, 1, nan}, {inf, inf, -2}}, {{4, 5, 6}, {inf, inf, 1}}, 7, 8);
  expect(equal(o.y, {3, inf, -2}) && equal(o.y_dot, {4, inf, 1}) && equal(o.grad_x[0], {7, 0, 0}) &&
             equal(o.grad_x[1], {0, 7, 7}) && equal(o.grad_x_dot[0], {8, 0, 0}),
         "map: where() selects");
  const LoopLayer larger = map_of(expression(2, {combined(C::maximum, 0, 1)}));
  o = outputs_at(larger, {{1, 2, nan}, {1, 3, 1}}, {{2, 2, 2}, {4, 4, 4}}, 6, 8);
  expect(equal(o.y, {1, 3, nan}) && o.y_dot[0] == 3 && o.y_dot[1] == 4 && o.grad_x[0][0] == 3 &&
             o.grad_x[1][0] == 3 && o.grad_x[0][1] == 0 && o.grad_x_dot[1][0] == 4,
         "map: a tie of maximum");
  auto derivatives = [&](const ExpressionStep& step, const std::vector<double>& x) {
    return outputs_at(map_of(expression(1, {step})), {x}, {std::vector<double>(x.size(), 1)}, 1, 0);
  };
  is(derivatives(unary(F::abs, 0), {-1, 0, 2}).grad_x[0], {-1, 0, 1}, "map: |x| at 0");
  is(derivatives(unary(F::clamp, 0, -1, 2), {-2, -1, 2, 3}).grad_x[0], {0, 1, 1, 0},
     "map: the ends of clamp");
  is(derivatives(unary(F::power, 0, 2), {0, 3}).grad_x_dot[0], {2, 2}, "map: the square at 0");
  is(derivatives(unary(F::power, 0, 1), {0, 3}).grad_x_dot[0], {0, 0}, "map: the power 1 at 0");
  const LoopLayer power = map_of(expression(2, {combined(C::pow, 0, 1)}));
  o = outputs_at(power, {{0, 0, 2}, {0, 2, 0}}, {{1, 1, 1}, {1, 1, 1}}, 1, 0);
  expect(equal(o.y, {1, 0, 1}) && equal(o.grad_x[0], {0, 0, 0}) && o.grad_x[1][0] == 0 &&
             o.grad_x[1][1] == 0 && o.grad_x[1][2] == std::log(2),
         "map: powers of 0 and to 0");
}

/// What steps of 32 bits cannot number is refused before anything runs.
void check_limits() {
  LoopLayer l = layer_of(Kind::reduce);
  l.layer.n = 1;
  l.loops = {
      loops_over({int64_t{1} << 16, int64_t{1} << 15}, {{1, false, false, 0, {}}}, {1, false, false, 0, {}})};
  l.layer.loops = l.loops.data();
  TestMemory<double> memory(1, 100);
  Tensors<double> t;
  t.x[0] = memory.take(1), t.y = memory.take(1);
  std::string error;
  try {
    passes_of<double>(Kind::reduce).forward(memory.launcher(), l.layer, t);
  } catch (const std::invalid_argument& e) {
    error = e.what();
  }
  expect(error == "a layer over loops takes fewer than 2^31 steps a task, got 2147483648",
         "loops: 2^31 steps are refused, got: " + error);
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
    all.back().push_back(check_loops<float>(random_contraction(random), {}));
    all.back().push_back(check_split_sums<float>(1));
    all.back().push_back(check_split_sums<float>(2));
    expect(std::equal(all.back().end()[-2].begin(), all.back().end()[-2].begin() + 96,
                      all.back().back().begin()),
           "contract: the bits of a split sum depend on the number of tasks");
    all.back().push_back(check_loops<float>(random_windows(random), {}));
    all.back().push_back(check_loops<float>(random_dropout(random), {}));
    all.back().push_back(check_loops<float>(random_depthwise(random), {}));
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
    check_random<double>(100);
    check_random<float>(30);
    check_maps<double>();
    check_maps<float>();
    check_products_with_itself<double>();
    check_split_sums<double>(2);
    check_special_values();
    check_limits();
  });
  if (argc == 1) check_bits();
  return report();
}
