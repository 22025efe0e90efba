// The backward pass of the stem (stem.h) and its tangent, one launch each. The sums D = sum g p over the
// pixels are a product:
//
//   C [m, n] = D     m: element of a patch;  n: channel;  k: pixel
//   A [m, k]         the patches, read from a tile of the image (stem_tiles.h)
//   B [k, n]         g, computed from the cotangent of y while it is read: f'(u) grad_y at the place that the
//                    pool chose, zero at the other pixels of its window
//
// Every block goes through its tiles; a warp takes every kWarps-th slab of a tile's pixels. At the end the
// block adds up its warps in order and writes its part, [patch + 1, n] with sum g as the last row. The last
// block to arrive for a task and its channels (run/last_block.h) adds up the parts in order and computes the
// gradients (stem_channels.h). Where the next thing to do is a step with the gradients of all layers, further
// blocks take it (step_after.h).
//
// blockIdx: x part of the tiles, y 32 channels, z task. Shared memory: two tiles, or a [33, 32] matrix for
// each warp, whichever is larger (dynamic). Numerics: the sums sum g are of type T, whatever the arithmetic
// of the product. The order of all sums depends on the shape of the layer alone.
#include "cuda/product/tile_statistics.h"
#include "cuda/run/last_block.h"
#include "cuda/run/work.h"
#include "cuda/stem_channels.h"
#include "cuda/stem_product.h"
#include "cuda/step_after.h"

namespace maml::cuda {
namespace {

constexpr int kWarps = kSmallTiles ? 2 : 8, kBackwardThreads = 32 * kWarps;
// Blocks of a task for 32 channels: with 4 tasks two on each of 132 multiprocessors. More would make the sum
// over the parts longer: each thread of the last block reads 4 elements of every part.
constexpr int64_t kMostBlocks = kSmallTiles ? 3 : 64;
constexpr int kPartRows = kStemPatch + 1;  // of a warp's sums in shared memory
template <class T>
constexpr int kResidentBackward = sizeof(T) == 4 ? 2 : 1;

/// The cotangent before the pool, in V x V blocks of (channel, pixel), and its sums over the pixels.
template <class T, bool Tangent, int Columns>
struct Cotangent {
  static constexpr int V = kVector<T>;
  const Stem<T>& p;
  const Tensors<T>& t;
  StemSaved<T> saved;
  const StemTables& tables;
  const int n0;
  StemTiles::Tile tile{};
  T sums[Columns] = {};

  /// g of V channels of one output.
  __device__ __forceinline__ void read(int64_t at, int left, T (&g)[V]) const {
    T factor[V];
    get((Tangent ? t.grad_y_dot : t.grad_y) + at, g, left, p.vectors);
    if (!p.curved) {
      if (p.kink.is_identity()) return;
      get(t.y + at, factor, left, p.vectors);
#pragma unroll
      for (int x = 0; x < V; ++x) g[x] *= p.kink.slope(factor[x]);
      return;
    }
    get(saved.slope + at, factor, left, p.vectors);
#pragma unroll
    for (int x = 0; x < V; ++x) g[x] *= factor[x];
    if (!Tangent || !t.grad_y) return;
    T primal[V];
    get(t.saved_dot + at, factor, left, p.vectors);
    get(t.grad_y + at, primal, left, p.vectors);
#pragma unroll
    for (int x = 0; x < V; ++x) g[x] += factor[x] * primal[x];
  }

