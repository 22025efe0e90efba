// y = the sum over taps of x w, channel by channel, and its two adjoints, without windows in memory. Channels
// are the lanes of vectors, of which up to 4 are computed together. Rows that are read again for the next
// taps or positions are still in the cache.
//
// y and the cotangent of x are both sums over taps of a source, x or g. A tile of elements along the last
// axis is summed in registers over all taps, and written once. Elements of x at equal remainders by the
// stride (a phase) read the same taps, so that the adjoint of a strided convolution is a convolution for each
// phase. Taps are in ascending order for y, and in descending order, that of the elements of g, for x.
//
// The cotangent of w: some taps of the last axis are summed in registers over a row of g, in ascending order
// of its positions. The sums are added to the cotangent row by row.
//
// The twin on the GPU is cuda/depthwise.cu.
#include <numeric>

#include "cpu/implement.h"
#include "cpu/simd.h"
#include "cpu/slides.h"
#include "cpu/strided.h"

namespace maml::MAML_ISA {
namespace {

/// The most elements, or taps, that are summed together: with 4 vectors each, half of the registers.
constexpr int kTile = MAML_REGISTERS / 8;

/// An axis over which a window slides, with the strides of the operands.
struct Axis {
  Slide slide{.size = 1};
  int64_t positions = 1, taps = 1, of_y = 0, of_w = 0;
};

/// Every step-th element of an axis of a result, from `first` on. Its element q is the sum over i < taps of
/// the source's element `from` + q stride + i apart, if there is one, times w at `tap` + i tap_step.
struct Phase {
  int64_t first, step, count;
  int64_t stride, from, apart, size;  // of the source
  int64_t tap, tap_step, taps;

  /// The taps of an element.
  Range taps_of(int64_t q) const { return inside(from + q * stride, apart, size, taps); }
  /// The elements that have all taps.
  Range whole() const {
    return {inside(from, stride, size, count).first,
            inside(from + (taps - 1) * apart, stride, size, count).end};
  }
};

/// The phase of all elements of y.
Phase of_y(const Axis& a) {
  return {.first = 0,
          .step = 1,
          .count = a.positions,
          .stride = a.slide.stride,
          .from = -a.slide.padding,
          .apart = a.slide.dilation,
          .size = a.slide.size,
          .tap = 0,
          .tap_step = 1,
          .taps = a.taps};
}
/// That of the elements of x with this remainder by the stride. Tap t reads element i of x at the position
/// (i + padding - t dilation) / stride, if this is a whole number, which recurs with a period in t.
Phase of_x(const Axis& a, int64_t remainder) {
  const Slide& s = a.slide;
  const int64_t period = s.stride / std::gcd(s.stride, s.dilation), from = remainder + s.padding;
  const int64_t end = std::max<int64_t>(0, a.taps - period);
  int64_t tap = a.taps - 1;
  while (tap >= end && (from - tap * s.dilation) % s.stride != 0) --tap;
  return {.first = remainder,
          .step = s.stride,
          .count = ceiling(s.size - remainder, s.stride),
          .stride = 1,
          .from = (from - tap * s.dilation) / s.stride,
          .apart = period * s.dilation / s.stride,
          .size = a.positions,
          .tap = tap,
          .tap_step = -period,
          .taps = tap < end ? 0 : tap / period + 1};
}

/// The element of x at a position and a tap, which may be outside.
int64_t place(const Slide& s, int64_t position, int64_t tap) {
  return position * s.stride + tap * s.dilation - s.padding;
}

/// The axes of a layer, those without a window as one of a single element.
struct Axes {
  static_assert(kMostSlides == 3);
  Axis axis[3];
  Nest<2> batch;  // x, y
  int64_t channels;
  const View &x, &w, &y;

