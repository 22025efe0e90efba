// Both gradients of a 3 x 3 convolution in one launch, by wgmma (product/wgmma.h), for bf16 and bf16x3. The
// portable kernels (conv2d_gradients.cu) copy every pixel once for each tap and round it again in every warp.
// Here a block copies the pixels of a tile once, rounded or split, and all taps read this copy
// (product/raster.h), so that the loop over taps and channels is matrix instructions alone.
//
//   input    C [m, n] = grad_x     m: position of a parity class; n: c_in; sums over (tap, c_out)
//            A: grad_y along k, one start for each tap; B: w [tap, c_in, c_out] along k
//   weight   C [m, n] = grad_w of one tap     m: c_in; n: c_out; sums over positions
//            A: x along MN, one start for each tap; B: grad_y along MN
//
// Channels are cut into tiles of C = 32 or 64. Where C is 32 and there are two parts, hi and lo stand behind
// each other as one matrix of 64 columns or rows: an instruction with n = 64 takes as long as its operands
// take to read, one with n = 32 less than that. So A [hi | lo] gives two products of an input gradient at
// once, and [hi | lo]^T [hi | lo] all of a weight gradient, with lo lo, which is dropped.
//
// blockIdx: x the blocks of a task, those of the weight first; z task. Threads: three warpgroups. In an input
// gradient each has 64 of the block's 192 positions; in a weight gradient each has one column of taps, the
// block a row of them. A multiprocessor holds two blocks: one copies while the other multiplies.
//
// Sums over positions are split over several blocks; the last one to arrive adds up the parts in order
// (run/last_block.h). The blocks of the first row of taps and the first tile of c_in also sum grad_y: that is
// grad_b, in float32.
//
// Numerics: a warpgroup's sums over k in ascending order; of 32 channels, the products with a low part are
// added at the end; parts in order; then the value that the gradient held. Everything depends on the shapes
// of one task alone.
#include <algorithm>
#include <vector>

#include "cuda/conv2d_input_gradient.h"
#include "cuda/conv2d_raster_blocks.h"
#include "cuda/conv2d_raster_gradients.h"
#include "cuda/product/wgmma_trial.h"
#include "cuda/run/work.h"

namespace maml::cuda {
namespace {

template <class Arithmetic, int Channels>
__global__ void __launch_bounds__(kBlock, 2)
    raster_gradients_kernel(const __grid_constant__ RasterGradients p,
                            const __grid_constant__ Deferred deferred) {
  using S = RasterProduct<Arithmetic, Channels>;
  const Memory& memory = deferred.ready();
  const int block = static_cast<int>(blockIdx.x);
  if (block < p.weight_blocks) {
    weight_block<S>(p, memory, blockIdx.z, block);
  } else {
    input_block<S>(p, memory, blockIdx.z, block - p.weight_blocks);
    if (p.input.sums.entries) sum_tile<S>(p, memory);
  }
}

// --------------------------------------------------------------------------------------------- the host

/// Whether the GPU has these instructions, and they do what is expected. Its successors do not have them.
bool has_wgmma() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "asking for the compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "asking for the compute capability");
  return major == 9 && minor == 0 && wgmma_is_exact(device);
}

/// Two blocks fit a multiprocessor.
constexpr int64_t kMostShared = 112 * 1024;
/// The fewest positions of a part: below, a block is mostly the copy of its first stage.
constexpr int64_t kFewestPositions = kSmallTiles ? 32 : 512;

int64_t channels_of_tile(const Layer& l) { return l.in.c == 32 && l.out.c == 32 ? 32 : 64; }
int64_t parts_of(const Layer& l) { return l.precision == Precision::bf16x3 ? 2 : 1; }

/// One axis of a convolution in a raster.
struct RasterAxis {
  struct Tap {
    int64_t first, shift;  // the plane of x that a tap reads, and how far from the position of y
  };
  Tap taps[kTaps];
  int64_t pitch;  // positions from one image to the next