  __device__ __forceinline__ void block(int index, int pixel, T (&g)[V][V]) {
    const int column = n0 + index, left = p.n - column;
    T values[V];
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const auto [own, member] = stem_pixel(p.tiles, pixel + e);
      int output = -1;
      if (left > 0 && own < p.tiles.outputs()) output = p.tiles.output(tile, tables.output[own]);
      const int64_t at = static_cast<int64_t>(output) * p.n + column;
      if (output < 0) {
#pragma unroll
        for (int x = 0; x < V; ++x) g[x][e] = 0;
        continue;
      }
      if (p.tiles.pool == 1) {
        read(at, left, values);
#pragma unroll
        for (int x = 0; x < V; ++x) g[x][e] = values[x];
        continue;
      }
      // The V pixels belong to one window.
      read(at, left, values);
      const auto chosen = Members<T>::read(saved.places + at, left, p.vectors);
#pragma unroll
      for (int x = 0; x < V; ++x) {
#pragma unroll
        for (int j = 0; j < V; ++j) g[x][j] = chosen.member[x] == member + j ? values[x] : T(0);
      }
      break;
    }
#pragma unroll
    for (int i = 0; i < Columns; ++i) {  // constant indices: the sums stay in registers
      if (i / V != index / (8 * V)) continue;
#pragma unroll
      for (int e = 0; e < V; ++e) sums[i] += g[i % V][e];
    }
  }
};

/// What the last block knows of its channels: D [patch] and the sum of g.
template <class T>
struct PatchSums {
  StemMatrix<T> D;
  T g[kStemColumns];
};

template <class T>
__device__ __forceinline__ void gradients(const Stem<T>& p, const Tensors<T>& t, const PatchSums<T>& sums,
                                          ChannelMemory<T, kWarps>& shared) {
  const StemChannels<T, kWarps> ch(p, t, shared);
  auto D = [&](int e) { return static_cast<double>(sums.D[e][ch.column]); };
  double sum[1];
  ch.sum(sum, [&](int, int e, double (&to)[1]) { to[0] += ch.w(e) * D(e); });
  if (!ch.active) return;
  const double G1 = static_cast<double>(sums.g[ch.column]);
  const double s = ch.saved.s[ch.channel], a = ch.gamma() * s;
  const double G2 = s * (sum[0] - ch.saved.mu[ch.channel] * G1);
  ch.each([&](int, int e) {
    const double v = D(e) - G1 * ch.pbar[e] - s * G2 * ch.saved.Gw[ch.at(e)];
    ch.saved.D[ch.at(e)] = sums.D[e][ch.column];
    give(t.grad_w[0], ch.at(e), a * v, t.add_w[0]);
  });
  if (ch.row > 0) return;
  ch.saved.G1[ch.channel] = sums.g[ch.column];
  ch.saved.G2[ch.channel] = G2;
  give(t.grad_w[1], ch.channel, 0, t.add_w[1]);
  give(t.grad_w[2], ch.channel, G2, t.add_w[2]);
  give(t.grad_w[3], ch.channel, G1, t.add_w[3]);
}

template <class T>
__device__ __forceinline__ void tangent_gradients(const Stem<T>& p, const Tensors<T>& t,
                                                  const PatchSums<T>& sums,
                                                  ChannelMemory<T, kWarps>& shared) {
  const StemChannels<T, kWarps> ch(p, t, shared);
  const bool moves = t.grad_y != nullptr, turns = moves && t.w_dot[0];
  auto D_dot = [&](int e) { return static_cast<double>(sums.D[e][ch.column]); };
  auto D = [&](int e) { return moves ? ch.value(ch.saved.D, ch.at(e), 0) : 0; };
  double Gw_dot[ch.kEach] = {}, sum[2];
  if (turns) ch.gram_product(t.w_dot[0], Gw_dot);
  ch.sum(sum, [&](int, int e, double (&to)[2]) {
    to[0] += ch.w(e) * D_dot(e);
    if (turns) to[1] += ch.w_dot(e) * D(e);
  });
  if (!ch.active) return;
  const StemSaved<T>& saved = ch.saved;
  const int o = ch.channel;
  const double R1 = static_cast<double>(sums.g[ch.column]), s = saved.s[o], a = ch.gamma() * s;
  const double G1 = moves ? static_cast<double>(saved.G1[o]) : 0, G2 = moves ? saved.G2[o] : 0;
  const double c = moves ? saved.c[o] : 0, Rmu = moves ? saved.Rmu[o] : 0;
  const double k = moves ? s * (ch.value(t.w_dot[2], o, 0) - a * c) : 0;
  const double R2 = s * (sum[0] - saved.mu[o] * R1 + sum[1] - Rmu * G1 - c * G2);
  ch.each([&](int i, int e) {
    const double Gw = saved.Gw[ch.at(e)];
    const double v = moves ? D(e) - G1 * ch.pbar[e] - s * G2 * Gw : 0;
    const double v_dot = D_dot(e) - R1 * ch.pbar[e] - s * (R2 - s * c * G2) * Gw - s * G2 * Gw_dot[i];
    give(t.grad_w_dot[0], ch.at(e), a * v_dot + k * v, t.add_w[0]);
  });
  if (ch.row > 0) return;
  give(t.grad_w_dot[1], o, 0, t.add_w[1]);
  give(t.grad_w_dot[2], o, R2, t.add_w[2]);
  give(t.grad_w_dot[3], o, R1, t.add_w[3]);
}

template <class Arithmetic, bool Tangent>
__global__ void __launch_bounds__(kBackwardThreads, kResidentBackward<typename Arithmetic::T>)
    stem_backward_kernel(const __grid_constant__ Stem<typename Arithmetic::T> p,
                         const __grid_constant__ StepAfter<typename Arithmetic::T> after, Deferred deferred) {
  using T = typename Arithmetic::T;
  using Warp = WarpProduct<Arithmetic>;
  using Sums = typename Warp::Sums;
  constexpr int V = kVector<T>, kSlabs = kStemRows / kSlab<T>;
  __shared__ StemTables tables;
  __shared__ PatchSums<T> total;
  __shared__ ChannelMemory<T, kWarps> channels;
  const Memory memory = deferred.ready();
  const int blocks = static_cast<int>(gridDim.x) - after.blocks,
            other = static_cast<int>(blockIdx.x) - blocks;
  if (other >= 0) {
    return step_of_others<Tangent>(resolve(after, memory, blockIdx.z),
                                   static_cast<int64_t>(other) * gridDim.y + blockIdx.y);
  }
  const Tensors<T> t = resolve(p.tensors, memory, blockIdx.z);
  const StemTiles& s = p.tiles;
  T* const shared = reinterpret_cast<T*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int first = static_cast<int>(blockIdx.x) * p.tiles_of_block;
  const int end = std::min(first + p.tiles_of_block, s.tiles);
  const int n0 = static_cast<int>(blockIdx.y) * kStemColumns;

  copy_tile(s, s.tile(first), t.x[0], shared);
  commit_copies();
  fill_tables(s, tables);
  Sums sums;
  Cotangent<T, Tangent, Sums::kColumns> cotangent{p, t, p.saved(t.saved), tables, n0};
#pragma unroll 1
  for (int number = first; number < end; ++number) {
    wait_copies<0>();
    __syncthreads();
    if (number + 1 < end) {
      copy_tile(s, s.tile(number + 1), t.x[0], shared + (number + 1 - first) % 2 * s.elements());
      commit_copies();
    }
    cotangent.tile = s.tile(number);
    const T* const image = shared + (number - first) % 2 * s.elements() + s.skew(cotangent.tile);
    auto patches = [&](int element, int pixel, T(&block)[V][V]) {
      read_block(image, tables.tap + element, tables.row + pixel, block);
    };
    auto g = [&](int index, int pixel, T(&block)[V][V]) { cotangent.block(index, pixel, block); };
#pragma unroll 1
    for (int slab = warp; slab < kSlabs; slab += kWarps) {
      if (stem_pixel(s, slab * kSlab<T>).window < s.outputs()) Warp::multiply(patches, g, slab, lane, sums);
    }
  }
  __syncthreads();

  T* const mine = shared + warp * (kPartRows * kStemColumns);
#pragma unroll
  for (int r = 0; r < Sums::kRows; ++r) {
#pragma unroll
    for (int c = 0; c < Sums::kColumns; ++c) {
      mine[Sums::row(lane, r) * kStemColumns + Sums::column(lane, c)] = sums.at(r, c);
    }
  }
#pragma unroll
  for (int c = 0; c < Sums::kColumns; ++c) {
    T sum = cotangent.sums[c];
    if (Arithmetic::kMatrix) sum = over_rows<Sums>(sum);  // with Simt the four lanes have seen all pixels
    if ((lane & 3 * Sums::kRowLane) == 0) mine[kStemPatch * kStemColumns + Sums::column(lane, c)] = sum;
  }
  __syncthreads();

  const int column = lane, channel = n0 + column, rows = s.patch + 1;
  T* const parts = t.scratch;  // [blocks, patch + 1, n]
  auto part = [&](int block, int row) { return (static_cast<int64_t>(block) * rows + row) * p.n + channel; };
  auto keep = [&](int row, T sum) { (row < s.patch ? total.D[row][column] : total.g[column]) = sum; };
  for (int row = warp; row < rows; row += kWarps) {
    const T* const from = shared + (row < s.patch ? row : kStemPatch) * kStemColumns + column;
    T sum = from[0];
    for (int other = 1; other < kWarps; ++other) sum += from[other * (kPartRows * kStemColumns)];
    if (blocks == 1) {
      keep(row, sum);
    } else if (channel < p.n) {
      parts[part(static_cast<int>(blockIdx.x), row)] = sum;
    }
  }
  if (blocks > 1) {
    if (!last_to_arrive(memory.counters_of(blockIdx.z) + blockIdx.y, blocks)) return;
    constexpr int kEach = (kMostPatch + 1 + kWarps - 1) / kWarps;
    T sum[kEach] = {};
#pragma unroll 4
    for (int block = 0; block < blocks; ++block) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int row = warp + kWarps * i;
        if (row < rows && channel < p.n) sum[i] += parts[part(block, row)];
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (warp + kWarps * i < rows) keep(warp + kWarps * i, sum[i]);
    }
  }
  __syncthreads();
  if constexpr (Tangent) {
    tangent_gradients(p, t, total, channels);
  } else {
    gradients(p, t, total, channels);
  }
  if (after.blocks == 0) return;
  __syncthreads();
  const StepAfter<T> step = resolve(after, memory, blockIdx.z);
  const int width = std::min(int{kStemColumns}, p.n - n0);
  for (int j = 0; j < kMostParameters; ++j) {
    step_of_own<Tangent>(step, j, j == 0 ? s.patch : 1, p.n, n0, width);
  }
}

}  // namespace