  Axes(const Loops& loops, int64_t n)
      : channels(loops.size[loops.axes - 1]), x(loops.x[0]), w(loops.x[1]), y(loops.y) {
    bool slid[kMostAxes] = {};
    for (int i = 0; i < loops.slides; ++i) {
      const Slide& s = loops.slide[i];
      axis[kMostSlides - loops.slides + i] = {s, loops.size[s.position], loops.size[s.tap],
                                              y.stride[s.position], w.stride[s.tap]};
      slid[s.position] = slid[s.tap] = true;
    }
    for (int a = 0; a < loops.axes - 1; ++a) {
      if (!slid[a]) batch.append(extent(loops, a, n), {x.stride[a], y.stride[a]});
    }
  }
};

/// f(size) with the constant min(size, Most)
template <int Most, class F>
void with_size(int64_t size, F f) {
  if constexpr (Most > 1) {
    if (size < Most) return with_size<Most - 1>(size, f);
  }
  f(std::integral_constant<int, Most>());
}

/// What a tile of elements sums: its first element begins at `from` and `of_w`.
struct Taps {
  Range of[3];
  int64_t from, of_w;
  int64_t source[3], w[3];  // strides of both between taps
  int64_t stride;           // of the source between elements of the tile
};

/// to[q apart] (+)= the sum over taps of source and w, for `Tile` elements q.
template <int Tile, int Vectors, class T, class L>
void sum_taps(const Taps& taps, const Term<T>* terms, int count, bool add, T* to, int64_t apart, L lanes) {
  constexpr int64_t W = kLanes<T>;
  Vector<T> sum[Tile][Vectors] = {};
  for (int t = 0; t < count; ++t) {
    for (int64_t i = taps.of[0].first; i < taps.of[0].end; ++i) {
      for (int64_t j = taps.of[1].first; j < taps.of[1].end; ++j) {
        const int64_t from = taps.from + i * taps.source[0] + j * taps.source[1];
        const int64_t at_w = taps.of_w + i * taps.w[0] + j * taps.w[1];
        for (int64_t k = taps.of[2].first; k < taps.of[2].end; ++k) {
          const T* source = terms[t].a + (from + k * taps.source[2]);
          const T* w = terms[t].b + (at_w + k * taps.w[2]);
          Vector<T> of_w[Vectors];
          for (int v = 0; v < Vectors; ++v) of_w[v] = load(w + v * W, lanes);
          for (int q = 0; q < Tile; ++q) {
            for (int v = 0; v < Vectors; ++v) {
              sum[q][v] += load(source + q * taps.stride + v * W, lanes) * of_w[v];
            }
          }
        }
      }
    }
  }
  for (int q = 0; q < Tile; ++q) {
    for (int v = 0; v < Vectors; ++v) {
      T* const p = to + q * apart + v * W;
      store(p, add ? load(p, lanes) + sum[q][v] : sum[q][v], lanes);
    }
  }
}

/// One of the two sums over taps: y (of x), or the cotangent of x (of g).
class SumOverTaps {
 public:
  SumOverTaps(const Axes& axes, Product of)
      : axes_(axes), is_y_(of == Product::y), to_(is_y_ ? axes.y : axes.x), from_(is_y_ ? axes.x : axes.y) {
    for (int d = 0; d < 3; ++d) {
      const Axis& a = axes.axis[d];
      size_[d] = is_y_ ? a.positions : a.slide.size;
      result_[d] = is_y_ ? a.of_y : a.slide.x_stride;
      source_[d] = is_y_ ? a.slide.x_stride : a.of_y;
    }
  }

  /// Rows of the result along its last axis.
  int64_t rows() const { return axes_.batch.iterations() * size_[0] * size_[1]; }

  /// Computes the rows [first, last).
  template <class T>
  void operator()(const Term<T>* terms, int count, bool add, T* out, int64_t first, int64_t last) const {
    for (int64_t row = first; row < last; ++row) {
      const Odometer<2> at(axes_.batch, 0, axes_.batch.axes, row / (size_[0] * size_[1]));
      const int64_t element[2] = {row / size_[1] % size_[0], row % size_[1]};
      int64_t to = to_.offset + at[is_y_ ? 1 : 0];
      Taps taps;
      taps.from = from_.offset + at[is_y_ ? 0 : 1], taps.of_w = axes_.w.offset;
      for (int d = 0; d < 2; ++d) {
        const Phase p = phase(d, element[d] % phases(d));
        begin(d, p, element[d] / p.step, taps);
        to += element[d] * result_[d];
      }
      for (int64_t remainder = 0; remainder < phases(2); ++remainder) {
        sum_row(phase(2, remainder), taps, terms, count, add, out + to);
      }
    }
  }