  RasterAxis(int64_t in, int64_t out, int64_t stride, int64_t pad) : pitch(out) {
    for (int64_t t = 0; t < kTaps; ++t) {
      const int64_t first = ((t - pad) % stride + stride) % stride, shift = (t - pad - first) / stride;
      taps[t] = {first, shift};
      grow(out, first < in ? (in - first - 1) / stride + 1 : 0, shift);
    }
    for (int64_t parity = 0; parity < stride; ++parity) {  // grad_x reads grad_y
      const ParityAxis of(parity, in, kTaps, stride, pad);
      for (int64_t t = 0; t < of.taps; ++t) grow(of.positions, out, of.start + t);
      pitch = std::max(pitch, of.positions);
    }
  }

 private:
  /// Makes room where `positions` of them read an image of `size`, `shift` further: what they read beyond it
  /// must be in the gap, on both sides.
  void grow(int64_t positions, int64_t size, int64_t shift) {
    pitch = std::max({pitch, positions, size, positions + shift, size - shift});
  }
};

struct RasterShape {
  RasterAxis rows, columns;
  explicit RasterShape(const Layer& l)
      : rows(l.in.h, l.out.h, l.window.stride_h, l.window.pad_top),
        columns(l.in.w, l.out.w, l.window.stride_w, l.window.pad_left) {}
  int64_t positions(const Layer& l) const { return l.n * rows.pitch * columns.pitch; }
};

/// How the sums over positions are split: by the shapes of one task.
struct PositionParts {
  int64_t depth, parts;
  PositionParts(const Layer& l, int64_t positions) {
    const int64_t stage = depth_of(channels_of_tile(l));
    const int64_t fewest = std::max(kFewestPositions, blocks_for(positions, kMostPartsOfK));
    depth = blocks_for(fewest, stage) * stage;
    parts = blocks_for(positions, depth);
  }
};

int64_t weight_tiles(const Layer& l) {
  const int64_t c = channels_of_tile(l);
  return kTaps * (l.in.c / c) * (l.out.c / c);
}

/// What this file computes, of the layers that it can: those for which it should be faster (docs/gpu.md).
bool serves(const Layer& l) {
  if (l.precision != Precision::bf16x3 && l.precision != Precision::bfloat16) return false;
  const Window& k = l.window;
  if (l.pooled || k.kernel_h != kTaps || k.kernel_w != kTaps) return false;
  if (k.stride_h > 2 || k.stride_w > 2) return false;
  const int64_t c = channels_of_tile(l);
  if (l.in.c % c != 0 || l.out.c % c != 0) return false;
  const RasterShape shape(l);
  return 2 * shape.positions(l) <= 3 * l.n * l.out.h * l.out.w && weight_tiles(l) <= kFirstFoldCounter;
}

/// Whether what is wanted can be computed at all: grad_b comes with grad_w, and every access is of 16 bytes.
bool all_in_vectors(const Layer& l, const WeightTerms<float>& weight, const InputTerms<float>& input) {
  if (weight.grad_b ? !weight.grad_w : !weight.grad_w && !input.grad_x) return false;
  const bool weights = !weight.grad_w || (in_vectors(weight.terms.a, weight.terms.count, l.in.c) &&
                                          in_vectors(weight.terms.b, weight.terms.count, l.out.c) &&
                                          in_vectors(weight.grad_w, l.out.c));
  return weights && (!input.grad_x || (in_vectors(input.terms.a, input.terms.count, l.out.c) &&
                                       in_vectors(input.terms.b, input.terms.count, l.out.c) &&
                                       in_vectors(input.grad_x, l.in.c)));
}

int64_t input_shared(const Layer& l, const RasterClass& c) {
  const int64_t parts = parts_of(l), weights = parts * channels_of_tile(l) + 2;
  return kStageChunks * kChunkBytes * (parts * chunk_distance(c.count, kStageChunks) + c.taps * weights);
}

RasterClass raster_class(const Layer& l, const RasterShape& shape, const ParityAxis& rows,
                         const ParityAxis& columns) {
  const Window& k = l.window;
  const int64_t tap_size = l.in.c * l.out.c;
  RasterClass c{};
  c.to = {int32(l.in.h),     int32(l.in.w),     int32(k.stride_h),
          int32(k.stride_w), int32(rows.first), int32(columns.first)};
  // Taps come last first: the positions of grad_y ascend.
  for (int64_t r = 0; r < rows.taps; ++r) {
    for (int64_t s = 0; s < columns.taps; ++s) {
      const int64_t row = rows.parity + (rows.taps - 1 - r) * k.stride_h;
      const int64_t column = columns.parity + (columns.taps - 1 - s) * k.stride_w;
      c.shift[c.taps] = int32((rows.start + r) * shape.columns.pitch + columns.start + s);
      c.weights[c.taps++] = int32((row * kTaps + column) * tap_size);
    }
  }
  c.lowest = c.taps > 0 ? c.shift[0] : 0;
  c.count = c.taps > 0 ? kRowsOfBlock + c.shift[c.taps - 1] - c.lowest : 0;
  c.split.tiles_m = int32(blocks_for(shape.positions(l), kRowsOfBlock));
  return c;
}

std::vector<RasterClass> raster_classes(const Layer& l, const RasterShape& shape, bool add) {
  const Window& k = l.window;
  std::vector<RasterClass> classes;
  for (int64_t a = 0; a < k.stride_h; ++a) {
    for (int64_t b = 0; b < k.stride_w; ++b) {
      const ParityAxis rows(a, l.in.h, kTaps, k.stride_h, k.pad_top);
      const ParityAxis columns(b, l.in.w, kTaps, k.stride_w, k.pad_left);
      if (rows.positions == 0 || columns.positions == 0) continue;
      if (add && (rows.taps == 0 || columns.taps == 0)) continue;
      classes.push_back(raster_class(l, shape, rows, columns));
    }
  }
  std::stable_sort(classes.begin(), classes.end(),
                   [](const RasterClass& a, const RasterClass& b) { return a.taps > b.taps; });
  return classes;
}

RasterWeight weight_of(const Layer& l, const RasterShape& shape, const WeightTerms<float>& wanted) {
  RasterWeight p{};
  const PositionParts cut(l, shape.positions(l));
  p.terms = wanted.terms;
  p.grad_w = wanted.grad_w, p.grad_b = wanted.grad_b, p.add_w = wanted.add_w, p.add_b = wanted.add_b;
  p.tiles_in = int32(l.in.c / channels_of_tile(l)), p.tiles = int32(weight_tiles(l));
  p.parts = int32(cut.parts), p.depth = int32(cut.depth);
  for (int t = 0; t < kTaps; ++t) {
    const RasterAxis::Tap &row = shape.rows.taps[t], &column = shape.columns.taps[t];
    p.first_row[t] = int32(row.first), p.row_shift[t] = int32(row.shift);
    int plane = 0;
    while (plane < p.planes && p.first_column[plane] != column.first) ++plane;
    if (plane == p.planes) {
      p.first_column[plane] = int32(column.first), p.lowest[plane] = int32(column.shift);
      ++p.planes;
    }
    p.plane[t] = plane, p.shift[t] = int32(column.shift);  // shifts ascend
  }
  return p;
}

template <class S>
int64_t weight_shared(int planes) {
  const int64_t of_x = S::kParts * S::kChunks * chunk_distance(S::kDepth + kTaps - 1, S::kChunks);
  const int64_t of_g = S::kParts * S::kChunks * chunk_distance(S::kDepth, S::kChunks);
  // Where only 32 channels of one part stand in it, a matrix of 64 rows goes on beyond them.
  const int64_t beyond = S::C == 32 && S::kParts == 1 ? of_x : 0;
  return kChunkBytes * (of_g + planes * of_x + beyond);
}

template <class F>
void with_shape(const Layer& l, F f) {
  const bool narrow = channels_of_tile(l) == 32;
  if (l.precision == Precision::bf16x3) {
    return narrow ? f.template operator()<Bf16x3, 32>() : f.template operator()<Bf16x3, 64>();
  }
  narrow ? f.template operator()<Bf16, 32>() : f.template operator()<Bf16, 64>();
}

}  // namespace