int64_t stem_backward_scratch(const Layer& l) {
  const int64_t blocks = std::min<int64_t>(StemTiles(l, kVector<float>, false).tiles, kMostBlocks);
  return blocks * (patch_size(l.window, l.in) + 1) * l.out.c;
}

template <class T>
void stem_backward_and_step(const Launcher& launch, const Layer& l, const Tensors<T>& t, bool tangent,
                            StepAfter<T> after, const Work& of_step) {
  const Stem<T> p(l, t, kMostBlocks);
  const StemTiles& s = p.tiles;
  const double pixels = static_cast<double>(l.n * l.out.h * l.out.w * s.pool * s.pool);
  note([&] {
    const int factors = p.curved ? (tangent && t.grad_y ? 3 : 1) : !p.kink.is_identity();
    const double parts = static_cast<double>(p.blocks() > 1 ? 2 * p.blocks() * (s.patch + 1) * p.n : 0);
    Work work = product_work<T>(s.patch, p.n, pixels, 1, l.n * size(l.in), parts);
    work.bytes -= pixels * p.n * sizeof(T);  // the operand before the pool is not in memory
    return work + traffic<T>(p.outputs, 1 + factors) + bytes(l.pooled ? p.outputs : 0) + of_step;
  });
  const int64_t columns = blocks_for(p.n, kStemColumns);
  if (after.op != Op::join) {
    after.blocks = static_cast<int>(blocks_for(blocks_for(after.size, kStepRange), columns));
  }
  const int64_t matrices = kWarps * kPartRows * kStemColumns;
  const size_t shared = std::max<int64_t>(2 * s.elements(), matrices) * sizeof(T);
  with_arithmetic<T>(l.precision, [&]<class Arithmetic>() {
    launch(tangent ? "stem backward tangent" : "stem backward",
           tangent ? stem_backward_kernel<Arithmetic, true> : stem_backward_kernel<Arithmetic, false>,
           {p.blocks() + after.blocks, columns}, kBackwardThreads, shared, p, after, launch.memory);
  });
}

template void stem_backward_and_step<float>(const Launcher&, const Layer&, const Tensors<float>&, bool,
                                            StepAfter<float>, const Work&);
template void stem_backward_and_step<double>(const Launcher&, const Layer&, const Tensors<double>&, bool,
                                             StepAfter<double>, const Work&);

template <class T>
void stem_backward(const Launcher& launch, const Layer& l, const Tensors<T>& t, bool tangent) {
  stem_backward_and_step(launch, l, t, tangent, StepAfter<T>{}, Work{});
}
template void stem_backward<float>(const Launcher&, const Layer&, const Tensors<float>&, bool);
template void stem_backward<double>(const Launcher&, const Layer&, const Tensors<double>&, bool);

}  // namespace maml::cuda
