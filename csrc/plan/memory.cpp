// The layout of one task's workspace. Two blocks of a region share memory if their lifetimes do not overlap.
// Time counts passes: the forward pass of step i runs at time i, its backward pass at time 2 * steps - i.
#include <algorithm>

#include "layers/kinds.h"
#include "layers/registry.h"
#include "plan/packing.h"
#include "plan/stage.h"

namespace maml {
namespace {

/// Places blocks in one region: each at the first offset where it fits.
class FirstFit {
 public:
  /// The offset of a block of `size` elements that is needed from time `first` to time `last`.
  int64_t place(int64_t size, int first, int last) {
    size = whole_lines(size);
    int64_t at = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (const Block& b : blocks_) {
        if (first <= b.last && b.first <= last && at < b.at + b.size && b.at < at + size) {
          at = b.at + b.size;
          moved = true;
        }
      }
    }
    blocks_.push_back({at, size, first, last});
    extent_ = std::max(extent_, at + size);
    return at;
  }
  int64_t extent() const { return extent_; }

 private:
  struct Block {
    int64_t at, size;
    int first, last;
  };
  std::vector<Block> blocks_;
  int64_t extent_ = 0;
};

class Placement {
 public:
  Placement(Stage& stage, Data data, Keep keep, const LayerTraits& traits)
      : stage_(stage),
        data_(data),
        keep_(keep),
        traits_(traits),
        steps_(static_cast<int>(stage.steps.size())),
        end_(2 * steps_ + 1),
        tile_((stage.n - 1) / stage.tiles + 1),
        last_reader_(stage.values.size(), 0),
        in_place_(stage.values.size()) {
    for (int i = 0; i < steps_; ++i) {
      for (int input : stage.steps[i].inputs) last_reader_[input] = i;
    }
    last_reader_[stage.output] = last_reader_[stage.differentiated] = steps_;
    // A value that another one overwrites shares its buffer, and is kept as long.
    for (size_t v = 0; v < stage.values.size(); ++v) {
      const int over = stage.values[v].overwritten_by;
      if (over < 0) continue;
      last_reader_[v] = last_reader_[over];
      in_place_[over] = true;
    }
  }

  void place_all() {
    place_primals();
    if (keep_ != Keep::values) place_cotangents_and_tangents();
    if (traits_.statistics_rows) place_statistics();
    stage_.fixed_size = fixed_.extent();
    stage_.step_size = step_.extent();
    stage_.tangent_size = tangent_.extent();
  }

 private:
  int backward(int i) const { return 2 * steps_ - i; }
  int64_t elements(const Stage::Value& y) const { return y.samples ? tile_ * y.size : y.size; }
  bool has_products() const { return keep_ == Keep::products; }
  /// Whether a value of the query set may be computed before everything else.
  bool is_early(const Stage::Value& y) const { return data_ == Data::query && !y.active; }

  void place_primals() {
    int64_t constants_scratch = 0;
    for (int i = 0; i < steps_; ++i) {
      Stage::Step& step = stage_.steps[i];
      Stage::Value& y = stage_.values[step.output];
      const Layer& layer = step.layer;
      const Footprint needs = traits_.footprint(layer);
      stage_.has_constants |= !y.active;
      if (is_early(y)) constants_scratch = std::max(constants_scratch, needs.scratch);
      Layer all_samples = layer;
      all_samples.n = stage_.n * step.rows;
      stage_.work += properties(layer.kind).work(all_samples);
      stage_.scratch_size = std::max(stage_.scratch_size, needs.scratch);
      y.fixed = data_ != Data::query && !y.moving && !y.stepwise;
      const bool stays = y.fixed || has_products();
      FirstFit& region = y.fixed ? fixed_ : step_;
      const int first = stays || is_early(y) ? 0 : i;
      const int last = stays ? end_ : keep_ == Keep::values ? last_reader_[step.output] : backward(i);
      if (!in_place_[step.output]) {
        y.at = region.place(elements(y), first, last);
      }
      if (y.overwritten_by >= 0) stage_.values[y.overwritten_by].at = y.at;
      step.saved_at = region.place(needs.saved, first, !stays && keep_ == Keep::values ? i : last);
    }
    if (constants_scratch > 0) stage_.constants_scratch_at = step_.place(constants_scratch, 0, 0);
  }

  void place_cotangents_and_tangents() {
    for (int i = steps_ - 1; i >= 0; --i) {
      Stage::Step& step = stage_.steps[i];
      Stage::Value& y = stage_.values[step.output];
      if (in_place_[step.output] || !y.leads) continue;
      const int written = backward(last_reader_[step.output]);
      const bool products = has_products();
      if (data_ == Data::query ? y.active : y.moving) {
        y.grad_at = step_.place(elements(y), products ? 0 : written, products ? end_ : backward(i));
      }
      if (products && y.moving) {
        y.dot_at = tangent_.place(elements(y), i, backward(i));
        step.saved_dot_at = tangent_.place(traits_.footprint(step.layer).saved_dot, i, backward(i));
      }
      if (products && y.active) y.grad_dot_at = tangent_.place(elements(y), written, backward(i));
      if (y.overwritten_by < 0) continue;
      Stage::Value& over = stage_.values[y.overwritten_by];
      over.grad_at = y.grad_at, over.dot_at = y.dot_at, over.grad_dot_at = y.grad_dot_at;
    }
    stage_.loss_at = step_.place(elements(stage_.values[stage_.differentiated]), has_products() ? 0 : steps_,
                                 has_products() ? end_ : steps_);
  }

  /// Of convolutions whose output one normalisation with batch statistics alone reads.
  void place_statistics() {
    std::vector<int> readers(stage_.values.size(), 0);
    std::vector<int> writer(stage_.values.size(), -1);
    for (int i = 0; i < steps_; ++i) {
      for (int input : stage_.steps[i].inputs) ++readers[input];
      writer[stage_.steps[i].output] = i;
    }
    ++readers[stage_.output];
    for (int i = 1; i < steps_; ++i) {
      const Stage::Step& norm = stage_.steps[i];
      if (norm.layer.kind != Kind::batch_norm && norm.layer.kind != Kind::norm_block) continue;
      const int input = norm.inputs[0], from = writer[input];
      if (from < 0 || readers[input] != 1) continue;
      const Layer& convolution = stage_.steps[from].layer;
      if (convolution.kind != Kind::conv2d) continue;
      Stage::Value& y = stage_.values[input];
      const Image& image = convolution.out;
      const int64_t rows = traits_.statistics_rows(convolution);
      const int64_t tiles = (stage_.n * image.h * image.w + rows - 1) / rows;
      y.statistics_at = y.fixed ? fixed_.place(tiles * 2 * image.c, 0, end_)
                                : step_.place(tiles * 2 * image.c, is_early(y) ? 0 : from, i);
      if (y.dot_at != kNowhere) y.statistics_dot_at = tangent_.place(tiles * 3 * image.c, from, i);
    }
  }

  Stage& stage_;
  const Data data_;
  const Keep keep_;
  const LayerTraits& traits_;
  const int steps_, end_;
  const int64_t tile_;            // samples of the largest tile
  std::vector<int> last_reader_;  // of each value, the last step that reads it; of the prediction, `steps`
  std::vector<bool> in_place_;    // of each value, whether it is computed over another one
  FirstFit fixed_, step_, tangent_;
};

}  // namespace

void place_values(Stage& stage, Data data, Keep keep, const LayerTraits& traits) {
  Placement(stage, data, keep, traits).place_all();
}

}  // namespace maml