bool raster_gradients_serve(const Layer& l, const WeightTerms<float>& weight,
                            const InputTerms<float>& input) {
  return serves(l) && all_in_vectors(l, weight, input) && has_wgmma();
}

int64_t raster_gradients_scratch(const Layer& l) {
  if (!serves(l)) return 0;
  const RasterShape shape(l);
  const PositionParts cut(l, shape.positions(l));
  if (cut.parts == 1) return 0;
  const int64_t c = channels_of_tile(l);
  return cut.parts * (weight_tiles(l) * kTaps * c * c + l.out.c);
}

std::optional<CotangentSums<float>> raster_gradients(const Launcher& launch, const char* name, const Layer& l,
                                                     const WeightTerms<float>& weight,
                                                     const InputTerms<float>& input, float* scratch,
                                                     const Normalised<float>* norm) {
  if (!raster_gradients_serve(l, weight, input)) return {};
  const RasterShape shape(l);
  const Window& k = l.window;
  const int64_t tile = channels_of_tile(l);
  RasterGradients p{};
  p.raster = Raster(l.n, shape.rows.pitch, shape.columns.pitch);
  p.x = {int32(l.in.h), int32(l.in.w), int32(k.stride_h), int32(k.stride_w), 0, 0};
  p.y = {int32(l.out.h), int32(l.out.w), 1, 1, 0, 0};
  p.c_in = int32(l.in.c), p.c_out = int32(l.out.c);
  int64_t elements_of_parts = 0, shared = 0;
  if (weight.grad_w) {
    p.weight = weight_of(l, shape, weight);
    p.weight_blocks = p.weight.tiles * p.weight.parts;
    if (p.weight.parts > 1) elements_of_parts = p.weight_blocks * kTaps * tile * tile;
    p.weight.memory = scratch + (norm ? cotangent_sums_scratch(l) : 0);
    p.weight.bias_memory = p.weight.memory + elements_of_parts;
  }
  int input_blocks = 0;
  if (input.grad_x) {
    p.input.terms = input.terms, p.input.grad_x = input.grad_x, p.input.add = input.add;
    for (const RasterClass& c : raster_classes(l, shape, input.add)) {
      RasterClass& own = p.input.classes[p.input.count++] = c;
      own.first_block = input_blocks;
      input_blocks += own.split.tiles_m * int32(l.in.c / tile);
      shared = std::max(shared, input_shared(l, own));
    }
    if (shared > kMostShared) return {};
  }
  CotangentSums<float> sums{};
  if (norm) sums = place_sums<float>(l, p.input, {kRowsOfBlock, tile}, *norm, scratch);
  note([&] {
    Work work = traffic<float>(elements_of_parts, 2);
    if (weight.grad_w) {
      const int64_t patch = kTaps * kTaps * l.in.c, pixels = l.n * l.out.h * l.out.w;
      work +=
          product_work<float>(patch, l.out.c, pixels, weight.terms.count, l.n * size(l.in), patch * l.out.c);
    }
    if (input.grad_x) {
      for (const ParityClass& c : parity_classes(l, input.add)) {
        const auto [m, n, depth] = c.extent();
        work += product_work<float>(m, n, depth, input.terms.count, l.n * size(l.out), m * n);
      }
    }
    if (norm) work += work_of_sums<float>(l, *norm);
    return work;
  });
  with_shape(l, [&]<class Arithmetic, int Channels>() {
    using S = RasterProduct<Arithmetic, Channels>;
    const int64_t sums_of_threads = int64_t{2} * kBlock * static_cast<int64_t>(sizeof(Vector<float>));
    const int64_t bytes =
        std::max({shared, weight.grad_w ? weight_shared<S>(p.weight.planes) : 0, sums_of_threads});
    launch(name, raster_gradients_kernel<Arithmetic, Channels>, {p.weight_blocks + input_blocks}, kBlock,
           static_cast<size_t>(bytes), p, launch.memory);
  });
  return sums;
}

}  // namespace maml::cuda
