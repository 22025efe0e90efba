// The list of the kinds of layers. A new kind is one line in the enumeration, one include, and
// layers/<kind>.h, cpu/<kind>.cpp, cuda/<kind>.cu (docs/adding_a_layer.md); all tables are derived from
// these.
#pragma once

#include "layers/layer.h"

namespace maml {

enum class Kind : int {
  channels_last,
  flatten,
  conv2d,
  batch_norm,
  running_norm,
  group_norm,
  pointwise,
  max_pool,
  avg_pool,
  mean_pool,
  add,
  append,
  scale,
  parameter,
  target,
  view,
  move,
  windows,
  map,
  reduce,
  extreme,
  contract,
  depthwise,
  softmax,
  log_softmax,
  stop,
  recurrence,
  attention,
  gather,
  scatter,
  sort,
  dropout,
  norm_block,
  conv_block,
  patch_gram,
  stem,
  count
};

}  // namespace maml

#include "layers/add.h"
#include "layers/append.h"
#include "layers/attention.h"
#include "layers/avg_pool.h"
#include "layers/batch_norm.h"
#include "layers/channels_last.h"
#include "layers/contract.h"
#include "layers/conv2d.h"
#include "layers/conv_block.h"
#include "layers/depthwise.h"
#include "layers/dropout.h"
#include "layers/extreme.h"
#include "layers/flatten.h"
#include "layers/gather.h"
#include "layers/group_norm.h"
#include "layers/log_softmax.h"
#include "layers/map.h"
#include "layers/max_pool.h"
#include "layers/mean_pool.h"
#include "layers/move.h"
#include "layers/norm_block.h"
#include "layers/parameter.h"
#include "layers/patch_gram.h"
#include "layers/pointwise.h"
#include "layers/recurrence.h"
#include "layers/reduce.h"
#include "layers/running_norm.h"
#include "layers/scale.h"
#include "layers/scatter.h"
#include "layers/softmax.h"
#include "layers/sort.h"
#include "layers/stem.h"
#include "layers/stop.h"
#include "layers/target.h"
#include "layers/view.h"
#include "layers/windows.h"

namespace maml {

constexpr int kKinds = static_cast<int>(Kind::count);

/// f.template operator()<K>() for every kind, in the order of the enumeration, as an array.
template <class F>
constexpr auto for_each_kind(F f) {
  return [&]<int... K>(std::integer_sequence<int, K...>) {
    static_assert((Declared<static_cast<Kind>(K)> && ...),
                  "every kind is declared in layers/<kind>.h, whole");
    return std::array{f.template operator()<static_cast<Kind>(K)>()...};
  }(std::make_integer_sequence<int, kKinds>());
}

}  // namespace maml
