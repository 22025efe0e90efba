// y = softmax(scale q k' + bias) v (the formulas are in layers/attention.h). For each index of the batch, a
// sample and a head, blocks of queries go through the layer one after the other: their scores, and whatever
// is as large, are tiles [queries of a block, keys] that stay in the cache. All products are those of
// product.h:
//
//   gather_product   scores = q k', dp = g v', y = p v, grad_q = ds k      rows of a times a dense matrix
//   outer_product    grad_k = ds' q, grad_v = p' g                         added up block after block
//
// So k and v are copied to scratch, as they are and transposed; `scale` is a factor of the copies of k, and
// of grad_k at the end. Saved are m and r of each row [rows, 2], and E [rows] from the tangent.
//
// Threads share the indices of the batch, each with its own part of the scratch. In a backward pass one
// thread takes all indices that are added to one element. The twin on the GPU is cuda/attention.cu.
#include <algorithm>
#include <limits>

#include "cpu/attention_batch.h"
#include "cpu/implement.h"
#include "cpu/matrix.h"
#include "cpu/softmax_rows.h"
#include "cpu/vector_math.h"

namespace maml::MAML_ISA {
namespace {

/// The elements of a tile: four of them fit a cache.
constexpr int64_t kTile = 4096;
/// The fewest queries of a block: with fewer, the products' blocks of registers are small.
constexpr int64_t kFewestQueries = 24;
/// The most threads that share the passes of a task.
constexpr int64_t kMostParts = 8;

/// The queries of a block; all blocks are of nearly this size.
int64_t queries_of_block(const AttentionSizes& s) {
  const int64_t most = std::max(kFewestQueries, kTile / s.keys), blocks = (s.queries + most - 1) / most;
  return (s.queries + blocks - 1) / blocks;
}

/// The passes at some indices of the batch, one after the other, with one part of the scratch.
template <class T>
class Attention {
  enum Operand { kQ, kK, kV, kBias, kY, kOperands };
  /// Rows of a factor of a product.
  struct Rows {
    const T* at;
    const int32_t* row;
  };

 public:
  static int64_t scratch(const AttentionSizes& s) {
    const int64_t block = queries_of_block(s), both = s.depth + s.width;
    return block * (4 * s.keys + 3 * both + 7) + 5 * s.keys * both;
  }

  Attention(const Layer& l, const Tensors<T>& t, T* scratch)
      : loops_(*l.loops),
        t_(t),
        s_(loops_),
        block_(queries_of_block(s_)),
        scale_(static_cast<T>(l.a)),
        empty_is_zero_(l.b != 0) {
    const auto take = [&](int64_t size) { return std::exchange(scratch, scratch + size); };
    for (T*& tile : tile_) tile = take(block_ * s_.keys);
    for (int second = 0; second < 2; ++second) {
      k_[second] = take(s_.keys * s_.depth), k_turned_[second] = take(s_.keys * s_.depth);
      v_[second] = take(s_.keys * s_.width), v_turned_[second] = take(s_.keys * s_.width);
      q_rows_[second] = take(block_ * s_.depth), g_rows_[second] = take(block_ * s_.width);
      sum_[second] = take(block_);
    }
    grad_k_ = take(s_.keys * s_.depth), grad_v_ = take(s_.keys * s_.width);
    result_ = take(block_ * (s_.depth + s_.width));
    const auto take_rows = [&](int64_t stride) {
      auto* row = reinterpret_cast<int32_t*>(take(block_));
      for (int64_t i = 0; i < block_; ++i) row[i] = static_cast<int32_t>(i * stride);
      return row;
    };
    q_row_ = take_rows(row_stride(kQ)), y_row_ = take_rows(row_stride(kY));
    dense_q_ = take_rows(s_.depth), dense_y_ = take_rows(s_.width), tile_row_ = take_rows(s_.keys);
  }

  /// f() at every index of [first, last) of a batch.
  template <class F>
  void each(const Nest<kOperands>& batch, int64_t first, int64_t last, F f) {
    Odometer<kOperands> at(batch, 0, batch.axes, first);
    for (index_ = first; index_ < last; ++index_, at.next()) {
      for (int o = 0; o < kOperands; ++o) offset_[o] = view(o).offset + at[o];
      f();
    }
  }

