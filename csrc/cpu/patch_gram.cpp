// The moments of a constant image's patches (layers/patch_gram.h): sum p and sum p p^T over all patches of a
// task.
//
// Two taps of a patch read the same image, the second one shifted by the distance between the taps. So all
// pairs of taps with the same distance sum the same products, pixel times shifted pixel, and differ only in
// which pixels they visit. With stride s a tap visits every s-th position of the image, except some at its
// edges. Rows and columns therefore fall into classes that a tap visits either entirely or not at all: the s
// residues of the inner rows, and each row near an edge as a class of its own. With f the padded image, and
// for classes R of rows and K of columns,
//
//   M[R, K, c]        = sum of f[i, j, c] over i in R, j in K
//   Q[R, K, c, d, e]  = sum of f[i, j, c] f[i + d, (j, c) + e]      d rows and e elements away, d >= 0
//   sum p_u p_v       = sum of Q[R, K, c, ..] over the R and K that u visits,     u = (row, column, c) <= v
//
// For 3 x 3 x 3 taps this takes a seventh of the products of all pairs. Rows are converted to double, as many
// at a time as the kernel has, and multiplied as vectors of elements. On inner columns, lane j of a sum reads
// the elements j, j + period, ...; there are as many sums as it takes for every lane to have one residue and
// channel. Order of sums: columns by lanes, rows, samples; then classes. The twin on the GPU is
// cuda/patch_gram.cu.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "cpu/frame.h"
#include "cpu/implement.h"
#include "cpu/simd.h"
#include "layers/patch_moments.h"

namespace maml::MAML_ISA {
namespace {

constexpr int kBlock = 6;        // offsets whose sums are in registers at the same time
constexpr int64_t kMargin = 64;  // elements beyond both ends of a row: offsets of a patch, a block, a vector

/// One axis of the pixels that the taps visit: tap t visits t, t + stride, ..., `positions` of them. Elements
/// between the taps of consecutive positions are left out, so that stride <= taps. The classes are the
/// residues of [first, end), then every other element by itself.
struct Visits {
  int64_t taps, step, stride, positions, size, first, end;
  Visits(int64_t taps_, int64_t step_, int64_t positions_)
      : taps(taps_), step(step_), stride(std::min(step_, taps_)), positions(positions_) {
    size = (positions - 1) * stride + taps;
    first = taps - 1;
    end = stride * positions;
    if (first >= end) first = end = size;
  }
  /// The position of an element in the padded image.
  int64_t in_frame(int64_t i) const { return i / stride * step + i % stride; }
  int64_t edges() const { return first + size - end; }
  int64_t classes() const { return stride + edges(); }
  int64_t edge(int64_t k) const { return k < first ? k : k - first + end; }
  int64_t class_of(int64_t i) const {
    return i < first ? stride + i : i < end ? i % stride : stride + first + i - end;
  }
  bool visits(int64_t tap, int64_t c) const {
    if (c < stride) return tap % stride == c;
    const int64_t from = edge(c - stride) - tap;
    return from >= 0 && from % stride == 0 && from / stride < positions;
  }
};

/// The sizes and offsets of the sums.
struct SumLayout {
  static constexpr int64_t W = kLanes<double>;
  Visits rows, columns;
  int64_t channels, run;     // run: elements of a row of taps
  int64_t offsets;           // distances e from 1 - run on, rounded up to whole blocks
  int64_t phases;            // vectors after which lanes have the same residues and channels again
  int64_t of_class, of_row;  // elements of Q and M for one class; of sums in lanes for one class of rows

  explicit SumLayout(const Layer& l)
      : rows(l.window.kernel_h, l.window.stride_h, l.between.h),
        columns(l.window.kernel_w, l.window.stride_w, l.between.w),
        channels(l.in.c),
        run(columns.taps * channels),
        offsets((2 * run - 1 + kBlock - 1) / kBlock * kBlock),
        phases(period() / std::gcd(period(), W)),
        of_class(rows.taps * offsets + 1),
        of_row(phases * of_class * W) {}

