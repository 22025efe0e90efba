// References for the CUDA layers on tensors of any shape, sharing no code with them: the loops of
// layers/loops.h are run one step after the other, in dual numbers, and write the forward pass and the chain
// rule. The expressions of a map are written by hand; their derivatives are those of the formula itself.
#pragma once

#include <functional>
#include <map>

#include "layer_references.h"

namespace maml {

/// Calls f(index) for every step of the loops, in row-major order.
template <class F>
void each_index(const Loops& loops, int64_t n, F f) {
  std::vector<int64_t> index(kMostAxes, 0);
  for (;;) {
    f(index);
    int a = loops.axes - 1;
    for (; a >= 0; --a) {
      if (++index[a] < (loops.size[a] == kSamples ? n : loops.size[a])) break;
      index[a] = 0;
    }
    if (a < 0) return;
  }
}

inline int64_t at(const View& view, const std::vector<int64_t>& index) {
  int64_t element = view.offset;
  for (int a = 0; a < kMostAxes; ++a) element += index[a] * view.stride[a];
  return element;
}

inline int64_t count_of(const View& view, int64_t n) { return view.samples ? n * view.size : view.size; }

/// An instruction of an expression; see ExpressionStep.
inline ExpressionStep unary(Function f, int x, double a = 0, double b = 0, double c = 1) {
  ExpressionStep step;
  step.function = f, step.argument[0] = x, step.constants = {a, b, c};
  return step;
}
inline ExpressionStep combined(Combination f, int x, int y, int z = 0) {
  ExpressionStep step;
  step.unary = false, step.combination = f;
  step.argument[0] = x, step.argument[1] = y, step.argument[2] = z;
  return step;
}
inline Expression expression(int operands, const std::vector<ExpressionStep>& steps) {
  Expression e;
  e.operands = operands, e.count = static_cast<int>(steps.size());
  for (int i = 0; i < e.count; ++i) e.step[i] = steps[i];
  return e;
}

inline double angle(double y, double x) { return std::atan2(y, x); }
template <class S>
Dual<S> angle(Dual<S> y, Dual<S> x) {
  return {angle(y.v, x.v), (x.v * y.d - y.v * x.d) / (x.v * x.v + y.v * y.v)};
}

template <class S>
S combination_of(Combination c, S x, S y) {
  const double a = value_of(x), b = value_of(y);
  switch (c) {
    case Combination::add:
      return x + y;
    case Combination::sub:
      return x - y;
    case Combination::mul:
      return x * y;
    case Combination::div:
      return x / y;
    case Combination::pow:
      return exp(y * log(x));
    case Combination::atan2:
      return angle(x, y);
    case Combination::maximum:
      return a == b ? (x + y) / S(2) : a > b ? x : y;
    case Combination::minimum:
      return a == b ? (x + y) / S(2) : a < b ? x : y;
    case Combination::eq:
      return S(a == b);
    case Combination::ne:
      return S(a != b);
    case Combination::lt:
      return S(a < b);
    case Combination::le:
      return S(a <= b);
    case Combination::gt:
      return S(a > b);
    case Combination::ge:
      return S(a >= b);
    case Combination::where:
    case Combination::count:
      break;
  }
  std::abort();
}

/// An expression and the same as a formula; see formulas() in loop_cases.h. The derivatives of the formula
/// need two levels of dual numbers.
using Twice = Dual<Dual<double>>;
struct Formula {
  Expression e;
  std::function<Twice(const std::vector<Twice>& x)> f;
  bool positive = false;  // the arguments
};

/// A layer with what it points to. `inputs`: how many operands are given.
struct LoopLayer {
  Layer layer{};
  std::vector<Loops> loops;
  Formula formula{};
  Mask mask{};
  int inputs = 1;