  void forward() {
    const T* k = turned(t_.x, kK, k_turned_[0]);
    const T* v = packed(t_.x, kV, v_[0]);
    each_block([&] {
      T* const p = tile_[0];
      multiply({q_rows(t_.x, 0)}, {k}, s_.depth, s_.keys, p, tile_row_);
      const Matrix<const T> bias = matrix<const T>(t_.x[3], kBias);
      for (int64_t i = 0; i < rows_; ++i) {
        T *row = p + i * s_.keys, *saved = saved_of(i);
        if (bias.at) add_row(bias, i, row);
        T largest = largest_of(s_.keys, row);
        if (empty_is_zero_ && largest == -std::numeric_limits<T>::infinity()) largest = 0;
#pragma omp simd
        for (int64_t j = 0; j < s_.keys; ++j) row[j] = exp_of(row[j] - largest);
        const T sum = sum_of<T>(s_.keys, [=](int64_t j) { return row[j]; });
        const T reciprocal = empty_is_zero_ && sum == 0 ? T(0) : 1 / sum;
#pragma omp simd
        for (int64_t j = 0; j < s_.keys; ++j) row[j] *= reciprocal;
        saved[0] = largest, saved[1] = reciprocal;
      }
      multiply_into(matrix(t_.y, kY), false, {{p, tile_row_}}, {v}, s_.keys, s_.width, y_row_, dense_y_);
    });
  }

  void backward() {
    const bool of_scores = t_.grad_x[kQ] || t_.grad_x[kK] || t_.grad_x[kBias];
    const T* k_turned = turned(t_.x, kK, k_turned_[0]);
    const T* k = t_.grad_x[kQ] ? packed(t_.x, kK, k_[0]) : nullptr;
    const T* v = of_scores ? turned(t_.x, kV, v_turned_[0]) : nullptr;
    each_block([&] {
      T *const p = tile_[0], *const ds = tile_[2];
      const Rows q = q_rows(t_.x, 0), g = g_rows(t_.grad_y, 0);
      weights(q, k_turned, p);
      if (t_.grad_x[kV]) add_outer({p}, {g}, s_.width, grad_v_);
      if (!of_scores) return;
      multiply({g}, {v}, s_.width, s_.keys, ds, tile_row_);
      sum_products(g, matrix<const T>(t_.y, kY), false, sum_[0]);
      for (int64_t i = 0; i < rows_; ++i) {
        const T *of_p = p + i * s_.keys, mean = sum_[0][i];
        T* row = ds + i * s_.keys;
#pragma omp simd
        for (int64_t j = 0; j < s_.keys; ++j) row[j] = of_p[j] * (row[j] - mean);
      }
      add_scores(t_.grad_x, {ds}, {k}, {q});
    });
    finish(t_.grad_x);
  }

  void forward_tangent() {
    const T *k = turned(t_.x, kK, k_turned_[0]), *k_dot = turned(t_.x_dot, kK, k_turned_[1]);
    const T *v = packed(t_.x, kV, v_[0]), *v_dot = packed(t_.x_dot, kV, v_[1]);
    each_block([&] {
      T *const p = tile_[0], *const p_dot = tile_[1];
      const Rows q = q_rows(t_.x, 0);
      weights(q, k, p);
      scores_dot(q, k, k_dot, p_dot);
      for (int64_t i = 0; i < rows_; ++i) {
        const T* of_p = p + i * s_.keys;
        T* row = p_dot + i * s_.keys;
        const T mean = sum_of<T>(s_.keys, [=](int64_t j) { return of_p[j] * row[j]; });
        *saved_dot_of(i) = mean;
#pragma omp simd
        for (int64_t j = 0; j < s_.keys; ++j) row[j] = of_p[j] * (row[j] - mean);
      }
      multiply_into(matrix(t_.y_dot, kY), false, {{p_dot, tile_row_}, {p, tile_row_}}, {v, v_dot}, s_.keys,
                    s_.width, y_row_, dense_y_);
    });
  }