 private:
  int64_t phases(int d) const { return is_y_ ? 1 : std::min(size_[d], axes_.axis[d].slide.stride); }
  Phase phase(int d, int64_t remainder) const {
    return is_y_ ? of_y(axes_.axis[d]) : of_x(axes_.axis[d], remainder);
  }

  /// Begins at element q of a phase of axis d.
  void begin(int d, const Phase& p, int64_t q, Taps& taps) const {
    taps.of[d] = p.taps_of(q);
    taps.from += (p.from + q * p.stride) * source_[d], taps.source[d] = p.apart * source_[d];
    taps.of_w += p.tap * axes_.axis[d].of_w, taps.w[d] = p.tap_step * axes_.axis[d].of_w;
    taps.stride = p.stride * source_[d];
  }

  /// The elements of one phase of a row.
  template <class T>
  void sum_row(const Phase& p, const Taps& row, const Term<T>* terms, int count, bool add, T* to) const {
    const Range whole = p.whole();
    const int64_t apart = p.step * result_[2];
    each_block<T>(axes_.channels, [&](int64_t channel, auto vectors, auto lanes) {
      for (int64_t q = 0, done; q < p.count; q += done) {
        const int64_t most = whole.first <= q && q < whole.end ? whole.end - q : 1;
        Taps taps = row;
        begin(2, p, q, taps);
        taps.from += channel, taps.of_w += channel;
        T* const at = to + (p.first * result_[2] + q * apart + channel);
        with_size<kTile>(most, [&](auto tile) {
          sum_taps<tile, vectors>(taps, terms, count, add, at, apart, lanes);
          done = tile;
        });
      }
    });
  }

