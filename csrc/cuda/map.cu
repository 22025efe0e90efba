// y = f(x_0, x_1, ...), element by element, for all tasks. f is an expression (layers/loops.h), which a
// thread interprets, with its values in local memory. v_k: an operand or the result of an instruction; bar
// v_k: the derivative of f by it, times g = grad_y; R{.}: the tangent. For an instruction v_k = h(a, b):
//
//   R v_k     = h_a Ra + h_b Rb
//   bar a    += h_a bar v_k,                                                                 and b alike
//   R{bar a} += h_a R{bar v_k} + (h_aa Ra + h_ab Rb) bar v_k,                                and b alike
//
// Threads: forward, a thread takes an element of y. Backward, it takes an element of one input and sums over
// the elements of y that read it, or shares it with others where these are many (shares.h); each input that
// wants a cotangent has a launch of its own, which computes the expression again.
//
// A value that does not move has no tangent, not one of 0: its derivative may be infinite, and 0 times that
// is NaN. where() takes one of its arguments and never multiplies by 0.
#include "cuda/implement.h"
#include "cuda/shares.h"

namespace maml::cuda {
namespace {

constexpr int kValues = kMostInputs + kMostInstructions;
constexpr int kOperands = kMostInputs + 1, kY = kMostInputs;  // of the nests: the inputs, then y
static_assert(sizeof(Split<kOperands>) + sizeof(Expression) + sizeof(Tensors<double>) < 4000,
              "a kernel has at most 4 KB of arguments");

/// A set of values, one bit each.
using Set = unsigned;
static_assert(kValues <= 8 * sizeof(Set));

__host__ __device__ inline bool contains(Set set, int value) { return set >> value & 1; }

/// These operands, and the results whose derivatives by them are not zero everywhere.
Set dependent(const Expression& e, Set operands) {
  Set all = operands;
  for (int i = 0; i < e.count; ++i) {
    const ExpressionStep& s = e.step[i];
    for (int k = 0; k < arguments(s) && !is_flat(s); ++k) {
      if (contains(all, s.argument[first_argument(s) + k])) all |= Set{1} << (e.operands + i);
    }
  }
  return all;
}

/// An instruction at its arguments: the values a and b that it depends on (or a alone: then b is negative),
/// and its derivatives by them.
template <class T>
struct Applied {
  int a, b;
  Partials<T> h;
  bool selects, bends;

  /// slope x
  __device__ __forceinline__ T product(T slope, T x) const {
    return selects ? times<true>(slope, x) : times<false>(slope, x);
  }
};

template <class T>
__device__ __forceinline__ Applied<T> apply(const ExpressionStep& s, const T* v) {
  const int x = s.argument[0], y = s.argument[1];
  Applied<T> applied{x, -1, {}, selects(s), false};
  if (s.unary) {
    with_function(s.function, [&]<Function F>() {
      const Derivatives<T> d = evaluate<F, T>(s.constants, v[x]);
      applied.h.f = d.f, applied.h.fx = d.df, applied.h.fxx = d.ddf;
      applied.bends = FunctionDeclaration<F>::bends;
    });
  } else if (s.combination == Combination::where) {
    applied.a = v[x] != 0 ? y : s.argument[2];
    applied.h.f = v[applied.a], applied.h.fx = T(1);
  } else {
    applied.b = y;
    with_combination(s.combination, [&]<Combination C>() {
      applied.h = CombinationDeclaration<C>::template at<T>(v[x], v[y]);
      applied.bends = CombinationDeclaration<C>::bends;
    });
  }
  return applied;
}

/// The expression at one element of y.
template <class T>
struct Values {
  T v[kValues], dot[kValues];