  int64_t period() const { return columns.stride * channels; }
  int64_t row_elements() const { return columns.size * channels; }
  int64_t row_size() const { return row_elements() + 2 * kMargin; }
  int64_t classes_size() const { return rows.classes() * columns.classes() * channels * of_class; }
  int64_t lanes_size() const { return rows.classes() * of_row; }
  int64_t size() const { return classes_size() + lanes_size() + rows.taps * row_size(); }
  /// The offset for a class of rows, a class of columns and a channel: Q [d, offsets], then M.
  int64_t at(int64_t row_class, int64_t column_class, int64_t c) const {
    return ((row_class * columns.classes() + column_class) * channels + c) * of_class;
  }
};

/// sums[phase, e] += a[i] b[i + e] over n elements of inner columns, kept in lanes.
void add_inner(const SumLayout& s, int64_t n, const double* a, const double* b, int64_t first_block,
               double* sums) {
  constexpr int64_t W = kLanes<double>;
  for (int64_t phase = 0; phase < s.phases; ++phase) {
    for (int64_t e = first_block; e < s.offsets; e += kBlock) {
      const double* shifted = b + e - (s.run - 1);
      Vector<double> sum[kBlock] = {};
      int64_t i = phase * W;
      for (; i + W <= n; i += s.phases * W) {
        const Vector<double> x = load(a + i);
#pragma GCC unroll 6
        for (int k = 0; k < kBlock; ++k) sum[k] += x * load(shifted + i + k);
      }
      if (i < n) {
        const Lanes<double> lanes(n - i);
        const Vector<double> x = load(a + i, lanes);
#pragma GCC unroll 6
        for (int k = 0; k < kBlock; ++k) sum[k] += x * load(shifted + i + k, lanes);
      }
      double* to = sums + (phase * s.of_class + e) * W;
      for (int k = 0; k < kBlock; ++k) store(to + k * W, load(to + k * W) + sum[k]);
    }
  }
}

/// Adds the products of row i of an image with itself and with the rows below it; row(i) is converted to
/// double.
template <class Row>
void add_row(const SumLayout& s, int64_t i, Row row, double* classes, double* lanes) {
  constexpr int64_t W = kLanes<double>;
  const int64_t row_class = s.rows.class_of(i), c = s.channels, begin = s.columns.first * c;
  const int64_t inner = (s.columns.end - s.columns.first) * c, below = std::min(s.rows.taps, s.rows.size - i);
  const double* a = row(i);
  double* of_row = lanes + row_class * s.of_row;
  for (int64_t d = 0; d < below; ++d) {
    const double* b = row(i + d);
    const int64_t first_block = d == 0 ? (s.run - 1) / kBlock * kBlock : 0;  // of a row with itself: e >= 0
    add_inner(s, inner, a + begin, b + begin, first_block, of_row + d * s.offsets * W);
    for (int64_t k = 0; k < s.columns.edges(); ++k) {
      for (int64_t at = s.columns.edge(k) * c, ch = 0; ch < c; ++ch, ++at) {
        double* to = classes + s.at(row_class, s.columns.stride + k, ch) + d * s.offsets;
        const double* shifted = b + at - (s.run - 1);
        for (int64_t e = first_block; e < s.offsets; ++e) to[e] += a[at] * shifted[e];
      }
    }
  }
  for (int64_t phase = 0; phase < s.phases; ++phase) {
    Vector<double> sum{};
    for (int64_t j = phase * W; j < inner; j += s.phases * W) {
      sum += load(a + begin + j, Lanes<double>(std::min(W, inner - j)));
    }
    double* to = of_row + (phase * s.of_class + s.of_class - 1) * W;
    store(to, load(to) + sum);
  }
  for (int64_t k = 0; k < s.columns.edges(); ++k) {
    for (int64_t ch = 0; ch < c; ++ch) {
      classes[s.at(row_class, s.columns.stride + k, ch) + s.of_class - 1] += a[s.columns.edge(k) * c + ch];
    }
  }
}

/// Adds the sums in lanes to the classes of their columns.
void gather_lanes(const SumLayout& s, const double* lanes, double* classes) {
  constexpr int64_t W = kLanes<double>;
  for (int64_t row_class = 0; row_class < s.rows.classes(); ++row_class) {
    for (int64_t phase = 0; phase < s.phases; ++phase) {
      const double* from = lanes + row_class * s.of_row + phase * s.of_class * W;
      for (int64_t lane = 0; lane < W; ++lane) {
        const int64_t element = (s.columns.first * s.channels + phase * W + lane) % s.period();
        double* to = classes + s.at(row_class, element / s.channels, element % s.channels);
        for (int64_t e = 0; e < s.of_class; ++e) to[e] += from[e * W + lane];
      }
    }
  }
}

/// Calls f(address of Q and M) for the classes that a tap visits.
template <class F>
void each_class(const SumLayout& s, int64_t row, int64_t column, int64_t c, const double* classes, F f) {
  for (int64_t r = 0; r < s.rows.classes(); ++r) {
    if (!s.rows.visits(row, r)) continue;
    for (int64_t k = 0; k < s.columns.classes(); ++k) {
      if (s.columns.visits(column, k)) f(classes + s.at(r, k, c));
    }
  }
}

/// The number of elements of T that holds so many doubles, for either T.
constexpr int64_t elements(int64_t doubles) { return 2 * doubles; }

template <class T>
void forward(const Layer& l, const Tensors<T>& t) {
  const SumLayout s(l);
  double* classes = reinterpret_cast<double*>(t.scratch);
  double* lanes = classes + s.classes_size();
  double* converted = lanes + s.lanes_size();
  T* buffer = reinterpret_cast<T*>(converted + s.rows.taps * s.row_size());
  std::fill_n(classes, s.size(), 0.0);
  const Frame frame = frame_of(l.window, l.between);
  auto row = [&](int64_t i) { return converted + i % s.rows.taps * s.row_size() + kMargin; };
  for (int64_t n = 0; n < l.n; ++n) {
    const Framed<T> f = framed(t.x[0] + n * size(l.in), 1, l.in, frame, buffer);
    int64_t ready = 0;
    for (int64_t i = 0; i < s.rows.size; ++i) {
      for (; ready < std::min(i + s.rows.taps, s.rows.size); ++ready) {
        const T* from = f.base + s.rows.in_frame(ready) * f.row;
        double* to = row(ready);
        for (int64_t j = 0; j < s.columns.size; ++j) {
          for (int64_t c = 0; c < s.channels; ++c) {
            *to++ = static_cast<double>(from[s.columns.in_frame(j) * s.channels + c]);
          }
        }
      }
      add_row(s, i, row, classes, lanes);
    }
  }
  gather_lanes(s, lanes, classes);

  const int64_t patch = patch_size(l.window, l.in);
  const double total = static_cast<double>(l.n * l.between.h * l.between.w);
  double* mean = reinterpret_cast<double*>(t.y);
  double* gram = mean + patch;
  for (int64_t u = 0; u < patch; ++u) {
    double sum = 0;
    each_class(s, u / s.run, u % s.run / s.channels, u % s.channels, classes,
               [&](const double* of) { sum += of[s.of_class - 1]; });
    mean[u] = sum / total;
  }
  for (int64_t u = 0; u < patch; ++u) {
    for (int64_t v = u; v < patch; ++v) {
      const int64_t d = v / s.run - u / s.run, e = v % s.run - u % s.run + s.run - 1;
      double sum = 0;
      each_class(s, u / s.run, u % s.run / s.channels, u % s.channels, classes,
                 [&](const double* of) { sum += of[d * s.offsets + e]; });
      gram[u * patch + v] = gram[v * patch + u] = sum / total - mean[u] * mean[v];
    }
  }
}

template <class T>
void nothing(const Layer&, const Tensors<T>&) {}

}  // namespace

template <>
struct OnCpu<Kind::patch_gram> {
  static Footprint footprint(const Layer& l) {
    const Frame frame = frame_of(l.window, l.between);
    return {0, elements(SumLayout(l).size()) + frame.h * frame.w * l.in.c};
  }
  template <class T>
  static Passes<T> passes() {
    return {forward<T>, nothing<T>, nothing<T>, nothing<T>};
  }
};
template struct Implementation<Kind::patch_gram>;

}  // namespace maml::MAML_ISA
