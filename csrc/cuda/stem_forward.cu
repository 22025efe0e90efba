// The forward pass of the stem (stem.h) and its tangent, one launch each:
//
//   1. Every block computes the weights and the bias of the convolution for its channels (stem_channels.h).
//      The first block of each group of channels saves what later passes need.
//   2. It goes through its tiles (stem_tiles.h). While one is multiplied, the next is being copied. A warp
//      computes 32 pixels x 32 channels (stem_product.h): A is read from the tile, B, the weights, stays in
//      registers with matrix instructions, in shared memory otherwise.
//   3. The rows of the product are in window order (window_order.h), so that every thread holds whole windows
//      among its sums: the pool and f are applied in registers, and y is written in vectors. In the tangent,
//      the pool takes the sums at the places that the forward pass chose.
//
// A function that bends is evaluated in a loop of its own, in which each thread reads u back from y: unrolled
// with the sums it would be copied for each of them.
//
// blockIdx: x part of the tiles, y 32 channels, z task. Shared memory: two tiles (dynamic); tables, weights
// and G, 13 KB (17 KB in float64). Numerics: sums over a patch in ascending order, then the bias; an element
// of a patch that is outside the image is a zero that takes part. In the pool the first of equal values wins,
// and a NaN wins, as in torch. The result does not depend on how tiles are shared among blocks.
#include "cuda/run/work.h"
#include "cuda/stem_channels.h"
#include "cuda/stem_product.h"

namespace maml::cuda {
namespace {

constexpr int kWarps = kStemRows / 32, kForwardThreads = 32 * kWarps;
// Blocks of a task for 32 channels: with 4 tasks four on each of 132 multiprocessors. More would compute the
// weights more often.
constexpr int64_t kMostBlocks = kSmallTiles ? 3 : 128;
template <class T>
constexpr int kResidentForward = sizeof(T) == 4 ? 4 : 2;

/// The weights [patch, channels] of the convolution are the matrix of this memory.
template <class T>
struct Convolution : ChannelMemory<T, kWarps> {
  T bias[kStemColumns];
};

template <class T>
__device__ __forceinline__ void weights_of(const Stem<T>& p, const Tensors<T>& t, Convolution<T>& to) {
  const StemChannels<T, kWarps> ch(p, t, to);
  double Gw[ch.kEach], sum[2];
  ch.gram_product(t.w[0], Gw);
  ch.sum(sum, [&](int i, int e, double (&to)[2]) {
    to[0] += ch.pbar[e] * ch.w(e);
    to[1] += Gw[i] * ch.w(e);
  });
  const double mu = sum[0], s = 1 / std::sqrt((sum[1] > 0 ? sum[1] : 0) + p.eps), a = ch.gamma() * s;
  const bool saves = blockIdx.x == 0 && ch.active;
  ch.each([&](int i, int e) {
    to.matrix[e][ch.column] = static_cast<T>(a * ch.w(e));
    if (saves) ch.saved.Gw[ch.at(e)] = Gw[i];
  });
  if (ch.row > 0) return;
  to.bias[ch.column] = static_cast<T>(ch.value(t.w[3], ch.channel, 0) - a * mu);
  if (saves) ch.saved.mu[ch.channel] = mu, ch.saved.s[ch.channel] = s;
}

template <class T>
__device__ __forceinline__ void tangent_weights_of(const Stem<T>& p, const Tensors<T>& t,
                                                   Convolution<T>& to) {
  const StemChannels<T, kWarps> ch(p, t, to);
  double sum[2];
  ch.sum(sum, [&](int, int e, double (&to)[2]) {
    to[0] += ch.pbar[e] * ch.w_dot(e);
    to[1] += ch.kept(ch.saved.Gw, ch.at(e)) * ch.w_dot(e);
  });
  const double s = ch.kept(ch.saved.s, ch.channel), a = ch.gamma() * s, Rmu = sum[0], c = s * sum[1];
  const double k = s * (ch.value(t.w_dot[2], ch.channel, 0) - a * c);
  ch.each([&](int, int e) { to.matrix[e][ch.column] = static_cast<T>(a * ch.w_dot(e) + k * ch.w(e)); });
  if (ch.row > 0) return;
  to.bias[ch.column] =
      static_cast<T>(ch.value(t.w_dot[3], ch.channel, 0) - a * Rmu - k * ch.kept(ch.saved.mu, ch.channel));
  if (blockIdx.x == 0 && ch.active) ch.saved.Rmu[ch.channel] = Rmu, ch.saved.c[ch.channel] = c;
}

/// What happens to the sums of V channels of one output, or of the four pixels of its window.
template <class T, bool Tangent>
struct Epilogue {
  static constexpr int V = kVector<T>;
  const Stem<T>& p;
  const Tensors<T>& t;
  StemSaved<T> saved;

