// y = max-pool of bias + x * w over disjoint 2 x 2 windows, as one product (product.h). The rows of the
// product are in window order (window_order.h), so that every thread holds whole windows among its sums: the
// values before the pool stay in registers. In the tangent, the pool takes the sums at the positions that the
// forward pass chose.
//
// blockIdx: x tile of m, y tile of n, z task. Numerics: as in conv2d_forward.cu; the first of equal values
// wins, and a NaN wins, as in torch.
#include "cuda/run/work.h"
#include "cuda/stem.h"

namespace maml::cuda {
namespace {

template <class T>
struct Pooled {
  PixelsByTaps a;
  Rows b;
  Terms<T> terms;
  const T* bias;
  T* y;
  uint8_t* places;
  bool vectors, tangent;
};

template <class T>
struct alignas(kVector<T>) Members {
  uint8_t member[kVector<T>];
};

template <class Arithmetic, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResidentProducts<Arithmetic, Tile>)
    pooled_kernel(const __grid_constant__ Pooled<typename Arithmetic::T> p, Deferred deferred) {
  const Memory memory = deferred.ready();
  using T = typename Arithmetic::T;
  using Forward = Product<Arithmetic, Tile, PixelsByTaps, Rows>;
  constexpr int V = kVector<T>;
  static_assert(Forward::Accumulators::kRows % 4 == 0);
  const int64_t task = blockIdx.z;
  const int m0 = static_cast<int>(blockIdx.x) * Tile::kM, n0 = static_cast<int>(blockIdx.y) * Tile::kN;
  const int n = p.b.n;

  typename Forward::Accumulators sums;
  Forward::compute(p.a, p.b, p.terms, memory, task, m0, n0, 0, p.a.gather.depth, sums,
                   [](bool, const T*, auto) {});
  const auto at = Forward::position(m0, n0);
  if (!at.owner) return;
  const T* const bias = resolve(p.bias, memory, task);
  T* const y = resolve(p.y, memory, task);
  uint8_t* const places = resolve(p.places, memory, task);
#pragma unroll
  for (int r = 0; r < Forward::Accumulators::kRows; r += 4) {
    const int window = window_row(V, at.row(r)).window;
    if (window >= p.a.gather.windows) continue;
#pragma unroll
    for (int c = 0; c < Forward::Accumulators::kColumns; c += V) {
      const int column = at.column(c), left = n - column;
      if (left <= 0) continue;
      const int64_t to = static_cast<int64_t>(window) * n + column;
      Members<T> chosen{};
      if (p.tangent) {
        if (p.vectors) {
          chosen = *reinterpret_cast<const Members<T>*>(places + to);
        } else {
          for (int e = 0; e < V; ++e) chosen.member[e] = e < left ? places[to + e] : 0;
        }
      }
      T values[V];
#pragma unroll
      for (int e = 0; e < V; ++e) {
        T best = sums.at(r, c + e);
        int member = chosen.member[e];
#pragma unroll
        for (int j = 1; j < 4; ++j) {
          const T v = sums.at(r + j, c + e);
          const bool take = p.tangent ? j == member : v > best || v != v;
          best = take ? v : best;
          if (!p.tangent && take) member = j;
        }
        chosen.member[e] = static_cast<uint8_t>(member);
        values[e] = best + (e < left ? bias[column + e] : T(0));
      }
      put(y + to, values, left, p.vectors, false);
      if (p.tangent) continue;
      if (p.vectors) {
        *reinterpret_cast<Members<T>*>(places + to) = chosen;
      } else {
        for (int e = 0; e < V; ++e) {
          if (e < left) places[to + e] = chosen.member[e];
        }
      }
    }
  }
}

}  // namespace

template <class T>
void convolve_and_pool(const Launcher& launch, const char* name, const Layer& l, Terms<T> terms,
                       const T* bias, bool tangent, T* y, uint8_t* places) {
  const PatchGather gather = patch_gather<T>(l);
  terms.vectors_a = in_vectors(terms.a, terms.count, l.in.c);
  terms.vectors_b = in_vectors(terms.b, terms.count, l.out.c);
  const int64_t m = gather.pixels, n = l.out.c;
  const Pooled<T> p{{gather}, {gather.depth, static_cast<int>(n)}, terms, bias, y, places, in_vectors(y, n),
                    tangent};
  note([&] { return product_work<T>(m, n, gather.depth, terms.count, l.n * size(l.in), l.n * size(l.out)); });
  with_product<T>(l, m * n, n, [&]<class Arithmetic, class Tile>() {
    launch(name, pooled_kernel<Arithmetic, Tile>, {blocks_for(m, Tile::kM), blocks_for(n, Tile::kN)},
           Tile::kThreads, Product<Arithmetic, Tile, PixelsByTaps, Rows>::kSharedBytes, p, launch.memory);
  });
}

template void convolve_and_pool<float>(const Launcher&, const char*, const Layer&, Terms<float>, const float*,
                                       bool, float*, uint8_t*);
template void convolve_and_pool<double>(const Launcher&, const char*, const Layer&, Terms<double>,
                                        const double*, bool, double*, uint8_t*);

}  // namespace maml::cuda
