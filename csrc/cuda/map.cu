// y = f(x_0, x_1, ...), element by element, for all tasks. f is an expression (layers/loops.h): a chain of
// functions in one pass over memory. v_k: an operand or the result of an instruction; bar v_k: the derivative
// of f by it, times g = grad_y; R{.}: the tangent. For an instruction v_k = h(a, b):
//
//   R v_k     = h_a Ra + h_b Rb
//   bar a    += h_a bar v_k,                                                                 and b alike
//   R{bar a} += h_a R{bar v_k} + (h_aa Ra + h_ab Rb) bar v_k,                                and b alike
//
// Threads: a thread interprets the expression for kElements elements of y at once. Its values, tangents and
// cotangents are in shared memory, those of a thread in a bank of its own. Backward, one launch gives the
// cotangents of all inputs that have an element for each of y. Each other input has a launch of its own, in
// which a thread takes an element of it and sums over the elements of y that read it, or shares them with
// others where they are many (shares.h).
//
// A value that does not move has no tangent, not one of 0: its derivative may be infinite, and 0 times that
// is NaN. where() takes one of its arguments and never multiplies by 0.
#include <algorithm>

#include "cuda/implement.h"
#include "cuda/shares.h"

namespace maml::cuda {
namespace {

constexpr int kValues = kMostInputs + kMostInstructions;
constexpr int kOperands = kMostInputs + 1, kY = kMostInputs;  // of the nests: the inputs, then y
static_assert(sizeof(Split<kOperands>) + sizeof(Expression) + sizeof(Tensors<double>) < 4000,
              "a kernel has at most 4 KB of arguments");

/// Elements of y that a thread takes: it reads and interprets an instruction once for all of them.
constexpr int kElements = 4;
constexpr int kMapThreads = kSmallTiles ? 32 : 128;
/// Blocks that a multiprocessor holds: 16 warps with up to 128 registers a thread.
constexpr int kResidentMaps = 4;
/// With more shared memory a block, fewer than kResidentMaps of them fit a multiprocessor of 228 KB.
constexpr size_t kMostSharedOfMap = 56 << 10;

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

/// An instruction at its arguments in each of E elements: the values a and b that it depends on (or a alone:
/// then b is negative), and its derivatives by them. Which value where() takes depends on the element.
template <int E, class T>
struct Applied {
  int a[E], b;
  Partials<T> h[E];
  bool selects, bends;

  /// slope x
  __device__ __forceinline__ T product(T slope, T x) const {
    return selects ? times<true>(slope, x) : times<false>(slope, x);
  }
};

/// One number for each value of the expression and each of this thread's elements, in shared memory.
template <int E, class T>
class Numbers {
 public:
  /// Part `part` of the block's shared memory.
  __device__ __forceinline__ Numbers(const Expression& e, int part)
      : at_(reinterpret_cast<T*>(dynamic_shared()) + part * (e.operands + e.count) * E * kMapThreads +
            threadIdx.x) {}
  __device__ __forceinline__ T& operator()(int value, int element) const {
    return at_[(value * E + element) * kMapThreads];
  }