  __device__ __forceinline__ void read(const Expression& e, const Offsets<kOperands>& at,
                                       const T* const (&x)[kMostInputs]) {
    for (int j = 0; j < e.operands; ++j) v[j] = x[j][at.of[j]];
  }
  __device__ __forceinline__ void read_tangents(const Expression& e, const Offsets<kOperands>& at,
                                                const T* const (&x_dot)[kMostInputs]) {
    for (int j = 0; j < e.operands; ++j) dot[j] = x_dot[j] ? x_dot[j][at.of[j]] : T(0);
  }
  /// All results and their tangents, 0 of those that do not move.
  __device__ __forceinline__ void run(const Expression& e, Set moves) {
    for (int i = 0; i < e.count; ++i) {
      const Applied<T> step = apply(e.step[i], v);
      T& tangent = dot[e.operands + i];
      v[e.operands + i] = step.h.f;
      tangent = 0;
      if (!contains(moves, e.operands + i)) continue;
      if (contains(moves, step.a)) tangent += step.product(step.h.fx, dot[step.a]);
      if (step.b >= 0 && contains(moves, step.b)) tangent += step.product(step.h.fy, dot[step.b]);
    }
  }
};

template <class T>
struct Pointers {
  const T* of[kMostInputs];
};
template <class T>
__device__ __forceinline__ Pointers<T> resolve_all(const T* const (&symbolic)[kMostInputs],
                                                   const Memory& memory) {
  Pointers<T> p;
  for (int j = 0; j < kMostInputs; ++j) p.of[j] = resolve(symbolic[j], memory, blockIdx.z);
  return p;
}

template <bool kTangent, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    forward_kernel(const __grid_constant__ Split<kOperands> loops, const __grid_constant__ Expression e,
                   Set moves, const __grid_constant__ Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Team team = grid_team();
  const Pointers<T> x = resolve_all(symbolic.x, memory), x_dot = resolve_all(symbolic.x_dot, memory);
  T* y = resolve(kTangent ? symbolic.y_dot : symbolic.y, memory, blockIdx.z);
  for (int64_t step = team.first(); step < loops.outer.steps; step += team.step()) {
    const Offsets<kOperands> at = outer_step(loops, step);
    Values<T> values;
    values.read(e, at, x.of);
    if (kTangent) values.read_tangents(e, at, x_dot.of);
    values.run(e, moves);
    y[at.of[kY]] = (kTangent ? values.dot : values.v)[e.operands + e.count - 1];
  }
}

/// bar v_k of one operand; `wanted`: the results that depend on it
template <class T>
__device__ __forceinline__ T cotangent(const Expression& e, int operand, Set wanted, const Values<T>& values,
                                       T g) {
  T bar[kValues] = {};
  bar[e.operands + e.count - 1] = g;
  for (int i = e.count - 1; i >= 0; --i) {
    if (!contains(wanted, e.operands + i)) continue;
    const Applied<T> step = apply(e.step[i], values.v);
    const T b = bar[e.operands + i];
    bar[step.a] += step.product(step.h.fx, b);
    if (step.b >= 0) bar[step.b] += step.product(step.h.fy, b);
  }
  return bar[operand];
}

/// R{bar v_k} of one operand; g is not read if nothing moves.
template <class T>
__device__ __forceinline__ T cotangent_dot(const Expression& e, int operand, Set wanted, Set moves,
                                           const Values<T>& values, T g, T g_dot) {
  T bar[kValues] = {}, bar_dot[kValues] = {};
  bar[e.operands + e.count - 1] = g, bar_dot[e.operands + e.count - 1] = g_dot;
  for (int i = e.count - 1; i >= 0; --i) {
    if (!contains(wanted, e.operands + i)) continue;
    const Applied<T> step = apply(e.step[i], values.v);
    const T b = bar[e.operands + i], b_dot = bar_dot[e.operands + i];
    const bool turns = step.bends && contains(moves, e.operands + i);  // h_a and h_b have tangents
    T da = 0, db = 0;
    if (turns && contains(moves, step.a)) {
      da += step.h.fxx * values.dot[step.a], db += step.h.fxy * values.dot[step.a];
    }
    if (turns && step.b >= 0 && contains(moves, step.b)) {
      da += step.h.fxy * values.dot[step.b], db += step.h.fyy * values.dot[step.b];
    }
    bar[step.a] += step.product(step.h.fx, b);
    bar_dot[step.a] += step.product(step.h.fx, b_dot) + (turns ? da * b : T(0));
    if (step.b < 0) continue;
    bar[step.b] += step.product(step.h.fy, b);
    bar_dot[step.b] += step.product(step.h.fy, b_dot) + (turns ? db * b : T(0));
  }
  return bar_dot[operand];
}

/// The cotangent of one operand, or its tangent; the loops are split by that operand.
template <bool kTangent, class T>
__global__ void __launch_bounds__(kElementThreads, kResidentSteps)
    backward_kernel(const __grid_constant__ Split<kOperands> loops, Shares shares,
                    const __grid_constant__ Expression e, Set moves, int operand, Set wanted,
                    const __grid_constant__ Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Pointers<T> x = resolve_all(symbolic.x, memory), x_dot = resolve_all(symbolic.x_dot, memory);
  const T* g = resolve(symbolic.grad_y, memory, blockIdx.z);
  const T* g_dot = resolve(symbolic.grad_y_dot, memory, blockIdx.z);
  T* out = resolve((kTangent ? symbolic.grad_x_dot : symbolic.grad_x)[operand], memory, blockIdx.z);
  Sharer sharer(shares);
  sharer.each(grid_team(), loops.outer.steps, [&](int64_t step) {
    const Offsets<kOperands> to = outer_step(loops, step);
    Sum<T> own;
    sharer.each_step(loops.inner, to, [&](const Offsets<kOperands>& at) {
      Values<T> values;
      values.read(e, at, x.of);
      if (kTangent) values.read_tangents(e, at, x_dot.of);
      values.run(e, moves);
      if constexpr (kTangent) {
        const T c = g ? g[at.of[kY]] : T(0);
        own += cotangent_dot(e, operand, wanted, moves, values, c, g_dot[at.of[kY]]);
      } else {
        own += cotangent(e, operand, wanted, values, g[at.of[kY]]);
      }
    });
    const T sum = sharer.sum(own);
    if (sharer.is_first()) put(out, to.of[operand], sum, symbolic.add_x[operand]);
  });
}

Split<kOperands> split_by(const Layer& l, const View& by) {
  const Loops& loops = *l.loops;
  const View* const operands[] = {&loops.x[0], &loops.x[1], &loops.x[2], &loops.x[3], &loops.y};
  static_assert(std::size(operands) == kOperands);
  return split<kOperands>(loops, l.n, by, operands);
}

/// Those with a tangent.
template <class T>
Set operands_that_move(const Expression& e, const Tensors<T>& t) {
  Set moves = 0;
  for (int j = 0; j < e.operands; ++j) moves |= Set{t.x_dot[j] != nullptr} << j;
  return moves;
}

template <bool kTangent, class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const Expression& e = *l.expression;
  const Split<kOperands> loops = split_by(l, l.loops->y);
  const Set moves = kTangent ? dependent(e, operands_that_move(e, t)) : 0;
  launch(kTangent ? "map forward tangent" : "map forward", forward_kernel<kTangent, T>,
         step_grid(loops.outer.steps), kElementThreads, 0, loops, e, moves, t, launch.memory);
}

template <bool kTangent, class T>
void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const Expression& e = *l.expression;
  // Without g, what an input adds to R{bar a} is 0.
  const Set moves = kTangent && t.grad_y ? dependent(e, operands_that_move(e, t)) : 0;
  for (int j = 0; j < e.operands; ++j) {
    T* out = (kTangent ? t.grad_x_dot : t.grad_x)[j];
    if (!out) continue;
    const Split<kOperands> loops = split_by(l, l.loops->x[j]);
    const Shares shares = shares_of(loops, kY);
    clear_unless_reached(launch, l.loops->x[j], l.n, loops.outer.steps, t.add_x[j], out);
    launch(kTangent ? "map backward tangent" : "map backward", backward_kernel<kTangent, T>,
           shared_grid(shares, loops.outer.steps), kElementThreads, 0, loops, shares, e, moves, j,
           dependent(e, Set{1} << j), t, launch.memory);
  }
}

}  // namespace

template <>
struct OnGpu<Kind::map> {
  static Footprint footprint(const Layer&) { return {}; }
  template <class T>
  static LaunchPasses<T> passes() {
    return {forward<false, T>, backward<false, T>, forward<true, T>, backward<true, T>};
  }
};
template struct Implementation<Kind::map>;

}  // namespace maml::cuda