  __device__ __forceinline__ Epilogue(const Stem<T>& p_, const Tensors<T>& t_)
      : p(p_), t(t_), saved(p_.saved(t_.saved)) {}

  /// members[j] are the sums of pixel j.
  template <int Members_>
  __device__ __forceinline__ void apply(const T (&members)[Members_][V], const T* bias, int64_t at,
                                        int left) const {
    T u[V];
    if constexpr (Members_ == 1) {
#pragma unroll
      for (int e = 0; e < V; ++e) u[e] = members[0][e];
    } else {
      Members<T> chosen{};
      if (Tangent) chosen = Members<T>::read(saved.places + at, left, p.vectors);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        T best = members[0][e];
        int member = chosen.member[e];
#pragma unroll
        for (int j = 1; j < 4; ++j) {
          const T v = members[j][e];
          const bool take = Tangent ? j == member : v > best || v != v;
          best = take ? v : best;
          if (!Tangent && take) member = j;
        }
        chosen.member[e] = static_cast<uint8_t>(member);
        u[e] = best;
      }
      if (!Tangent) chosen.write(saved.places + at, left, p.vectors);
    }
#pragma unroll
    for (int e = 0; e < V; ++e) u[e] += bias[e];
    if constexpr (Tangent) {
      scale(u, at, left);
      put(t.y_dot + at, u, left, p.vectors, false);
    } else {
      if (!p.curved) {
#pragma unroll
        for (int e = 0; e < V; ++e) u[e] = p.kink(u[e]);
      }
      put(t.y + at, u, left, p.vectors, false);
    }
  }

  /// u_dot becomes f'(u) u_dot.
  __device__ __forceinline__ void scale(T (&u_dot)[V], int64_t at, int left) const {
    T values[V];
    if (!p.curved) {
      if (p.kink.is_identity()) return;
      get(t.y + at, values, left, p.vectors);
#pragma unroll
      for (int e = 0; e < V; ++e) u_dot[e] *= p.kink.slope(values[e]);
      return;
    }
    get(saved.curvature + at, values, left, p.vectors);
#pragma unroll
    for (int e = 0; e < V; ++e) values[e] *= u_dot[e];
    put(t.saved_dot + at, values, left, p.vectors, false);
    get(saved.slope + at, values, left, p.vectors);
#pragma unroll
    for (int e = 0; e < V; ++e) u_dot[e] *= values[e];
  }

  /// y, which is u so far, becomes f(u).
  template <Function F>
  __device__ __forceinline__ void evaluate_curved(int64_t at, int left) const {
    T u[V], slope[V], curvature[V];
    get(t.y + at, u, left, p.vectors);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const Derivatives<T> d = evaluate<F, T>(p.constants, u[e]);
      u[e] = d.f, slope[e] = d.df, curvature[e] = d.ddf;
    }
    put(t.y + at, u, left, p.vectors, false);
    put(saved.slope + at, slope, left, p.vectors, false);
    put(saved.curvature + at, curvature, left, p.vectors, false);
  }
};

template <class Arithmetic, bool Tangent>
__global__ void __launch_bounds__(kForwardThreads, kResidentForward<typename Arithmetic::T>)
    stem_forward_kernel(const __grid_constant__ Stem<typename Arithmetic::T> p, Deferred deferred) {
  using T = typename Arithmetic::T;
  using Warp = WarpProduct<Arithmetic>;
  using Sums = typename Warp::Sums;
  constexpr int V = kVector<T>, kSlabs = kStemPatch / kSlab<T>;
  __shared__ StemTables tables;
  __shared__ Convolution<T> convolution;
  const Memory memory = deferred.ready();
  const Tensors<T> t = resolve(p.tensors, memory, blockIdx.z);
  const StemTiles& s = p.tiles;
  T* const buffers = reinterpret_cast<T*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, base = thread / 32 * 32;
  const int first = static_cast<int>(blockIdx.x) * p.tiles_of_block;
  const int end = std::min(first + p.tiles_of_block, s.tiles);
  const int n0 = static_cast<int>(blockIdx.y) * kStemColumns;

  copy_tile(s, s.tile(first), t.x[0], buffers);
  commit_copies();
  fill_tables(s, tables);
  for (int i = s.patch * kStemColumns + thread; i < kStemPatch * kStemColumns; i += kForwardThreads) {
    convolution.matrix[i / kStemColumns][i % kStemColumns] = 0;
  }
  if constexpr (Tangent) {
    tangent_weights_of(p, t, convolution);
  } else {
    weights_of(p, t, convolution);
  }
  __syncthreads();
  const int slabs = (s.patch + kSlab<T> - 1) / kSlab<T>;
  auto weights = [&](int column, int k, T(&block)[V][V]) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const auto v = *reinterpret_cast<const Vector<T>*>(&convolution.matrix[k + e][column]);
#pragma unroll
      for (int x = 0; x < V; ++x) block[x][e] = v.element[x];
    }
  };
  const typename Warp::template Held<kSlabs, decltype(weights)> held(weights, slabs, lane);
  const Epilogue<T, Tangent> epilogue(p, t);
  const bool rows_exist = stem_pixel(s, base).window < s.outputs();

