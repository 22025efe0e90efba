// y = the sum of x_0 x_1 over the axes that y does not have, and its two adjoints, which are contractions
// too: all are R = sum A B. An axis belongs to one of four groups, by the operands that have it (a stride of
// 0 is no axis):
//
//   batch: R, A and B    m: R and A    n: R and B    k: A and B
//
// An axis of one operand alone belongs to m or n, with a stride of 0 for the other one: R is then summed over
// it, or A is broadcast.
//
// For each index of the batch this is a product of matrices [m, k] [k, n], computed by one of the products of
// product.h, with the factors in either order:
//
//   gather_product  reads rows of A along k and B as [k, n], and writes rows of R along n
//   outer_product   reads rows of A along m and of B along n, and writes R as [m, n]
//
// An operand whose strides do not fit is copied to scratch, or added from there. The form that costs least is
// taken. Where all three have an axis of stride 1, as the channels of a depthwise convolution, its elements
// are lanes: vectors along that axis are multiplied and added. The twin on the GPU is cuda/contract.cu.
#include <algorithm>
#include <bit>
#include <limits>

#include "cpu/implement.h"
#include "cpu/simd.h"
#include "cpu/strided.h"

namespace maml::MAML_ISA {
namespace {

/// The least size of an axis whose elements are lanes.
constexpr int64_t kFewestLanes = 8;

/// The axes of a contraction, by groups, each with the strides of the operands that have them.
struct Groups {
  int64_t lanes = 1;  // the size of an axis of the batch along which all strides are 1
  Nest<3> batch;      // r, a, b
  Nest<2> m, n, k;    // r, a;  r, b;  a, b
  const View *r, *a, *b;

  Groups(const Loops& loops, int64_t samples, Product of) {
    r = of == Product::y ? &loops.y : &loops.x[static_cast<int>(of)];
    a = of == Product::cotangent_0 ? &loops.y : &loops.x[0];
    b = of == Product::cotangent_1 ? &loops.y : &loops.x[1];
    for (int axis = 0; axis < loops.axes; ++axis) {
      const int64_t steps = extent(loops, axis, samples);
      const int64_t of_r = r->stride[axis], of_a = a->stride[axis], of_b = b->stride[axis];
      const bool dense = of_r == 1 && of_a == 1 && of_b == 1 && loops.size[axis] != kSamples;
      if (dense && lanes == 1 && steps >= kFewestLanes) {
        lanes = steps;
      } else if (of_r != 0 && of_a != 0 && of_b != 0) {
        batch.append(steps, {of_r, of_a, of_b});
      } else if (of_b == 0) {
        m.append(steps, {of_r, of_a});
      } else if (of_a == 0) {
        n.append(steps, {of_r, of_b});
      } else {
        k.append(steps, {of_a, of_b});
      }
    }
    for (Nest<2>* group : {&m, &n, &k}) {
      group->sort();
      group->join();
    }
  }
  /// The same with the factors in the other order: the transpose of R.
  void swap() {
    std::swap(a, b);
    std::swap(m, n);
    for (int axis = 0; axis < k.axes; ++axis) std::swap(k.stride[0][axis], k.stride[1][axis]);
    for (int axis = 0; axis < batch.axes; ++axis) std::swap(batch.stride[1][axis], batch.stride[2][axis]);
    k.sort();
    k.join();
  }
};

/// Whether a group is one axis with this stride for an operand, or empty.
bool is_row(const Nest<2>& group, int operand, int64_t stride = 1) {
  return group.axes == 0 || (group.axes == 1 && group.stride[operand][0] == stride);
}

/// The loops over [rows, columns] with strides of one operand, and those of a dense matrix.
Nest<2> matrix(const Nest<2>& rows, int of_rows, const Nest<2>& columns, int of_columns, bool to_dense) {
  Nest<2> nest;
  const auto append = [&](const Nest<2>& group, int operand, int64_t dense) {
    dense *= group.iterations();
    for (int a = 0; a < group.axes; ++a) {
      dense /= group.size[a];
      const int64_t strided = group.stride[operand][a];
      nest.append(group.size[a], {to_dense ? dense : strided, to_dense ? strided : dense});
    }
  };
  append(rows, of_rows, columns.iterations());
  append(columns, of_columns, 1);
  return nest;
}

/// How a contraction is computed.
struct Form {
  Groups of;
  bool swapped, outer, pack_a, pack_b, pack_r;
  int64_t m, n, k;

  Form(const Groups& groups, bool swapped_, bool outer_) : of(groups), swapped(swapped_), outer(outer_) {
    if (swapped) of.swap();
    m = of.m.iterations(), n = of.n.iterations(), k = of.k.iterations();
    pack_a = !is_row(outer ? of.m : of.k, outer ? 1 : 0);
    pack_b = !is_row(of.n, 1) || !(outer || is_row(of.k, 1, n));
    pack_r = !is_row(of.n, 0) || !(outer ? is_row(of.m, 0, n) : injective(of_r()));
  }
  Nest<2> of_a() const { return outer ? matrix(of.k, 0, of.m, 1, true) : matrix(of.m, 1, of.k, 0, true); }
  Nest<2> of_b() const { return matrix(of.k, 1, of.n, 1, true); }
  /// From a dense matrix.
  Nest<2> of_r() const { return matrix(of.m, 0, of.n, 0, false); }

