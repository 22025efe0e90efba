// grad_x = sum over taps of grad_y w^T, and its tangent: the products of grad_y_dot with w and of grad_y with
// w_dot.
//
// Every element of grad_x gathers its terms; nothing is scattered. With stride s, input rows with equal
// (i + pad) mod s read the same taps. So each of the s x s parity classes is a convolution of grad_y with
// stride 1 and the taps of that class, last first, and no product has a factor that is zero because of the
// stride. There is one product (product.h) for each class, and one launch for all:
//
//   C [m, n] = grad_x     m: (sample, position of the class);  n: c_in;  k: (tap of the class, c_out)
//   A [m, k]              grad_y gathered, zero outside
//   B [k, n]              w [tap, c_in, c_out], as it stands in memory, contiguous in k
//
// blockIdx: x tiles of m, class after class; y tile of n; z task. Numerics: sums in ascending k, first term
// first; then the value that grad_x held is added. A class without taps gets zeros.
#include "cuda/conv2d.h"
#include "cuda/run/work.h"

namespace maml::cuda {
namespace {

struct ParityClass {
  PixelsByTaps a;
  Taps b;
  PatchGather to;  // where its positions stand in grad_x
  int first_block;
};

constexpr int kMostClasses = 9;  // per launch: strides up to 3 x 3; kernel parameters stay below 4 KB

template <class T>
struct InputGradient {
  ParityClass classes[kMostClasses];
  int count;
  Terms<T> terms;
  T* grad_x;
  bool vectors_x, add;
};

template <class Arithmetic, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResidentProducts<Arithmetic, Tile>)
    input_gradient_kernel(const __grid_constant__ InputGradient<typename Arithmetic::T> p,
                          Deferred deferred) {
  const Memory memory = deferred.ready();
  using T = typename Arithmetic::T;
  using Backward = Product<Arithmetic, Tile, PixelsByTaps, Taps>;
  const int64_t task = blockIdx.z;
  int own = 0;
  while (own + 1 < p.count && static_cast<int>(blockIdx.x) >= p.classes[own + 1].first_block) ++own;
  const ParityClass& c = p.classes[own];
  const int m0 = (static_cast<int>(blockIdx.x) - c.first_block) * Tile::kM;
  const int n0 = static_cast<int>(blockIdx.y) * Tile::kN;

  typename Backward::Accumulators sums;
  Backward::compute(c.a, c.b, p.terms, memory, task, m0, n0, 0, c.b.depth, sums, [](bool, const T*, auto) {});
  const auto at = Backward::position(m0, n0);
  if (!at.owner) return;
  T* const grad_x = resolve(p.grad_x, memory, task);
  write<Backward>(at, sums, c.b.n, p.vectors_x, p.add, [&](int m) {
    const Place to = c.to.pixel(m);
    return to.at < 0 ? nullptr : grad_x + to.offset;
  });
}

/// One axis of a parity class: its positions in grad_x are first, first + stride, ...; its taps are parity,
/// parity + stride, ...; `start` is the first row of grad_y that the first position reads.
struct ParityAxis {
  int64_t parity, first, positions, taps, start;
  ParityAxis(int64_t parity_, int64_t size, int64_t kernel, int64_t stride, int64_t pad) : parity(parity_) {
    first = ((parity - pad) % stride + stride) % stride;
    positions = first < size ? (size - first - 1) / stride + 1 : 0;
    taps = parity < kernel ? (kernel - parity - 1) / stride + 1 : 0;
    start = (first + pad - parity) / stride - (taps - 1);
  }
};

ParityClass parity_class(const Layer& l, const ParityAxis& rows, const ParityAxis& columns) {
  const Window& k = l.window;
  const int64_t taps = rows.taps * columns.taps, tap_size = l.in.c * l.out.c;
  const int64_t last_row = rows.parity + (rows.taps - 1) * k.stride_h;
  const int64_t last_column = columns.parity + (columns.taps - 1) * k.stride_w;
  ParityClass c;
  c.a.gather = PatchGather(l.n, l.out, rows.positions, columns.positions, 1, 1, rows.start, columns.start,
                           rows.taps, columns.taps);
  c.b.n = static_cast<int>(l.in.c);
  c.b.o = static_cast<int>(l.out.c);
  c.b.depth = static_cast<int>(taps * l.out.c);
  c.b.first = static_cast<int>((last_row * k.kernel_w + last_column) * tap_size);
  c.b.row = static_cast<int>(k.stride_h * k.kernel_w * tap_size);
  c.b.column = static_cast<int>(k.stride_w * tap_size);
  c.b.by_o = Divisor(c.b.o);
  c.b.by_taps_w = c.a.gather.by_taps_w;
  c.to = PatchGather(l.n, l.in, rows.positions, columns.positions, k.stride_h, k.stride_w, rows.first,
                     columns.first, 1, 1);
  c.first_block = 0;
  return c;
}

}  // namespace

template <class T>
void input_gradient(const Launcher& launch, const char* name, const Layer& l, Terms<T> terms, bool add,
                    T* grad_x) {
  terms.vectors_a = terms.vectors_b =
      in_vectors(terms.a, terms.count, l.out.c) && in_vectors(terms.b, terms.count, l.out.c);
  InputGradient<T> p{{}, 0, terms, grad_x, in_vectors(grad_x, l.in.c), add};
  const int64_t n = l.in.c;
  with_product<T>(l, l.n * size(l.in), n, [&]<class Arithmetic, class Tile>() {
    int64_t blocks = 0;
    auto flush = [&] {
      if (p.count == 0) return;
      note([&] {
        Work work;
        for (int i = 0; i < p.count; ++i)
          work += product_work<T>(p.classes[i].to.pixels, n, p.classes[i].b.depth, terms.count,
                                  l.n * size(l.out), p.classes[i].to.pixels * n);
        return work;
      });
      launch(name, input_gradient_kernel<Arithmetic, Tile>, {blocks, blocks_for(n, Tile::kN)}, Tile::kThreads,
             Product<Arithmetic, Tile, PixelsByTaps, Taps>::kSharedBytes, p, launch.memory);
      p.count = 0;
      blocks = 0;
    };
    for (int64_t a = 0; a < l.window.stride_h; ++a) {
      for (int64_t b = 0; b < l.window.stride_w; ++b) {
        const ParityAxis rows(a, l.in.h, l.window.kernel_h, l.window.stride_h, l.window.pad_top);
        const ParityAxis columns(b, l.in.w, l.window.kernel_w, l.window.stride_w, l.window.pad_left);
        if (rows.positions == 0 || columns.positions == 0) continue;
        if (add && (rows.taps == 0 || columns.taps == 0)) continue;
        ParityClass& c = p.classes[p.count++] = parity_class(l, rows, columns);
        c.first_block = static_cast<int>(blocks);
        blocks += blocks_for(c.to.pixels, Tile::kM);
        if (p.count == kMostClasses) flush();
      }
    }
    flush();
  });
}

template void input_gradient<float>(const Launcher&, const char*, const Layer&, Terms<float>, bool, float*);
template void input_gradient<double>(const Launcher&, const char*, const Layer&, Terms<double>, bool,
                                     double*);

}  // namespace maml::cuda
