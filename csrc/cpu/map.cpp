// y = f(x_0, x_1, ...), element by element. f is an expression, interpreted for blocks of elements that stay
// in the cache: each instruction is one loop over a block (instructions.h). The variables of f are numbered
// 0 ... m-1, the operands, and m + i, the result of instruction i.
//
// Going up, a pass computes values, tangents and, if it goes down too, the slopes s (partial derivatives)
// with their tangents. Going down, for every instruction y = g(.., a, ..):
//
//   backward            bar_a += s bar_y
//   backward_tangent    bar_a_dot += s bar_y_dot + s_dot bar_y,  and bar_a
//
// Nothing is stored between passes, and nothing is computed that no result depends on. Operands and results
// whose elements lie in the order of y are read and written in place. The cotangent of any other operand is
// added up; the sum of many elements is split. The twin on the GPU is cuda/map.cu.
#include <cassert>

#include "cpu/implement.h"
#include "cpu/instructions.h"
#include "cpu/map_operand.h"

namespace maml::MAML_ISA {
namespace {

enum class Pass { forward, backward, forward_tangent, backward_tangent };

/// What a block holds of a variable. A variable has up to two slopes, by its arguments.
enum Part { kValue, kDot, kBar, kBarDot, kSlope, kSlopeDot = kSlope + 2, kParts = kSlopeDot + 2 };
constexpr int kMostVariables = kMostInputs + kMostInstructions;

/// Registers, which hold a block each, fill most of a first-level cache.
constexpr int64_t kRegisterBytes = int64_t{48} << 10;
constexpr int64_t kMostBlock = 512;

/// The argument by which derivative number `a` of an instruction is.
int argument(const ExpressionStep& s, int a) { return s.argument[first_argument(s) + a]; }

/// to[i] (+)= value(i)
template <class T, class F>
void put(int64_t count, T* to, bool add, F value) {
  if (add) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] += value(i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = value(i);
  }
}

/// A partial derivative: an array, or if that is null a number. Its tangent is zero if null.
template <class T>
struct Slope {
  const T* at;
  T number;
  const T* dot;
};

/// to (+)= slope bar + slope_dot other
template <bool Selects, class T>
void put_product(int64_t count, T* to, bool add, const Slope<T>& slope, const T* bar, const T* other) {
  const T *s = slope.at, *s_dot = other ? slope.dot : nullptr;
  if (!s) return put(count, to, add, [number = slope.number, bar](int64_t i) { return number * bar[i]; });
  if (!s_dot) return put(count, to, add, [=](int64_t i) { return times<Selects>(s[i], bar[i]); });
  put(count, to, add, [=](int64_t i) { return times<Selects>(s[i], bar[i]) + s_dot[i] * other[i]; });
}

/// How the cotangent of an operand is written.
template <class T>
struct Target {
  T* to = nullptr;  // null: it is not wanted
  bool add = false;
  bool in_place = false;  // otherwise from a register
  T* sums = nullptr;      // where a part of the sums is added up, unless they are short
};

/// Whether many elements of y belong to one element of an operand, so that their sums are split.
bool splits(const MapOperand& x, int64_t count) { return count / x.places() > kSumBlock; }

template <class T>
class Evaluation {
 public:
  Evaluation(const Layer& l, const Tensors<T>& t, Pass pass)
      : loops_(*l.loops),
        e_(*l.expression),
        t_(t),
        pass_(pass),
        n_(l.n),
        count_(iterations(*l.loops, l.n)),
        m_(e_.operands),
        last_(m_ + e_.count - 1) {
    assert(covers(loops_, n_, loops_.y));
    for (int j = 0; j < m_; ++j) operand_[j] = MapOperand(loops_, n_, loops_.x[j]);
    mark_dependences();
    if (down()) start_targets();
    if (!down()) needs_[pass == Pass::forward ? kValue : kDot][last_] = true;
    for (int i = e_.count - 1; i >= 0; --i) mark_needs(i);
    place_registers();
  }

  void operator()() const {
    const auto part = [&](int64_t first, int64_t last) { run(first, last); };
    if (pass_ == Pass::forward_tangent && !moves_[last_]) {
      std::fill_n(t_.y_dot, count_, T(0));
    } else if (apart_) {
      share(count_, block_, kElementWork * count_ * e_.count, part);
    } else {
      part(0, count_);
    }
  }

 private:
  using Registers = T* [kParts][kMostVariables];

  bool tangents() const { return pass_ == Pass::forward_tangent || pass_ == Pass::backward_tangent; }
  bool down() const { return pass_ == Pass::backward || pass_ == Pass::backward_tangent; }
  /// The part of an operand that a pass that goes down computes.
  Part result() const { return pass_ == Pass::backward ? kBar : kBarDot; }