  /// Multiply-adds, with those of unused lanes, and what it costs to pack an element in units of these.
  int64_t cost() const {
    constexpr int64_t kWide = 16, kPack = 12;
    return m * k * ((n + kWide - 1) / kWide * kWide) +
           kPack * (pack_a * m * k + pack_b * k * n + pack_r * m * n);
  }
  int64_t rows() const { return outer ? k : m; }
  int64_t scratch() const { return 2 * (rows() + pack_a * m * k + pack_b * k * n) + pack_r * m * n; }
};

/// The cheapest form for a number of samples, with the axes of another number.
Form cheapest(const Layer& l, Product of, int64_t samples, int64_t n) {
  const Groups at(*l.loops, samples, of);
  bool swapped = false, outer = false;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const bool o : {false, true}) {
    for (const bool s : {false, true}) {
      const int64_t cost = Form(at, s, o).cost();
      if (cost >= least) continue;
      least = cost, swapped = s, outer = o;
    }
  }
  return Form(Groups(*l.loops, n, of), swapped, outer);
}
/// The choice is made for powers of two, so that the footprint can go through the forms of fewer samples.
Form form_of(const Layer& l, Product of) {
  return cheapest(l, of, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(l.n))), l.n);
}

/// The two offsets of each row that a product gathers.
void fill_rows(const Nest<2>& group, int32_t* first, int32_t* second) {
  const int64_t count = group.iterations();
  Odometer<2> at(group, 0, group.axes);
  for (int64_t i = 0; i < count; ++i, at.next()) {
    first[i] = static_cast<int32_t>(at[0]);
    second[i] = static_cast<int32_t>(at[1]);
  }
}
void fill_rows(int64_t count, int64_t stride, int32_t* rows) {
  for (int64_t i = 0; i < count; ++i) rows[i] = static_cast<int32_t>(i * stride);
}

/// The products of all indices of the batch in one form.
template <class T>
class Contraction {
 public:
  Contraction(const Form& form, T* scratch)
      : f_(form), copy_a_(f_.of_a()), copy_b_(f_.of_b()), copy_r_(f_.of_r()) {
    const auto take = [&](int64_t size) { return std::exchange(scratch, scratch + size); };
    row_ = reinterpret_cast<int32_t*>(take(f_.rows()));
    other_row_ = reinterpret_cast<int32_t*>(take(f_.rows()));
    for (T*& p : packed_a_) p = take(f_.pack_a * f_.m * f_.k);
    for (T*& p : packed_b_) p = take(f_.pack_b * f_.k * f_.n);
    packed_r_ = scratch;
    if (f_.outer) {
      fill_rows(f_.of.k, row_, other_row_);
      if (f_.pack_a) fill_rows(f_.k, f_.m, row_);
      if (f_.pack_b) fill_rows(f_.k, f_.n, other_row_);
    } else {
      fill_rows(f_.of.m, other_row_, row_);
      if (f_.pack_a) fill_rows(f_.m, f_.k, row_);
      if (f_.pack_r) fill_rows(f_.m, f_.n, other_row_);
    }
  }

  void operator()(const Term<T>* terms, int count, bool add, T* r) const {
    const Nest<3>& batch = f_.of.batch;
    Odometer<3> at(batch, 0, batch.axes);
    for (int64_t i = 0, end = batch.iterations(); i < end; ++i, at.next()) {
      Term<T> own[2] = {};
      for (int t = 0; t < count; ++t) {
        own[t] = f_.swapped ? Term<T>{terms[t].b, terms[t].a} : terms[t];
        own[t].a = packed(f_.pack_a, copy_a_, own[t].a + f_.of.a->offset + at[1], packed_a_[t]);
        own[t].b = packed(f_.pack_b, copy_b_, own[t].b + f_.of.b->offset + at[2], packed_b_[t]);
      }
      T* const to = r + f_.of.r->offset + at[0];
      product(own, count, add && !f_.pack_r, f_.pack_r ? packed_r_ : to);
      if (f_.pack_r) copy_r_(to, static_cast<const T*>(packed_r_), add, T(1));
    }
  }

 private:
  static const T* packed(bool pack, const strided::Copy& copy, const T* from, T* to) {
    if (!pack) return from;
    copy(to, from, false, T(1));
    return to;
  }

  void product(const Term<T> (&terms)[2], int count, bool add, T* r) const {
    const int64_t start = 0;
    if (f_.outer) {
      outer_product<T>(
          {{terms[0], terms[1]}, count, {1, f_.m, &start}, row_, other_row_, f_.k, f_.n, r, add});
    } else {
      gather_product<T>(
          {{terms[0], terms[1]}, count, {1, f_.k, &start}, row_, f_.m, f_.n, r, other_row_, nullptr, add});
    }
  }

