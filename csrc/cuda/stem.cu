// The passes of the stem (stem.h): one launch each. The twin on the CPU is cpu/stem.cpp.
#include "cuda/implement.h"
#include "cuda/stem.h"

namespace maml::cuda {

// A counter for every block of channels; the last two are patch_gram's.
static_assert(kMostStemFilters / kStemColumns <= kCounters - 2);

template <class T>
Stem<T>::Stem(const Layer& l, const Tensors<T>& t, int64_t most_blocks)
    : tiles(l, kVector<T>, is_planar(t.x[0])),
      tensors(t),
      constants(l),
      function(l.function),
      kink(l),
      eps(l.eps),
      n(int32(l.out.c)),
      tiles_of_block(int32(blocks_for(tiles.tiles, std::min<int64_t>(tiles.tiles, most_blocks)))),
      curved(is_curved(l)),
      vectors(true),
      outputs(l.n * size(l.out)) {
  for (const T* tensor :
       {static_cast<const T*>(t.y), static_cast<const T*>(t.y_dot), t.grad_y, t.grad_y_dot}) {
    if (tensor) vectors = vectors && in_vectors(tensor, n);
  }
}
template struct Stem<float>;
template struct Stem<double>;

template <>
struct OnGpu<Kind::stem> {
  static Footprint footprint(const Layer& l) {
    refuse_large(l);
    const int64_t outputs = l.n * size(l.out), curved = is_curved(l) ? outputs : 0;
    return {StemSaved<float>::size(patch_size(l.window, l.in), l.out.c, curved, l.pooled ? outputs : 0),
            stem_backward_scratch(l), curved};
  }
  template <class T>
  static LaunchPasses<T> passes() {
    return {
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          stem_forward(launch, l, t, false);
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          stem_backward(launch, l, t, false);
        },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) { stem_forward(launch, l, t, true); },
        [](const Launcher& launch, const Layer& l, const Tensors<T>& t) {
          stem_backward(launch, l, t, true);
        }};
  }
};
template struct Implementation<Kind::stem>;

}  // namespace maml::cuda