  const Axes& axes_;
  bool is_y_;
  const View &to_, &from_;
  int64_t size_[3], result_[3], source_[3];  // elements of the result; strides
};

/// to[k] += the sum over the positions of a row of x g, for `Tile` taps k of the last axis. `from` and
/// `at_g`: where the axis begins in x and in g.
template <int Tile, int Vectors, class T, class L>
void sum_positions(const Axis& axis, int64_t tap, const Term<T>* terms, int count, int64_t from, int64_t at_g,
                   T* to, L lanes) {
  constexpr int64_t W = kLanes<T>;
  const Slide& s = axis.slide;
  const int64_t start = tap * s.dilation - s.padding, between = s.dilation * s.x_stride;
  Range of[Tile];
  for (int k = 0; k < Tile; ++k) of[k] = inside(start + k * s.dilation, s.stride, s.size, axis.positions);
  const Range whole = {of[0].first, of[Tile - 1].end};  // at which all taps are inside
  for (int64_t first = of[Tile - 1].first; first < of[0].end; first += kSumBlock) {
    const int64_t end = std::min(of[0].end, first + kSumBlock);
    Vector<T> sum[Tile][Vectors] = {};
    const auto add_position = [&](int64_t p, auto all) {
      for (int t = 0; t < count; ++t) {
        const T *x = terms[t].a, *g = terms[t].b + (at_g + p * axis.of_y);
        const int64_t place = from + (start + p * s.stride) * s.x_stride;
        Vector<T> of_g[Vectors];
        for (int v = 0; v < Vectors; ++v) of_g[v] = load(g + v * W, lanes);
        for (int k = 0; k < Tile; ++k) {
          if (!all && (p < of[k].first || p >= of[k].end)) continue;
          const T* at = x + (place + k * between);
          for (int v = 0; v < Vectors; ++v) sum[k][v] += load(at + v * W, lanes) * of_g[v];
        }
      }
    };
    int64_t p = first;
    for (; p < std::min(end, whole.first); ++p) add_position(p, std::false_type());
    for (; p < std::min(end, whole.end); ++p) add_position(p, std::true_type());
    for (; p < end; ++p) add_position(p, std::false_type());
    for (int k = 0; k < Tile; ++k) {
      for (int v = 0; v < Vectors; ++v) {
        T* const w = to + k * axis.of_w + v * W;
        store(w, load(w, lanes) + sum[k][v], lanes);
      }
    }
  }
}

/// The cotangent of w at the rows of taps [first, last) along its last axis, += the sum over all positions.
template <int Vectors, class T, class L>
void sum_rows(const Axes& axes, const Term<T>* terms, int count, int64_t channel, int64_t first, int64_t last,
              T* grad_w, L lanes) {
  const auto& [outer, middle, inner] = axes.axis;
  const int64_t rows = outer.positions * middle.positions, all = axes.batch.iterations() * rows;
  for (int64_t row = 0; row < all; ++row) {
    const Odometer<2> at(axes.batch, 0, axes.batch.axes, row / rows);
    const int64_t i = row / middle.positions % outer.positions, j = row % middle.positions;
    const int64_t of_g = axes.y.offset + at[1] + i * outer.of_y + j * middle.of_y + channel;
    for (int64_t tap = first; tap < last; ++tap) {
      const int64_t of_outer = tap / middle.taps, of_middle = tap % middle.taps;
      const int64_t y = place(outer.slide, i, of_outer), x = place(middle.slide, j, of_middle);
      if (y < 0 || y >= outer.slide.size || x < 0 || x >= middle.slide.size) continue;
      const int64_t from =
          axes.x.offset + at[0] + y * outer.slide.x_stride + x * middle.slide.x_stride + channel;
      T* const to = grad_w + (axes.w.offset + of_outer * outer.of_w + of_middle * middle.of_w + channel);
      for (int64_t k = 0, done; k < inner.taps; k += done) {
        with_size<kTile>(inner.taps - k, [&](auto tile) {
          sum_positions<tile, Vectors>(inner, k, terms, count, from, of_g, to + k * inner.of_w, lanes);
          done = tile;
        });
      }
    }
  }
}

/// grad_w += the sum over all positions. Threads share blocks of channels and rows of taps.
template <class T>
void sum_over_positions(const Axes& axes, const Term<T>* terms, int count, int64_t work, T* grad_w) {
  constexpr int64_t kBlock = 4 * kLanes<T>;
  const int64_t blocks = (axes.channels + kBlock - 1) / kBlock, rows = axes.axis[0].taps * axes.axis[1].taps;
  share(blocks * rows, 1, work, [&](int64_t first, int64_t last) {
    for (int64_t end; first < last; first = end) {
      const int64_t block = first / rows, start = block * kBlock;
      end = std::min(last, (block + 1) * rows);
      each_block<T>(std::min(kBlock, axes.channels - start), [&](int64_t j, auto vectors, auto lanes) {
        sum_rows<vectors>(axes, terms, count, start + j, first - block * rows, end - block * rows, grad_w,
                          lanes);
      });
    }
  });
}

/// The loops over all elements of y, or of x.
Loops over_result(Loops loops, Product of) {
  for (int i = 0; i < loops.slides; ++i) {
    const Slide& s = loops.slide[i];
    loops.size[s.tap] = 1;
    if (of == Product::y) continue;
    loops.size[s.position] = s.size, loops.x[0].stride[s.position] = s.x_stride;
  }
  return loops;
}

}  // namespace

template <>
struct OnCpu<Kind::depthwise> {
  static Footprint footprint(const Layer&) { return {}; }

  template <class T>
  static void product(const Layer& l, Product of, const Term<T>* terms, int count, bool add, T* out, T*) {
    const Axes axes(*l.loops, l.n);
    const int64_t work = count * iterations(*l.loops, l.n);
    if (of == Product::cotangent_1) {
      if (!add) set_to_zero(axes.w, l.n, out);
      return sum_over_positions(axes, terms, count, work, out);
    }
    const Loops loops = over_result(*l.loops, of);
    const View& to = of == Product::y ? loops.y : loops.x[0];
    add = start(loops, l.n, to, out, add);
    const SumOverTaps sum(axes, of);
    const auto compute = [&](int64_t first, int64_t last) { sum(terms, count, add, out, first, last); };
    injective(nest_of<1>(loops, l.n, {&to})) ? share(sum.rows(), 1, work, compute) : compute(0, sum.rows());
  }
};
template struct Implementation<Kind::depthwise>;

}  // namespace maml::MAML_ISA