 private:
  T* at_;
};

template <int E, class T>
__device__ __forceinline__ Applied<E, T> apply(const ExpressionStep& s, const Numbers<E, T>& v) {
  const int x = s.argument[0], y = s.argument[1];
  Applied<E, T> applied{{}, -1, {}, selects(s), false};
#pragma unroll
  for (int k = 0; k < E; ++k) applied.a[k] = x;
  if (s.unary) {
    with_function(s.function, [&]<Function F>() {
#pragma unroll
      for (int k = 0; k < E; ++k) {
        const Derivatives<T> d = evaluate<F, T>(s.constants, v(x, k));
        applied.h[k].f = d.f, applied.h[k].fx = d.df, applied.h[k].fxx = d.ddf;
      }
      applied.bends = FunctionDeclaration<F>::bends;
    });
  } else if (s.combination == Combination::where) {
#pragma unroll
    for (int k = 0; k < E; ++k) {
      applied.a[k] = v(x, k) != 0 ? y : s.argument[2];
      applied.h[k].f = v(applied.a[k], k), applied.h[k].fx = T(1);
    }
  } else {
    applied.b = y;
    with_combination(s.combination, [&]<Combination C>() {
#pragma unroll
      for (int k = 0; k < E; ++k) applied.h[k] = CombinationDeclaration<C>::template at<T>(v(x, k), v(y, k));
      applied.bends = CombinationDeclaration<C>::bends;
    });
  }
  return applied;
}

/// The tensors of a launch, as symbolic addresses.
template <class T>
struct Map {
  Split<kOperands> loops;
  Expression e;
  Set moves, wanted;  // values that have a tangent; values whose cotangent is wanted, operands among them
  Tensors<T> t;
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

/// The expression at E elements of y.
template <bool kTangent, int E, class T>
class Evaluation {
 public:
  __device__ __forceinline__ Evaluation(const Map<T>& map, const Memory& memory)
      : e_(map.e),
        moves_(map.moves),
        wanted_(map.wanted),
        x_(resolve_all(map.t.x, memory)),
        x_dot_(resolve_all(map.t.x_dot, memory)),
        v_(map.e, 0),
        dot_(map.e, 1),
        bar_(map.e, kTangent ? 2 : 1),
        bar_dot_(map.e, 3) {}

  __device__ __forceinline__ void read(const Offsets<kOperands>& at, int element) const {
#pragma unroll
    for (int j = 0; j < kMostInputs; ++j) {
      if (j >= e_.operands) continue;
      v_(j, element) = x_.of[j][at.of[j]];
      if (kTangent) dot_(j, element) = x_dot_.of[j] ? x_dot_.of[j][at.of[j]] : T(0);
    }
  }
  /// All results, and their tangents, 0 of those that do not move.
  __device__ __forceinline__ void up() const {
#pragma unroll 1
    for (int i = 0; i < e_.count; ++i) {
      const int result = e_.operands + i;
      const Applied<E, T> step = apply(e_.step[i], v_);
#pragma unroll
      for (int k = 0; k < E; ++k) {
        v_(result, k) = step.h[k].f;
        if (!kTangent) continue;
        T tangent = 0;
        if (contains(moves_, result)) {
          if (contains(moves_, step.a[k])) tangent += step.product(step.h[k].fx, dot_(step.a[k], k));
          if (step.b >= 0 && contains(moves_, step.b)) tangent += step.product(step.h[k].fy, dot_(step.b, k));
        }
        dot_(result, k) = tangent;
      }
    }
  }
  /// All cotangents, and their tangents, of what is wanted. g and g_dot: of each element of y.
  __device__ __forceinline__ void down(const T (&g)[E], const T (&g_dot)[E]) const {
    const int last = e_.operands + e_.count - 1;
    for (int value = 0; value < last; ++value)
#pragma unroll
      for (int k = 0; k < E; ++k) {
        bar_(value, k) = 0;
        if (kTangent) bar_dot_(value, k) = 0;
      }
#pragma unroll
    for (int k = 0; k < E; ++k) {
      bar_(last, k) = g[k];
      if (kTangent) bar_dot_(last, k) = g_dot[k];
    }
#pragma unroll 1
    for (int i = e_.count - 1; i >= 0; --i) {
      const int result = e_.operands + i;
      if (!contains(wanted_, result)) continue;
      const Applied<E, T> step = apply(e_.step[i], v_);
      const bool turns = step.bends && contains(moves_, result);  // h_a and h_b have tangents
#pragma unroll
      for (int k = 0; k < E; ++k) {
        const int a = step.a[k], b = step.b;
        const Partials<T>& h = step.h[k];
        const T bar = bar_(result, k);
        bar_(a, k) += step.product(h.fx, bar);
        if (b >= 0) bar_(b, k) += step.product(h.fy, bar);
        if (!kTangent) continue;
        T da = 0, db = 0;
        if (turns && contains(moves_, a)) da += h.fxx * dot_(a, k), db += h.fxy * dot_(a, k);
        if (turns && b >= 0 && contains(moves_, b)) da += h.fxy * dot_(b, k), db += h.fyy * dot_(b, k);
        const T bar_dot = bar_dot_(result, k);
        bar_dot_(a, k) += step.product(h.fx, bar_dot) + (turns ? da * bar : T(0));
        if (b >= 0) bar_dot_(b, k) += step.product(h.fy, bar_dot) + (turns ? db * bar : T(0));
      }
    }
  }