  const Form& f_;
  strided::Copy copy_a_, copy_b_, copy_r_;
  int32_t *row_, *other_row_;
  T *packed_a_[2], *packed_b_[2], *packed_r_;
};

/// The sums of products of some vectors of lanes, at one place of the result.
template <int Vectors, class T, class L>
void add_products(const Nest<3>& summed, const Term<T>* terms, int count, bool add, T* r, L lanes) {
  const int inner = std::max(0, summed.axes - 1);
  const int64_t rows = summed.iterations(0, inner), size = summed.iterations(inner, summed.axes);
  const int64_t of_a = summed.axes ? summed.stride[1][inner] : 0;
  const int64_t of_b = summed.axes ? summed.stride[2][inner] : 0;
  Odometer<3> at(summed, 0, inner);
  Vector<T> total[Vectors] = {};
  for (int64_t row = 0; row < rows; ++row, at.next()) {
    for (int64_t start = 0; start < size; start += kSumBlock) {
      Vector<T> sum[Vectors] = {};
      for (int64_t i = start, end = std::min(size, start + kSumBlock); i < end; ++i) {
        for (int t = 0; t < count; ++t) {
          const T *a = terms[t].a + at[1] + i * of_a, *b = terms[t].b + at[2] + i * of_b;
          for (int v = 0; v < Vectors; ++v) {
            sum[v] += load(a + v * kLanes<T>, lanes) * load(b + v * kLanes<T>, lanes);
          }
        }
      }
      for (int v = 0; v < Vectors; ++v) total[v] += sum[v];
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    T* const to = r + v * kLanes<T>;
    store(to, add ? load(to, lanes) + total[v] : total[v], lanes);
  }
}

/// The contraction of operands with lanes.
template <class T>
void multiply_lanes(const Groups& of, const Term<T>* terms, int count, bool add, T* r) {
  Nest<3> outer = of.batch, summed;
  for (int a = 0; a < of.m.axes; ++a) outer.append(of.m.size[a], {of.m.stride[0][a], of.m.stride[1][a], 0});
  for (int a = 0; a < of.n.axes; ++a) outer.append(of.n.size[a], {of.n.stride[0][a], 0, of.n.stride[1][a]});
  for (int a = 0; a < of.k.axes; ++a) summed.append(of.k.size[a], {0, of.k.stride[0][a], of.k.stride[1][a]});
  outer.sort();
  outer.join();
  const int64_t work = 2 * count * of.lanes * outer.iterations() * summed.iterations();
  const auto compute = [&](int64_t first, int64_t last) {
    Odometer<3> at(outer, 0, outer.axes, first);
    for (int64_t i = first; i < last; ++i, at.next()) {
      each_block<T>(of.lanes, [&](int64_t lane, auto vectors, auto lanes) {
        Term<T> own[2] = {};
        for (int t = 0; t < count; ++t) {
          own[t].a = terms[t].a + of.a->offset + at[1] + lane;
          own[t].b = terms[t].b + of.b->offset + at[2] + lane;
        }
        add_products<vectors>(summed, own, count, add, r + of.r->offset + at[0] + lane, lanes);
      });
    }
  };
  Nest<3> of_r = outer;
  of_r.append(of.lanes, {1, 1, 1});
  injective(of_r) ? share(outer.iterations(), 1, work, compute) : compute(0, outer.iterations());
}

}  // namespace

template <>
struct OnCpu<Kind::contract> {
  static Footprint footprint(const Layer& l) {
    int64_t most = elements(l.loops->y, l.n);
    for (const View& x : {l.loops->x[0], l.loops->x[1]}) most = std::max(most, elements(x, l.n));
    int64_t scratch = 0;
    for (Product of : {Product::y, Product::cotangent_0, Product::cotangent_1}) {
      if (Groups(*l.loops, l.n, of).lanes > 1) continue;
      for (int64_t samples = 1; samples <= l.n; samples *= 2) {
        const Form form = cheapest(l, of, samples, std::min(l.n, 2 * samples - 1));
        most = std::max({most, form.m * form.k, form.k * form.n, form.m * form.n});
        scratch = std::max(scratch, form.scratch());
      }
    }
    if (most > std::numeric_limits<int32_t>::max()) {
      throw Unsupported("fused contractions are of at most " +
                        std::to_string(std::numeric_limits<int32_t>::max()) + " elements of one task, got " +
                        std::to_string(most));
    }
    return {0, scratch};
  }

  template <class T>
  static void product(const Layer& l, Product of, const Term<T>* terms, int count, bool add, T* out,
                      T* scratch) {
    const Groups groups(*l.loops, l.n, of);
    add = start(*l.loops, l.n, *groups.r, out, add);
    if (groups.lanes > 1) return multiply_lanes(groups, terms, count, add, out);
    const Form form = form_of(l, of);
    Contraction<T>(form, scratch)(terms, count, add, out);
  }
};
template struct Implementation<Kind::contract>;

}  // namespace maml::MAML_ISA