  const View& x(int j) const { return layer.kind == Kind::move ? loops[j].x[0] : loops[0].x[j]; }
  const View& y() const { return loops[0].y; }
};

/// The values of one task: operands, y, and the cotangents.
struct LoopValues {
  std::vector<Dual<double>> x[kMostInputs], g, y, grad_x[kMostInputs];
  uint32_t task = 0;  // its number in the call
};

/// The seed of the call.
inline constexpr uint64_t kSeed = 0x8123456789abcdef;

/// The random number of an element of a mask: Philox4x32-10 (Salmon et al. 2011).
inline uint32_t random_number(uint32_t task, uint32_t pass, uint32_t number, int64_t element) {
  uint32_t c[4] = {static_cast<uint32_t>(element >> 2), number, pass, task};
  for (uint32_t r = 0; r < 10; ++r) {
    const uint64_t left = 0xD2511F53ULL * c[0], right = 0xCD9E8D57ULL * c[2];
    const auto key_0 = static_cast<uint32_t>(kSeed + r * 0x9E3779B9ULL);
    const auto key_1 = static_cast<uint32_t>((kSeed >> 32) + r * 0xBB67AE85ULL);
    const uint32_t next[4] = {static_cast<uint32_t>(right >> 32) ^ c[1] ^ key_0, static_cast<uint32_t>(right),
                              static_cast<uint32_t>(left >> 32) ^ c[3] ^ key_1, static_cast<uint32_t>(left)};
    std::copy_n(next, 4, c);
  }
  return c[element & 3];
}

using D = Dual<double>;

inline void extreme_reference(const LoopLayer& l, LoopValues& v) {
  const Reduction r = l.layer.reduction;
  std::map<int64_t, std::vector<int64_t>> elements;  // of x, for each of y
  each_index(l.loops[0], l.layer.n, [&](const auto& i) { elements[at(l.y(), i)].push_back(at(l.x(0), i)); });
  for (const auto& [y, all] : elements) {
    const bool largest = r == Reduction::amax || r == Reduction::max;
    int64_t best = all[0];
    for (const int64_t e : all) {
      if (largest ? v.x[0][e].v > v.x[0][best].v : v.x[0][e].v < v.x[0][best].v) best = e;
    }
    std::vector<int64_t> chosen;
    for (const int64_t e : all) {
      if (v.x[0][e].v != v.x[0][best].v) continue;
      if (chosen.empty() || r == Reduction::amax || r == Reduction::amin) chosen.push_back(e);
    }
    const D share = D(1) / D(static_cast<double>(chosen.size()));
    for (const int64_t e : chosen) {
      v.y[y] += share * v.x[0][e];
      v.grad_x[0][e] += share * v.g[y];
    }
  }
}

inline void softmax_reference(const LoopLayer& l, LoopValues& v) {
  std::map<std::vector<int64_t>, std::vector<std::pair<int64_t, int64_t>>> rows;  // elements of x and y
  each_index(l.loops[0], l.layer.n, [&](std::vector<int64_t> i) {
    const std::pair<int64_t, int64_t> elements{at(l.x(0), i), at(l.y(), i)};
    i[l.loops[0].axes - 1] = 0;
    rows[i].push_back(elements);
  });
  for (const auto& [key, row] : rows) {
    D sum(0), grad_sum(0);
    for (const auto& [x, y] : row) sum += exp(v.x[0][x]);
    for (const auto& [x, y] : row) {
      const D e = exp(v.x[0][x]);
      v.y[y] = l.layer.kind == Kind::softmax ? e / sum : log(e / sum);
      grad_sum += l.layer.kind == Kind::softmax ? -(v.g[y] * e) / (sum * sum) : -v.g[y] / sum;
    }
    for (const auto& [x, y] : row) {
      const D e = exp(v.x[0][x]);
      v.grad_x[0][x] += l.layer.kind == Kind::softmax ? v.g[y] / sum * e : v.g[y];
      v.grad_x[0][x] += grad_sum * e;
    }
  }
}

/// gather and scatter: the operand with the further axis, and the other one.
inline void lookup_reference(const LoopLayer& l, LoopValues& v) {
  const Loops& loops = l.loops[0];
  const bool scatters = l.layer.kind == Kind::scatter;
  each_index(loops, l.layer.n, [&](const auto& i) {
    const double index = v.x[1][at(l.x(1), i)].v;
    int64_t x = at(l.x(0), i), y = at(l.y(), i);
    const bool inside = 0 <= index && index < static_cast<double>(loops.axis.size);
    if (inside) (scatters ? y : x) += static_cast<int64_t>(index) * loops.axis.stride;
    const D nan(std::numeric_limits<double>::quiet_NaN());
    v.y[y] += inside ? v.x[0][x] : nan;
    if (inside || scatters) v.grad_x[0][x] += inside ? v.g[y] : nan;
  });
}

/// The place of an element is the number of those that come before it.
inline void sort_reference(const LoopLayer& l, LoopValues& v) {
  const Loops& loops = l.loops[0];
  const int last = loops.axes - 1;
  each_index(loops, l.layer.n, [&](std::vector<int64_t> i) {
    const auto own = static_cast<double>(i[last]), value = v.x[0][at(l.x(0), i)].v;
    int64_t before = 0;
    for (i[last] = 0; i[last] < loops.size[last]; ++i[last]) {
      const double other = v.x[0][at(l.x(0), i)].v;
      const bool first = static_cast<double>(i[last]) < own;
      before += l.layer.a != 0 ? other > value || (first && other == value)
                               : other < value || (first && other == value);
    }
    i[last] = before;
    v.y[at(l.y(), i)] = D(own);
  });
}

inline void map_reference(const LoopLayer& l, LoopValues& v) {
  each_index(l.loops[0], l.layer.n, [&](const auto& i) {
    std::vector<Twice> x;
    for (int j = 0; j < l.inputs; ++j) x.emplace_back(v.x[j][at(l.x(j), i)], D(0));
    const int64_t y = at(l.y(), i);
    v.y[y] = l.formula.f(x).v;
    for (int j = 0; j < l.inputs; ++j) {
      x[j].d = D(1);
      v.grad_x[j][at(l.x(j), i)] += l.formula.f(x).d * v.g[y];
      x[j].d = D(0);
    }
  });
}

/// Calls f(index) for every step along some axes of the loops, from an index on.
template <class F>
void each_along(const Loops& loops, std::vector<int64_t> index, int axis, F f) {
  for (index[axis] = 0; index[axis] < loops.size[axis]; ++index[axis]) f(index);
}

/// A row of scores, of weights exp(s) / sum exp(s), and of y after the other; then the chain rule backwards.
inline void attention_reference(const LoopLayer& l, LoopValues& v) {
  const Loops& loops = l.loops[0];
  const int keys = loops.axes - 3, depth = loops.axes - 2, width = loops.axes - 1;
  const D scale(l.layer.a);
  Loops rows = loops;
  rows.size[keys] = rows.size[depth] = rows.size[width] = 1;
  each_index(rows, l.layer.n, [&](const auto& row) {
    std::vector<D> weight, grad_weight;
    D sum(0), mean(0);
    each_along(loops, row, keys, [&](const auto& key) {
      D score = l.inputs > 3 ? v.x[3][at(l.x(3), key)] : D(0);
      each_along(loops, key, depth,
                 [&](const auto& i) { score += scale * v.x[0][at(l.x(0), i)] * v.x[1][at(l.x(1), i)]; });
      weight.push_back(exp(score));
      sum += weight.back();
    });
    each_along(loops, row, keys, [&](const auto& key) {
      D &p = weight[key[keys]], grad(0);
      p = p / sum;
      each_along(loops, key, width, [&](const auto& i) {
        const D g = v.g[at(l.y(), i)];
        v.y[at(l.y(), i)] += p * v.x[2][at(l.x(2), i)];
        v.grad_x[2][at(l.x(2), i)] += p * g;
        grad += g * v.x[2][at(l.x(2), i)];
      });
      grad_weight.push_back(grad);
      mean += p * grad;
    });
    each_along(loops, row, keys, [&](const auto& key) {
      const D grad = weight[key[keys]] * (grad_weight[key[keys]] - mean);
      if (l.inputs > 3) v.grad_x[3][at(l.x(3), key)] += grad;
      each_along(loops, key, depth, [&](const auto& i) {
        v.grad_x[0][at(l.x(0), i)] += scale * grad * v.x[1][at(l.x(1), i)];
        v.grad_x[1][at(l.x(1), i)] += scale * grad * v.x[0][at(l.x(0), i)];
      });
    });
  });
}

/// The element of x at a position and a tap of its windows; -1 outside of x.
inline int64_t at_window(const Loops& loops, const std::vector<int64_t>& i) {
  int64_t x = at(loops.x[0], i);
  for (int d = 0; d < loops.slides; ++d) {
    const Slide& s = loops.slide[d];
    const int64_t place = i[s.position] * s.stride + i[s.tap] * s.dilation - s.padding;
    if (place < 0 || place >= s.size) return -1;
    x += place * s.x_stride;
  }
  return x;
}

/// Computes y and the cotangents of all operands.
inline void loop_reference(const LoopLayer& l, LoopValues& v) {
  const int64_t n = l.layer.n;
  v.y.assign(count_of(l.y(), n), D(0));
  for (int j = 0; j < l.inputs; ++j) v.grad_x[j].assign(count_of(l.x(j), n), D(0));
  switch (l.layer.kind) {
    case Kind::move:
      for (int j = 0; j < l.inputs; ++j) {
        const Loops& loops = l.loops[j];
        each_index(loops, n, [&](const auto& i) {
          v.y[at(loops.y, i)] = v.x[j][at(loops.x[0], i)];
          v.grad_x[j][at(loops.x[0], i)] += v.g[at(loops.y, i)];
        });
      }
      return;
    case Kind::windows:
      each_index(l.loops[0], n, [&](const auto& i) {
        const int64_t x = at_window(l.loops[0], i);
        if (x < 0) return;
        v.y[at(l.y(), i)] = v.x[0][x];
        v.grad_x[0][x] += v.g[at(l.y(), i)];
      });
      return;
    case Kind::depthwise:
      each_index(l.loops[0], n, [&](const auto& i) {
        const int64_t x = at_window(l.loops[0], i), w = at(l.x(1), i), y = at(l.y(), i);
        if (x < 0) return;
        v.y[y] += v.x[0][x] * v.x[1][w];
        v.grad_x[0][x] += v.g[y] * v.x[1][w];
        v.grad_x[1][w] += v.g[y] * v.x[0][x];
      });
      return;
    case Kind::reduce: {
      double count = 1;
      for (int a = 0; a < l.loops[0].axes && l.layer.reduction == Reduction::mean; ++a) {
        if (l.y().stride[a] == 0) count *= static_cast<double>(extent(l.loops[0], a, n));
      }
      each_index(l.loops[0], n, [&](const auto& i) {
        v.y[at(l.y(), i)] += v.x[0][at(l.x(0), i)] / D(count);
        v.grad_x[0][at(l.x(0), i)] += v.g[at(l.y(), i)] / D(count);
      });
      return;
    }
    case Kind::contract:
      each_index(l.loops[0], n, [&](const auto& i) {
        const int64_t a = at(l.x(0), i), b = at(l.x(1), i), y = at(l.y(), i);
        v.y[y] += v.x[0][a] * v.x[1][b];
        v.grad_x[0][a] += v.g[y] * v.x[1][b];
        v.grad_x[1][b] += v.g[y] * v.x[0][a];
      });
      return;
    case Kind::dropout: {
      const Loops& loops = l.loops[0];
      each_index(loops, n, [&](const auto& i) {
        int64_t element = 0;
        for (int a = 0; a < loops.axes; ++a) {
          const int64_t step = i[a] + (loops.size[a] == kSamples ? l.layer.stream.first_sample : 0);
          element += step * l.mask.stride[a] * (l.mask.times_samples[a] ? l.layer.stream.samples : 1);
        }
        const uint32_t random = random_number(v.task, l.layer.stream.pass, l.mask.number, element);
        const D m(random < l.mask.keep ? l.layer.a : 0);
        v.y[at(l.y(), i)] = m * v.x[0][at(l.x(0), i)];
        v.grad_x[0][at(l.x(0), i)] += m * v.g[at(l.y(), i)];
      });
      return;
    }
    case Kind::stop:
      each_index(l.loops[0], n, [&](const auto& i) { v.y[at(l.y(), i)] = D(v.x[0][at(l.x(0), i)].v); });
      return;
    case Kind::extreme:
      return extreme_reference(l, v);
    case Kind::softmax:
    case Kind::log_softmax:
      return softmax_reference(l, v);
    case Kind::gather:
    case Kind::scatter:
      return lookup_reference(l, v);
    case Kind::sort:
      return sort_reference(l, v);
    case Kind::map:
      return map_reference(l, v);
    case Kind::attention:
      return attention_reference(l, v);
    default:
      std::abort();
  }
}

}  // namespace maml