  /// Which variables have a tangent, and which have a cotangent that is wanted.
  void mark_dependences() {
    for (int j = 0; j < m_; ++j) {
      moves_[j] = tangents() && t_.x_dot[j];
      wanted_[j] = down() && (pass_ == Pass::backward ? t_.grad_x[j] : t_.grad_x_dot[j]);
    }
    for (int i = 0; i < e_.count; ++i) {
      const ExpressionStep& s = e_.step[i];
      for (int a = 0; a < arguments(s) && !is_flat(s); ++a) {
        moves_[m_ + i] |= moves_[argument(s, a)];
        wanted_[m_ + i] |= wanted_[argument(s, a)];
      }
    }
  }

  /// A value that is read twice, in the order of y both times, has one cotangent: that of the first operand,
  /// its owner.
  void start_targets() {
    for (int j = 0; j < m_; ++j) {
      target_[j].to = pass_ == Pass::backward ? t_.grad_x[j] : t_.grad_x_dot[j];
    }
    T* scratch = t_.scratch;
    for (int j = 0; j < m_; ++j) {
      const MapOperand& x = operand_[j];
      Target<T>& target = target_[j];
      T* const sums = scratch;
      if (splits(x, count_)) scratch += elements(loops_.x[j], n_);
      owner_[j] = j;
      if (!target.to) continue;
      bool alone = true, alike = true;
      for (int k = 0; k < m_; ++k) {
        if (k == j || target_[k].to != target.to) continue;
        alone = false;
        alike &= operand_[k].dense() && operand_[k].offset == x.offset;
        if (k < owner_[j]) owner_[j] = k;
      }
      target.in_place = x.dense() && alike;
      if (!target.in_place) owner_[j] = j;
      if (owner_[j] != j) continue;
      if (target.in_place || (alone && x.injective())) {
        target.add = start(loops_, n_, loops_.x[j], target.to, t_.add_x[j]);
        continue;
      }
      if (!t_.add_x[j]) set_to_zero(loops_.x[j], n_, target.to);
      target.add = true;
      if (splits(x, count_)) target.sums = sums;
      apart_ = false;
    }
  }

  /// What instruction i computes, and what that needs of its arguments.
  void mark_needs(int i) {
    const ExpressionStep& s = e_.step[i];
    const int k = m_ + i;
    const bool product = wanted_[k] && is_product(s);
    slopes_[i] = wanted_[k] && !product && !has_constant_slopes(s);
    const bool dot = moves_[k] && (needs_[kDot][k] || (slopes_[i] && bends(s)));
    runs_[i] = needs_[kValue][k] || slopes_[i] || (dot && !has_constant_slopes(s));
    for (int a = 0; a < arguments(s); ++a) {
      const int of = argument(s, a);
      if (dot && moves_[of]) moving_[i] |= 1 << a;
      needs_[kDot][of] |= dot && moves_[of];
      if (!product || !wanted_[of]) continue;
      const int other = argument(s, 1 - a);
      needs_[kValue][other] = true;
      needs_[kDot][other] |= moves_[other];
    }
    if (!runs_[i]) return;
    for (int a = 0; a < first_argument(s) + arguments(s); ++a) needs_[kValue][s.argument[a]] = true;
    kernel_[i] = instruction_of<T>(s, slopes_[i], moving_[i]);
  }

  /// Gives a register to each part of a variable that is computed and is not an operand or a result in place.
  void place_registers() {
    int count = 1;  // the first one is for what a kernel writes although it is not needed
    const auto give = [&](int part, int variable, bool needed) {
      place_[part][variable] = needed ? count++ : 0;
    };
    for (int j = 0; j < m_; ++j) {
      give(kValue, j, needs_[kValue][j] && !operand_[j].dense());
      give(kDot, j, needs_[kDot][j] && !operand_[j].dense());
      give(result(), j, target_[j].to && !target_[j].in_place);
    }
    for (int i = 0; i < e_.count; ++i) {
      const int k = m_ + i;
      give(kValue, k, needs_[kValue][k]);
      give(kDot, k, needs_[kDot][k]);
      give(kBar, k, wanted_[k] && k != last_);
      give(kBarDot, k, wanted_[k] && k != last_ && pass_ == Pass::backward_tangent);
      for (int a = 0; a < arguments(e_.step[i]) && slopes_[i]; ++a) {
        const int of = argument(e_.step[i], a);
        give(kSlope + a, k, wanted_[of]);
        give(kSlopeDot + a, k, wanted_[of] && moving_[i] != 0 && bends(e_.step[i]));
      }
    }
    constexpr int64_t kLine = 64 / sizeof(T), kElements = kRegisterBytes / sizeof(T);
    block_ = std::min(kMostBlock, kElements / count / kLine * kLine);
    // If an operand repeats from block to block, its registers are read once, and its cotangent is added up
    // in its register.
    int64_t longest = 1;
    for (int j = 0; j < m_; ++j) {
      const int64_t period = operand_[j].period();
      if (period <= block_ && period < count_) longest = std::max(longest, period);
    }
    block_ -= block_ % longest;
    for (int j = 0; j < m_; ++j) {
      const int64_t period = operand_[j].period();
      repeats_[j] = period < count_ && block_ % period == 0;
    }
  }

