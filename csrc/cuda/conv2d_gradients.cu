// Both gradients of a convolution in one launch: some blocks compute grad_w and grad_b
// (conv2d_weight_gradient.h), the others grad_x (conv2d_input_gradient.h). A block's role follows from its
// index. Neither part waits for the other, so that one fills the multiprocessors that the other leaves idle;
// and the chain of launches is shorter by one for each layer.
//
// On GPUs with wgmma, conv2d_raster_gradients.cu computes those that it serves.
//
// All blocks have the same tile, and parts of k of about the same depth (cut.h). Those with longer sums come
// first. Shared memory: the larger of the two.
//
// blockIdx: x the blocks of a task; z task.
#include <optional>
#include <span>
#include <vector>

#include "cuda/conv2d_input_gradient.h"
#include "cuda/conv2d_raster_gradients.h"
#include "cuda/conv2d_weight_gradient.h"
#include "cuda/moments.h"
#include "cuda/run/work.h"

namespace maml::cuda {
namespace {

template <class T>
struct Gradients {
  WeightGradient<T> weight;
  InputGradient<T> input;
  int weight_blocks, input_blocks;
  bool weight_first;
};
static_assert(sizeof(Gradients<double>) <= 4000);  // 4 KB of kernel parameters

template <class Arithmetic, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kResidentProducts<Arithmetic, Tile>)
    gradients_kernel(const __grid_constant__ Gradients<typename Arithmetic::T> p,
                     const __grid_constant__ Deferred deferred) {
  const Memory& memory = deferred.ready();
  const int block = static_cast<int>(blockIdx.x);
  const int first = p.weight_first ? p.weight_blocks : p.input_blocks;
  const int own = block < first ? block : block - first;
  if ((block < first) == p.weight_first) {
    weight_gradient_block<Arithmetic, Tile>(p.weight, memory, blockIdx.z, own);
  } else {
    input_gradient_block<Arithmetic, Tile>(p.input, memory, blockIdx.z, own);
  }
}

template <class Arithmetic, class Tile>
constexpr int kGradientsShared =
    std::max(WeightProduct<Arithmetic, Tile>::kSharedBytes, InputProduct<Arithmetic, Tile>::kSharedBytes);

/// The product of the weight gradient. Where only grad_b is wanted, one row of tiles is computed and dropped.
Extent weight_extent(const Layer& l, bool wanted) {
  const int64_t outputs = l.n * l.out.h * l.out.w, pixels = l.pooled ? window_rows(outputs) : outputs;
  return {wanted ? l.window.kernel_h * l.window.kernel_w * l.in.c : 1, l.out.c, pixels};
}

using Weight = std::optional<Extent>;

/// The products of one launch.
struct GradientProducts {
  Weight weight;
  std::span<const ParityClass> classes;

  std::vector<Extent> extents() const {
    std::vector<Extent> all;
    if (weight) all.push_back(*weight);
    for (const ParityClass& c : classes) all.push_back(c.extent());
    return all;
  }
};

/// The launches of a pass: one, unless the stride has more parity classes than fit.
std::vector<GradientProducts> launches_of(Weight weight, const std::vector<ParityClass>& classes) {
  std::vector<GradientProducts> launches;
  for (size_t first = 0; first < classes.size() || (first == 0 && weight); first += kMostClasses) {
    const size_t count = std::min<size_t>(kMostClasses, classes.size() - first);
    launches.push_back({first == 0 ? weight : Weight(), {classes.data() + first, count}});
  }
  return launches;
}

constexpr int64_t kBiasColumns = 64;  // a multiple of every tile's columns

template <class T>
WeightGradient<T> weight_part(const Layer& l, const WeightTerms<T>& wanted) {
  WeightGradient<T> p{};
  p.a.gather = patch_gather<T>(l);
  p.b = {p.a.gather.pixels, static_cast<int>(l.out.c)};
  p.terms = wanted.terms;
  p.terms.vectors_a = in_vectors(p.terms.a, p.terms.count, l.in.c);
  p.terms.vectors_b = in_vectors(p.terms.b, p.terms.count, l.out.c);
  p.grad_w = wanted.grad_w, p.grad_b = wanted.grad_b;
  p.add_w = wanted.add_w, p.add_b = wanted.add_b;
  p.vectors_w = in_vectors(p.grad_w, l.out.c);
  return p;
}

template <class T>
InputGradient<T> input_part(const Layer& l, const InputTerms<T>& wanted) {
  InputGradient<T> p{};
  p.terms = wanted.terms;
  p.terms.vectors_a = p.terms.vectors_b =
      in_vectors(p.terms.a, p.terms.count, l.out.c) && in_vectors(p.terms.b, p.terms.count, l.out.c);
  p.grad_x = wanted.grad_x, p.add = wanted.add;
  p.vectors_x = in_vectors(p.grad_x, l.in.c);
  return p;
}

}  // namespace