#pragma unroll 1
  for (int number = first; number < end; ++number) {
    wait_copies<0>();
    __syncthreads();
    if (number + 1 < end) {
      copy_tile(s, s.tile(number + 1), t.x[0], buffers + (number + 1 - first) % 2 * s.elements());
      commit_copies();
    }
    if (rows_exist) {
      const StemTiles::Tile tile = s.tile(number);
      const T* const image = buffers + (number - first) % 2 * s.elements() + s.skew(tile);
      auto patches = [&](int pixel, int k, T(&block)[V][V]) {
        read_block(image, tables.row + base + pixel, tables.tap + k, block);
      };
      Sums sums;
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        if (slab < slabs) Warp::multiply(patches, held, slab, lane, sums);
      }
      /// f(element of y, existing channels) for V channels of the output in row r of this thread's sums.
      auto at_output = [&](int r, int c, auto f) {
        const int own = stem_pixel(s, base + Sums::row(lane, r)).window;
        const int output = own < s.outputs() ? s.output(tile, tables.output[own]) : -1;
        const int column = n0 + Sums::column(lane, c), left = p.n - column;
        if (output >= 0 && left > 0) f(static_cast<int64_t>(output) * p.n + column, left);
      };
#pragma unroll
      for (int c = 0; c < Sums::kColumns; c += V) {
        const T* const bias = convolution.bias + Sums::column(lane, c);
        if (s.pool == 2) {
#pragma unroll
          for (int r = 0; r < Sums::kRows; r += 4) {
            T members[4][V];
#pragma unroll
            for (int i = 0; i < 4 * V; ++i) members[i / V][i % V] = sums.at(r + i / V, c + i % V);
            at_output(r, c, [&](int64_t at, int left) { epilogue.apply(members, bias, at, left); });
          }
        } else {
#pragma unroll
          for (int r = 0; r < Sums::kRows; ++r) {
            T members[1][V];
#pragma unroll
            for (int e = 0; e < V; ++e) members[0][e] = sums.at(r, c + e);
            at_output(r, c, [&](int64_t at, int left) { epilogue.apply(members, bias, at, left); });
          }
        }
      }
      if (!Tangent && p.curved) {
        with_activation(p.function, [&]<Function F>() {
          if constexpr (FunctionDeclaration<F>::in_megakernel) {
#pragma unroll 1
            for (int i = 0; i < Sums::kRows * Sums::kColumns / V; i += s.pool == 2 ? 4 : 1) {
              at_output(i % Sums::kRows, i / Sums::kRows * V,
                        [&](int64_t at, int left) { epilogue.template evaluate_curved<F>(at, left); });
            }
          }
        });
      }
    }
  }
}

}  // namespace

template <class T>
void stem_forward(const Launcher& launch, const Layer& l, const Tensors<T>& t, bool tangent) {
  const Stem<T> p(l, t, kMostBlocks);
  const StemTiles& s = p.tiles;
  const double pixels = static_cast<double>(l.n * l.out.h * l.out.w * s.pool * s.pool);
  note([&] {  // with a pool, y has a quarter of the pixels; its places are bytes
    const int reads = tangent && (p.curved || !p.kink.is_identity());
    return product_work<T>(pixels, p.n, s.patch, 1, l.n * size(l.in), p.outputs * (1 + reads)) +
           traffic<T>(p.curved ? 2 * p.outputs : 0, 1) + bytes(l.pooled ? p.outputs : 0);
  });
  with_arithmetic<T>(l.precision, [&]<class Arithmetic>() {
    launch(tangent ? "stem forward tangent" : "stem forward",
           tangent ? stem_forward_kernel<Arithmetic, true> : stem_forward_kernel<Arithmetic, false>,
           {p.blocks(), blocks_for(p.n, kStemColumns)}, kForwardThreads, 2 * s.elements() * sizeof(T), p,
           launch.memory);
  });
}

template void stem_forward<float>(const Launcher&, const Layer&, const Tensors<float>&, bool);
template void stem_forward<double>(const Launcher&, const Layer&, const Tensors<double>&, bool);

}  // namespace maml::cuda