  void run(int64_t first, int64_t last) const {
    alignas(64) T memory[kRegisterBytes / sizeof(T)];
    Registers at;
    for (int part = 0; part < kParts; ++part) {
      for (int k = 0; k <= last_; ++k) at[part][k] = memory + place_[part][k] * block_;
    }
    int64_t pending[kMostInputs] = {};  // elements whose cotangents are not yet added to the target
    for (int j = 0; j < m_; ++j) {
      if (target_[j].sums) set_to_zero(loops_.x[j], n_, target_[j].sums);
    }
    for (int64_t start = first; start < last; start += block_) {
      const int64_t count = std::min(block_, last - start);
      read(start, count, start == first, at);
      up(count, at);
      if (!down()) continue;
      down(count, at, pending);
      for (int j = 0; j < m_; ++j) write(j, start, count, at, pending[j]);
    }
    for (int j = 0; j < m_; ++j) finish(j, at, pending[j]);
  }

  /// The operands and results of a block, in place or in registers.
  void read(int64_t start, int64_t count, bool first, Registers& at) const {
    const auto operand = [&](Part part, int j, const T* x) {
      if (!needs_[part][j]) return;
      const MapOperand& o = operand_[j];
      if (o.dense()) {
        at[part][j] = const_cast<T*>(x) + o.offset + start;
      } else if (first || !repeats_[j]) {
        o.gather(x, start, start + count, at[part][j]);
      }
    };
    for (int j = 0; j < m_; ++j) {
      operand(kValue, j, t_.x[j]);
      operand(kDot, j, t_.x_dot[j]);
      if (target_[j].in_place) at[result()][j] = target_[j].to + operand_[j].offset + start;
    }
    if (pass_ == Pass::forward) at[kValue][last_] = t_.y + start;
    if (pass_ == Pass::forward_tangent) at[kDot][last_] = t_.y_dot + start;
    if (!down()) return;
    at[kBar][last_] = t_.grad_y ? const_cast<T*>(t_.grad_y) + start : nullptr;
    if (pass_ == Pass::backward_tangent) at[kBarDot][last_] = const_cast<T*>(t_.grad_y_dot) + start;
  }

  void up(int64_t count, const Registers& at) const {
    for (int i = 0; i < e_.count; ++i) {
      const ExpressionStep& s = e_.step[i];
      const int k = m_ + i;
      if (!runs_[i]) {
        if (moving_[i] != 0) up_linear(s, k, moving_[i], count, at);
        continue;
      }
      Block<T> b;
      b.count = count;
      for (int a = 0; a < first_argument(s) + arguments(s); ++a) b.x[a] = at[kValue][s.argument[a]];
      for (int a = 0; a < arguments(s); ++a) {
        b.x_dot[a] = at[kDot][argument(s, a)];
        b.slope[a] = at[kSlope + a][k];
        b.slope_dot[a] = at[kSlopeDot + a][k];
      }
      b.y = at[kValue][k];
      b.y_dot = at[kDot][k];
      kernel_[i](s, b);
    }
  }
  /// The tangent alone, of an instruction with constant slopes.
  void up_linear(const ExpressionStep& s, int k, int moving, int64_t count, const Registers& at) const {
    bool add = false;
    for (int a = 0; a < arguments(s); ++a) {
      if (!(moving & 1 << a)) continue;
      const Slope<T> slope{nullptr, static_cast<T>(constant_slope(s, a)), nullptr};
      put_product<false, T>(count, at[kDot][k], std::exchange(add, true), slope, at[kDot][argument(s, a)],
                            nullptr);
    }
  }

  Slope<T> slope_of(int i, int a, const Registers& at) const {
    const ExpressionStep& s = e_.step[i];
    if (has_constant_slopes(s)) return {nullptr, static_cast<T>(constant_slope(s, a)), nullptr};
    if (is_product(s)) {
      const int other = argument(s, 1 - a);
      return {at[kValue][other], 0, moves_[other] ? at[kDot][other] : nullptr};
    }
    const int k = m_ + i;
    return {at[kSlope + a][k], 0, moving_[i] != 0 && bends(s) ? at[kSlopeDot + a][k] : nullptr};
  }