  void backward_tangent() {
    const bool bends = t_.grad_y && t_.y_dot;
    const bool of_scores = t_.grad_x_dot[kQ] || t_.grad_x_dot[kK] || t_.grad_x_dot[kBias];
    const T *k_turned = turned(t_.x, kK, k_turned_[0]), *v = nullptr, *v_dot = nullptr;
    const T* k_dot_turned = bends ? turned(t_.x_dot, kK, k_turned_[1]) : nullptr;
    const T* k = t_.grad_x_dot[kQ] ? packed(t_.x, kK, k_[0]) : nullptr;
    const T* k_dot = t_.grad_x_dot[kQ] && bends ? packed(t_.x_dot, kK, k_[1]) : nullptr;
    if (of_scores) {
      v = turned(t_.x, kV, v_turned_[0]);
      v_dot = bends ? turned(t_.x_dot, kV, v_turned_[1]) : nullptr;
    }
    each_block([&] {
      T *const p = tile_[0], *const p_dot = tile_[1], *const ds = tile_[2], *const ds_dot = tile_[3];
      const Rows q = q_rows(t_.x, 0), g_dot = g_rows(t_.grad_y_dot, 1);
      const Rows g = bends ? g_rows(t_.grad_y, 0) : Rows{};
      weights(q, k_turned, p);
      if (of_scores) {
        multiply({g_dot, g}, {v, v_dot}, s_.width, s_.keys, ds_dot, tile_row_);
        sum_products(g_dot, matrix<const T>(t_.y, kY), false, sum_[1]);
      }
      if (bends) {
        scores_dot(q, k_turned, k_dot_turned, p_dot);
        if (of_scores) {
          multiply({g}, {v}, s_.width, s_.keys, ds, tile_row_);
          sum_products(g, matrix<const T>(t_.y, kY), false, sum_[0]);
          sum_products(g, matrix<const T>(t_.y_dot, kY), true, sum_[1]);
        }
      }
      for (int64_t i = 0; i < rows_; ++i) {
        const T *of_p = p + i * s_.keys, mean = sum_[0][i], mean_dot = sum_[1][i];
        T *of_p_dot = p_dot + i * s_.keys, *row = ds + i * s_.keys, *row_dot = ds_dot + i * s_.keys;
        const T shift = bends ? *saved_dot_of(i) : T(0);
        if (bends && of_scores) {
#pragma omp simd
          for (int64_t j = 0; j < s_.keys; ++j) {
            const T relative = of_p_dot[j] - shift, cotangent = of_p[j] * (row[j] - mean);
            of_p_dot[j] = of_p[j] * relative;
            row[j] = cotangent;
            row_dot[j] = relative * cotangent + of_p[j] * (row_dot[j] - mean_dot);
          }
        } else if (bends) {
#pragma omp simd
          for (int64_t j = 0; j < s_.keys; ++j) of_p_dot[j] = of_p[j] * (of_p_dot[j] - shift);
        } else if (of_scores) {
#pragma omp simd
          for (int64_t j = 0; j < s_.keys; ++j) row_dot[j] = of_p[j] * (row_dot[j] - mean_dot);
        }
      }
      const T* const p_dot_or_zero = bends ? p_dot : nullptr;
      if (t_.grad_x_dot[kV]) add_outer({p, p_dot_or_zero}, {g_dot, g}, s_.width, grad_v_);
      if (!of_scores) return;
      const Rows q_dot = bends ? q_rows(t_.x_dot, 1) : Rows{};
      add_scores(t_.grad_x_dot, {ds_dot, bends ? ds : nullptr}, {k, k_dot}, {q, q_dot});
    });
    finish(t_.grad_x_dot);
  }

 private:
  static constexpr int kTerms = 2;
  template <class X>
  using Pair = X[kTerms];

  const View& view(int o) const { return o == kY ? loops_.y : loops_.x[o]; }
  int64_t row_stride(int o) const { return view(o).stride[loops_.axes - 4 + kAttentionAxes[o][0]]; }
  int64_t column_stride(int o) const { return view(o).stride[loops_.axes - 4 + kAttentionAxes[o][1]]; }
  int64_t columns(int o) const { return o == kQ || o == kK ? s_.depth : s_.width; }

  /// The matrix of an operand at this index; of queries, the rows from this block on.
  template <class X>
  Matrix<X> matrix(X* x, int o) const {
    if (!x) return {};
    const int64_t row = row_stride(o), start = o == kK || o == kV ? 0 : first_ * row;
    return {x + offset_[o] + start, row, column_stride(o)};
  }

  /// k or v as a dense matrix, and its transpose; null for null. `scale` is a factor of k.
  T factor(int o) const { return o == kK ? scale_ : T(1); }
  template <class X>
  const T* packed(X* const* x, int o, T* to) const {
    if (!x[o]) return nullptr;
    pack<T>(matrix<const T>(x[o], o), s_.keys, columns(o), factor(o), to);
    return to;
  }
  template <class X>
  const T* turned(X* const* x, int o, T* to) const {
    if (!x[o]) return nullptr;
    pack_turned<T>(matrix<const T>(x[o], o), s_.keys, columns(o), factor(o), to);
    return to;
  }