int64_t gradients_scratch(const Layer& l) {
  int64_t most = 0;
  // Whichever gradients are wanted: where there is one less, k of the others is split further.
  for (const Weight& weight : {Weight(weight_extent(l, true)), Weight(weight_extent(l, false)), Weight()}) {
    for (const auto& classes : {parity_classes(l, false), parity_classes(l, true), {}}) {
      for (const GradientProducts& products : launches_of(weight, classes))
        most = std::max(most, split_scratch(l, products.extents()));
    }
  }
  if (most > 0) most += kMostPartsOfK * blocks_for(l.out.c, kBiasColumns) * kBiasColumns;
#if MAML_RASTER_GRADIENTS
  most = std::max(most, raster_gradients_scratch(l));
#endif
  return most + cotangent_sums_scratch(l);
}

bool sums_cotangent(const Layer& convolution, const Layer& norm) {
  const Image &x = convolution.in, &y = norm.out;
  if (convolution.kind != Kind::conv2d) return false;
  const bool same = convolution.n == norm.n && x.c == y.c && x.h == y.h && x.w == y.w;
  const bool straight = norm.kind == Kind::batch_norm ||
                        (norm.kind == Kind::norm_block &&
                         (norm.function == Function::relu || norm.function == Function::leaky_relu));
  return same && straight && cotangent_sums_scratch(convolution) > 0;
}

/// Where all rows are one tile, the normalisation needs no launch for its sums.
int64_t cotangent_sums_scratch(const Layer& l) {
  const bool one_launch = l.window.stride_h * l.window.stride_w <= kMostClasses;
  if (!one_launch || tiles_of(l.n * l.in.h * l.in.w) == 1) return 0;
  const int64_t tiles = most_tile_sums(l);
  return blocks_for(2 * l.in.c * (tiles + blocks_for(tiles, kFold)), kBiasColumns) * kBiasColumns;
}

template <class T>
CotangentSums<T> gradients(const Launcher& launch, const char* name, const Layer& l,
                           const WeightTerms<T>& weight, const InputTerms<T>& input, T* scratch,
                           const Normalised<T>* norm) {
#if MAML_RASTER_GRADIENTS
  if constexpr (std::is_same_v<T, float>) {
    if (const auto sums = raster_gradients(launch, name, l, weight, input, scratch, norm)) return *sums;
  }
#endif
  const std::vector<ParityClass> classes =
      input.grad_x ? parity_classes(l, input.add) : std::vector<ParityClass>();
  const Weight of_weight =
      weight.grad_w || weight.grad_b ? Weight(weight_extent(l, weight.grad_w)) : Weight();
  Gradients<T> p{weight_part(l, weight), input_part(l, input), 0, 0, false};
  CotangentSums<T> sums{};
  T* const parts = scratch + (norm ? cotangent_sums_scratch(l) : 0);
  for (const GradientProducts& products : launches_of(of_weight, classes)) {
    const std::vector<Extent> extents = products.extents();
    with_arithmetic<T>(l.precision, [&]<class Arithmetic>() {
      const Cut cut(Arithmetic::kMatrix, extents);
      SplitPlacer splits;
      p.weight_blocks = p.input_blocks = p.input.count = 0;
      if (products.weight) {
        p.weight.split = splits.place(cut, *products.weight);
        p.weight_blocks = static_cast<int>(cut.size.tiles(*products.weight)) * p.weight.split.parts;
      }
      for (const ParityClass& c : products.classes) {
        ParityClass& own = p.input.classes[p.input.count++] = c;
        own.split = splits.place(cut, c.extent());
        own.first_block = p.input_blocks;
        p.input_blocks += static_cast<int>(cut.size.tiles(c.extent())) * own.split.parts;
      }
      p.weight_first = p.input.count == 0 || p.weight.split.depth > p.input.classes[0].split.depth;
      if (norm) sums = place_sums(l, p.input, cut.size, *norm, scratch);
      p.weight.parts = p.input.parts = parts;
      p.weight.bias_parts = parts + splits.slots() * cut.size.elements();
      note([&] {
        Work work = traffic<T>(splits.slots() * cut.size.elements(), 2);
        if (const Weight& w = products.weight) {
          work += product_work<T>(weight.grad_w ? w->m : 0, w->n, w->k, weight.terms.count, l.n * size(l.in),
                                  w->m * w->n);
        }
        for (const ParityClass& c : products.classes) {
          const auto [m, n, k] = c.extent();
          work += product_work<T>(m, n, k, input.terms.count, l.n * size(l.out), m * n);
        }
        if (norm) work += work_of_sums(l, *norm);
        return work;
      });
      with_tile<Arithmetic>(cut.tile, [&]<class Tile>() {
        launch(name, gradients_kernel<Arithmetic, Tile>, {p.weight_blocks + p.input_blocks}, Tile::kThreads,
               kGradientsShared<Arithmetic, Tile>, p, launch.memory);
      });
    });
  }
  return sums;
}

template CotangentSums<float> gradients<float>(const Launcher&, const char*, const Layer&,
                                               const WeightTerms<float>&, const InputTerms<float>&, float*,
                                               const Normalised<float>*);
template CotangentSums<double> gradients<double>(const Launcher&, const char*, const Layer&,
                                                 const WeightTerms<double>&, const InputTerms<double>&,
                                                 double*, const Normalised<double>*);

}  // namespace maml::cuda