  /// What a forward pass gives of a result, and a backward pass of an operand.
  __device__ __forceinline__ T value(int v, int k) const { return kTangent ? dot_(v, k) : v_(v, k); }
  __device__ __forceinline__ T cotangent(int v, int k) const {
    return kTangent ? bar_dot_(v, k) : bar_(v, k);
  }

 private:
  const Expression& e_;
  const Set moves_, wanted_;
  const Pointers<T> x_, x_dot_;
  const Numbers<E, T> v_, dot_, bar_, bar_dot_;
};

/// Step k of a thread: neighbours of a warp have neighbouring steps. Beyond the last one it is the last.
template <int E>
__device__ __forceinline__ int64_t step_of(int k) {
  return (static_cast<int64_t>(blockIdx.x) * E + k) * kMapThreads + threadIdx.x;
}

template <bool kTangent, int E, class T>
__global__ void __launch_bounds__(kMapThreads, kResidentMaps)
    forward_kernel(const __grid_constant__ Map<T> map, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Evaluation<kTangent, E, T> evaluation(map, memory);
  const int64_t steps = map.loops.outer.steps;
  T* const y = resolve(kTangent ? map.t.y_dot : map.t.y, memory, blockIdx.z);
  int64_t to[E];
#pragma unroll
  for (int k = 0; k < E; ++k) {
    const Offsets<kOperands> at = outer_step(map.loops, std::min(step_of<E>(k), steps - 1));
    evaluation.read(at, k);
    to[k] = at.of[kY];
  }
  evaluation.up();
#pragma unroll
  for (int k = 0; k < E; ++k)
    if (step_of<E>(k) < steps) y[to[k]] = evaluation.value(map.e.operands + map.e.count - 1, k);
}

/// The cotangents, or their tangents, of all operands in `wanted` that have an element for each of y.
template <bool kTangent, int E, class T>
__global__ void __launch_bounds__(kMapThreads, kResidentMaps)
    backward_kernel(const __grid_constant__ Map<T> map, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Evaluation<kTangent, E, T> evaluation(map, memory);
  const int64_t steps = map.loops.outer.steps;
  const T* const g = resolve(map.t.grad_y, memory, blockIdx.z);
  const T* const g_dot = resolve(map.t.grad_y_dot, memory, blockIdx.z);
  T of_y[E], of_y_dot[E];
#pragma unroll
  for (int k = 0; k < E; ++k) {
    const Offsets<kOperands> at = outer_step(map.loops, std::min(step_of<E>(k), steps - 1));
    evaluation.read(at, k);
    of_y[k] = g ? g[at.of[kY]] : T(0);
    of_y_dot[k] = kTangent ? g_dot[at.of[kY]] : T(0);
  }
  evaluation.up();
  evaluation.down(of_y, of_y_dot);
#pragma unroll
  for (int k = 0; k < E; ++k) {
    if (step_of<E>(k) >= steps) return;
    const Offsets<kOperands> at = outer_step(map.loops, step_of<E>(k));
#pragma unroll
    for (int j = 0; j < kMostInputs; ++j) {
      if (!contains(map.wanted, j) || j >= map.e.operands) continue;
      T* const out = resolve((kTangent ? map.t.grad_x_dot : map.t.grad_x)[j], memory, blockIdx.z);
      put(out, at.of[j], evaluation.cotangent(j, k), map.t.add_x[j]);
    }
  }
}

/// The same of one operand of which an element is read by several of y: a sum over these. The loops are split
/// by that operand.
template <bool kTangent, class T>
__global__ void __launch_bounds__(kMapThreads, kResidentMaps)
    backward_sum_kernel(const __grid_constant__ Map<T> map, Shares shares, int operand, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Evaluation<kTangent, 1, T> evaluation(map, memory);
  const T* const g = resolve(map.t.grad_y, memory, blockIdx.z);
  const T* const g_dot = resolve(map.t.grad_y_dot, memory, blockIdx.z);
  T* const out = resolve((kTangent ? map.t.grad_x_dot : map.t.grad_x)[operand], memory, blockIdx.z);
  Sharer sharer(shares);
  sharer.each(grid_team(), map.loops.outer.steps, [&](int64_t step) {
    const Offsets<kOperands> to = outer_step(map.loops, step);
    Sum<T> own;
    sharer.each_step(map.loops.inner, to, [&](const Offsets<kOperands>& at) {
      evaluation.read(at, 0);
      evaluation.up();
      const T of_y[1] = {g ? g[at.of[kY]] : T(0)}, of_y_dot[1] = {kTangent ? g_dot[at.of[kY]] : T(0)};
      evaluation.down(of_y, of_y_dot);
      own += evaluation.cotangent(operand, 0);
    });
    // The numbers of the threads are no longer needed: the sums take their place.
    const T sum = sharer.sum(own, reinterpret_cast<double*>(dynamic_shared()));
#pragma unroll
    for (int j = 0; j < kMostInputs; ++j)  // so that the offsets stay in registers
      if (j == operand && sharer.is_first()) put(out, to.of[j], sum, map.t.add_x[j]);
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

/// The shared memory of a block that holds `parts` numbers for each value and element.
template <class T>
size_t shared_bytes(const Expression& e, int parts, int elements) {
  return static_cast<size_t>(parts * (e.operands + e.count) * elements * kMapThreads) * sizeof(T);
}

/// body.template operator()<E>(shared bytes): four elements a thread, or one where four take too much memory.
template <class T, class Body>
void with_elements(const Expression& e, int parts, Body body) {
  const size_t of_four = shared_bytes<T>(e, parts, kElements);
  if (of_four <= kMostSharedOfMap) return body.template operator()<kElements>(of_four);
  body.template operator()<1>(shared_bytes<T>(e, parts, 1));
}

template <bool kTangent, class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const Expression& e = *l.expression;
  const Map<T> map{split_by(l, l.loops->y), e, kTangent ? dependent(e, operands_that_move(e, t)) : 0, 0, t};
  with_elements<T>(e, kTangent ? 2 : 1, [&]<int E>(size_t bytes) {
    launch(kTangent ? "map forward tangent" : "map forward", forward_kernel<kTangent, E, T>,
           {blocks_for(map.loops.outer.steps, E * kMapThreads)}, kMapThreads, bytes, map, launch.memory);
  });
}

template <bool kTangent, class T>
void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const Expression& e = *l.expression;
  const char* const name = kTangent ? "map backward tangent" : "map backward";
  constexpr int kParts = kTangent ? 4 : 2;
  T* const* const out = kTangent ? t.grad_x_dot : t.grad_x;
  // Without g, what an input adds to R{bar a} is 0.
  const Set moves = kTangent && t.grad_y ? dependent(e, operands_that_move(e, t)) : 0;
  Map<T> map{split_by(l, l.loops->y), e, moves, 0, t};
  Set in_place = 0;
  for (int j = 0; j < e.operands; ++j) {
    if (!out[j]) continue;
    const Split<kOperands> by_operand = split_by(l, l.loops->x[j]);
    clear_unless_reached(launch, l.loops->x[j], l.n, by_operand.outer.steps, t.add_x[j], out[j]);
    const bool alone =
        std::count(out, out + e.operands, out[j]) == 1;  // else two threads could write one element
    if (alone && by_operand.inner.steps == 1) {
      in_place |= Set{1} << j;
      continue;
    }
    const Map<T> sums{by_operand, e, moves, dependent(e, Set{1} << j), t};
    const Shares shares = shares_of(by_operand, kY, kMapThreads);
    const size_t bytes = std::max(shared_bytes<T>(e, kParts, 1), kMapThreads * sizeof(double));
    launch(name, backward_sum_kernel<kTangent, T>, shared_grid(shares, by_operand.outer.steps), kMapThreads,
           bytes, sums, shares, j, launch.memory);
  }
  if (!in_place) return;
  map.wanted = dependent(e, in_place);
  with_elements<T>(e, kParts, [&]<int E>(size_t bytes) {
    launch(name, backward_kernel<kTangent, E, T>, {blocks_for(map.loops.outer.steps, E * kMapThreads)},
           kMapThreads, bytes, map, launch.memory);
  });
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