  /// The rows of this block of an operand that is like q or like y.
  Rows rows_of(const T* x, int o, const int32_t* strided, const int32_t* dense, T* to) const {
    if (!x) return {};
    const Matrix<const T> m = matrix<const T>(x, o);
    if (m.column == 1 || columns(o) == 1) return {m.at, strided};
    pack<T>(m, rows_, columns(o), 1, to);
    return {to, dense};
  }
  Rows q_rows(const T* const* x, int second) const {
    return rows_of(x[kQ], kQ, q_row_, dense_q_, q_rows_[second]);
  }
  Rows g_rows(const T* g, int second) const { return rows_of(g, kY, y_row_, dense_y_, g_rows_[second]); }

  /// f() for the blocks of queries [first_, first_ + rows_).
  template <class F>
  void each_block(F f) {
    for (first_ = 0; first_ < s_.queries; first_ += block_) {
      rows_ = std::min(block_, s_.queries - first_);
      f();
    }
    first_ = 0;
  }

  T* saved_of(int64_t i) const { return t_.saved + 2 * (index_ * s_.queries + first_ + i); }
  T* saved_dot_of(int64_t i) const { return t_.saved_dot + index_ * s_.queries + first_ + i; }

  /// row += the bias of a query.
  void add_row(const Matrix<const T>& bias, int64_t i, T* row) const {
    put_row(s_.keys, row, 1, true, [b = bias[i], step = bias.column](int64_t j) { return b[j * step]; });
  }

  /// p from the saved values.
  void weights(const Rows& q, const T* k, T* p) const {
    multiply({q}, {k}, s_.depth, s_.keys, p, tile_row_);
    const Matrix<const T> bias = matrix<const T>(t_.x[kBias], kBias);
    for (int64_t i = 0; i < rows_; ++i) {
      T* row = p + i * s_.keys;
      const T largest = saved_of(i)[0], reciprocal = saved_of(i)[1];
      if (bias.at) add_row(bias, i, row);
#pragma omp simd
      for (int64_t j = 0; j < s_.keys; ++j) row[j] = exp_of(row[j] - largest) * reciprocal;
    }
  }
  /// The tangent of the scores.
  void scores_dot(const Rows& q, const T* k, const T* k_dot, T* to) const {
    multiply({q_rows(t_.x_dot, 1), q}, {k, k_dot}, s_.depth, s_.keys, to, tile_row_);
    const Matrix<const T> bias = matrix<const T>(t_.x_dot[kBias], kBias);
    for (int64_t i = 0; bias.at && i < rows_; ++i) add_row(bias, i, to + i * s_.keys);
  }
  /// to (+)= <a, b> of each row.
  void sum_products(const Rows& a, const Matrix<const T>& b, bool adds, T* to) const {
    for (int64_t i = 0; i < rows_; ++i) {
      const T *of_a = a.at + a.row[i], *of_b = b[i];
      const T sum = sum_of<T>(s_.width, [=, step = b.column](int64_t j) { return of_a[j] * of_b[j * step]; });
      to[i] = adds ? to[i] + sum : sum;
    }
  }

  /// c (+)= the sum of a b over the terms, of which those with a null are zero.
  void multiply(const Pair<Rows>& a, const Pair<const T*>& b, int64_t depth, int64_t width, T* c,
                const int32_t* c_row, bool adds = false) const {
    const int64_t start = 0;
    GatherProduct<T> p{};
    for (int i = 0; i < kTerms; ++i) {
      if (!a[i].at || !b[i]) continue;
      p.term[p.terms++] = {a[i].at, b[i]};
      p.row = a[i].row;
    }
    p.runs = {1, depth, &start};
    p.m = rows_, p.n = width, p.c = c, p.c_row = c_row, p.add = adds;
    gather_product(p);
  }
  /// The same into an operand with these rows.
  void multiply_into(const Matrix<T>& to, bool adds, const Pair<Rows>& a, const Pair<const T*>& b,
                     int64_t depth, int64_t width, const int32_t* strided, const int32_t* dense) const {
    if ((to.column == 1 || width == 1) && (std::abs(to.row) >= width || rows_ == 1)) {
      return multiply(a, b, depth, width, to.at, strided, adds);
    }
    multiply(a, b, depth, width, result_, dense);
    if (!adds) {
      for (int64_t i = 0; i < rows_; ++i) {
        put_row(width, to[i], to.column, false, [=, this](int64_t j) { return result_[i * width + j]; });
      }
      return;
    }
    add(to, rows_, width, static_cast<const T*>(result_), T(1));
  }
  /// d += the sum of a' b over the terms, for tiles a; from 0 in the first block.
  void add_outer(const Pair<const T*>& a, const Pair<Rows>& b, int64_t width, T* d) const {
    const int64_t start = 0;
    OuterProduct<T> p{};
    for (int i = 0; i < kTerms; ++i) {
      if (!a[i] || !b[i].at) continue;
      p.term[p.terms++] = {a[i], b[i].at};
      p.g_row = b[i].row;
    }
    p.runs = {1, s_.keys, &start};
    p.row = tile_row_, p.m = rows_, p.n = width, p.d = d, p.add = first_ > 0;
    outer_product(p);
  }
  /// Adds what the cotangents ds of the scores, and their tangents, give to those of q, k and the bias.
  void add_scores(T* const* grad, const Pair<const T*>& ds, const Pair<const T*>& k,
                  const Pair<Rows>& q) const {
    if (grad[kBias]) add(matrix(grad[kBias], kBias), rows_, s_.keys, ds[0], T(1));
    if (grad[kQ]) {
      multiply_into(matrix(grad[kQ], kQ), true, {{ds[0], tile_row_}, {ds[1], tile_row_}}, k, s_.keys,
                    s_.depth, q_row_, dense_q_);
    }
    if (grad[kK]) add_outer(ds, q, s_.depth, grad_k_);
  }
  void finish(T* const* grad) const {
    if (grad[kK]) add(matrix(grad[kK], kK), s_.keys, s_.depth, static_cast<const T*>(grad_k_), scale_);
    if (grad[kV]) add(matrix(grad[kV], kV), s_.keys, s_.width, static_cast<const T*>(grad_v_), T(1));
  }