  void down(int64_t count, const Registers& at, const int64_t* pending) const {
    bool started[kMostVariables] = {};
    for (int j = 0; j < m_; ++j) {
      started[j] = target_[j].in_place ? target_[j].add : repeats_[j] && pending[j] > 0;
    }
    started[last_] = true;
    for (int i = e_.count - 1; i >= 0; --i) {
      const ExpressionStep& s = e_.step[i];
      const int k = m_ + i;
      if (!wanted_[k] || !started[k]) continue;
      for (int a = 0; a < arguments(s); ++a) {
        const int of = argument(s, a);
        if (!wanted_[of]) continue;
        const int to = of < m_ ? owner_[of] : of;
        const bool add = std::exchange(started[to], true);
        const Slope<T> slope = slope_of(i, a, at);
        const T *bar = t_.grad_y ? at[kBar][k] : nullptr, *bar_dot = at[kBarDot][k];
        const auto product = selects(s) ? put_product<true, T> : put_product<false, T>;
        if (pass_ == Pass::backward) {
          product(count, at[kBar][to], add, slope, bar, nullptr);
        } else {
          product(count, at[kBarDot][to], add, slope, bar_dot, bar);
          if (of >= m_ && bar) product(count, at[kBar][to], add, slope, bar, nullptr);
        }
      }
    }
    for (int j = 0; j < m_; ++j) {
      if (target_[j].to && !started[owner_[j]]) std::fill_n(at[result()][owner_[j]], count, T(0));
    }
  }

  /// Adds a block of an operand's cotangent to its target, or leaves it for finish().
  void write(int j, int64_t start, int64_t count, const Registers& at, int64_t& pending) const {
    const Target<T>& target = target_[j];
    if (!target.to || target.in_place) return;
    const MapOperand& x = operand_[j];
    const T* from = at[result()][j];
    if (!repeats_[j] && !target.sums) return x.scatter(from, start, start + count, target.to, target.add);
    if (!repeats_[j]) x.scatter(from, start, start + count, target.sums, true);
    pending += count;
    if (pending >= kSumBlock * (repeats_[j] ? block_ : x.places())) finish(j, at, pending);
  }
  void finish(int j, const Registers& at, int64_t& pending) const {
    const Target<T>& target = target_[j];
    if (pending == 0) return;
    if (repeats_[j]) {
      operand_[j].scatter(at[result()][j], 0, std::min(pending, block_), target.to, true);
    } else {
      for (int64_t i = 0, size = elements(loops_.x[j], n_); i < size; ++i) {
        target.to[i] += std::exchange(target.sums[i], T(0));
      }
    }
    pending = 0;
  }

  const Loops& loops_;
  const Expression& e_;
  const Tensors<T>& t_;
  const Pass pass_;
  const int64_t n_, count_;
  const int m_, last_;
  MapOperand operand_[kMostInputs];
  Target<T> target_[kMostInputs];
  int owner_[kMostInputs] = {};
  bool repeats_[kMostInputs] = {};
  bool apart_ = true;  // no two threads would write to one element
  bool moves_[kMostVariables] = {}, wanted_[kMostVariables] = {}, needs_[2][kMostVariables] = {};
  bool runs_[kMostInstructions] = {}, slopes_[kMostInstructions] = {};
  int moving_[kMostInstructions] = {};  // the arguments whose tangents are used, as bits
  Instruction<T> kernel_[kMostInstructions] = {};
  int place_[kParts][kMostVariables] = {};
  int64_t block_;
};

template <class T, Pass pass>
void evaluate_all(const Layer& l, const Tensors<T>& t) {
  Evaluation<T>(l, t, pass)();
}

}  // namespace

template <>
struct OnCpu<Kind::map> {
  static Footprint footprint(const Layer& l) {
    const int64_t count = iterations(*l.loops, l.n);
    int64_t scratch = 0;
    for (int j = 0; j < l.expression->operands; ++j) {
      const View& x = l.loops->x[j];
      if (splits(MapOperand(*l.loops, l.n, x), count)) scratch += elements(x, l.n);
    }
    return {0, scratch};
  }
  template <class T>
  static Passes<T> passes() {
    return {evaluate_all<T, Pass::forward>, evaluate_all<T, Pass::backward>,
            evaluate_all<T, Pass::forward_tangent>, evaluate_all<T, Pass::backward_tangent>};
  }
};
template struct Implementation<Kind::map>;

}  // namespace maml::MAML_ISA