  const Loops& loops_;
  const Tensors<T>& t_;
  const AttentionSizes s_;
  const int64_t block_;
  const T scale_;
  const bool empty_is_zero_;
  // Scratch. Of two: values, and their tangents or, of the cotangents, their tangents.
  T *tile_[4], *k_[2], *k_turned_[2], *v_[2], *v_turned_[2], *q_rows_[2], *g_rows_[2], *sum_[2];
  T *grad_k_, *grad_v_, *result_;
  int32_t *q_row_, *y_row_, *dense_q_, *dense_y_, *tile_row_;  // offsets of a block's rows
  int64_t index_ = 0, offset_[kOperands] = {}, first_ = 0, rows_ = 0;
};

/// Runs a pass. Threads share the groups, of which no two write to one element.
template <class T>
void run(const Layer& l, const Tensors<T>& t, int64_t groups, void (Attention<T>::*pass)()) {
  const Nest<5> batch = batch_of(l);
  const int64_t count = batch.iterations(), parts = std::min(groups, kMostParts);
  const int64_t size = Attention<T>::scratch(AttentionSizes(*l.loops));
  share(parts, 1, 4 * Declaration<Kind::attention>::work(l), [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      Attention<T> attention(l, t, t.scratch + part * size);
      const int64_t start = part * groups / parts, end = (part + 1) * groups / parts;
      attention.each(batch, start * count / groups, end * count / groups, [&] { (attention.*pass)(); });
    }
  });
}

/// A pass that writes cotangents.
template <class T>
void run_backward(const Layer& l, const Tensors<T>& t, T* const* grad, void (Attention<T>::*pass)()) {
  const Loops& loops = *l.loops;
  bool any = false;
  for (int j = 0; j < kMostInputs; ++j) {
    if (!grad[j]) continue;
    any = true;
    if (!t.add_x[j]) set_to_zero(loops.x[j], l.n, grad[j]);
  }
  if (any) run(l, t, groups_apart(loops, l.n, grad), pass);
}

}  // namespace

template <>
struct OnCpu<Kind::attention> {
  static Footprint footprint(const Layer& l) {
    const AttentionSizes s(*l.loops);
    const int64_t batch = attention_batch(*l.loops, l.n), rows = batch * s.queries;
    return {2 * rows, std::min(batch, kMostParts) * Attention<float>::scratch(s), rows};
  }
  template <class T>
  static Passes<T> passes() {
    using A = Attention<T>;
    return {
        [](const Layer& l, const Tensors<T>& t) { run(l, t, attention_batch(*l.loops, l.n), &A::forward); },
        [](const Layer& l, const Tensors<T>& t) { run_backward(l, t, t.grad_x, &A::backward); },
        [](const Layer& l, const Tensors<T>& t) {
          run(l, t, attention_batch(*l.loops, l.n), &A::forward_tangent);
        },
        [](const Layer& l, const Tensors<T>& t) { run_backward(l, t, t.grad_x_dot, &A::backward_tangent); },
    };
  }
};
template struct Implementation<Kind::attention>;

}  // namespace maml::MAML_ISA
