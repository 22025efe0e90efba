// recurrence: one layer of an LSTM, GRU or RNN in one direction, over all steps of a sequence (cells.h):
//
//   h_t, c_t = cell(x_t W_ih + b_ih, h_t-1 W_hh + b_hh, h_t-1, c_t-1),   t = 1 ... length
//
// Inputs: the sequence x, then h_0 and, of an LSTM, c_0; without them they are 0. Parameters: W_ih [in, gates
// hidden], W_hh [hidden, gates hidden], b_ih and b_hh, either of which may be absent. The output of a sample
// is h_1, ..., h_length, each [hidden], and then, of an LSTM, the last c. Each input has loops of its own: of
// the sequence [samples, length, in], of a state [samples, hidden]; a state may be the same for all samples.
// To go backwards in time, the loops read the sequence with a negative stride.
#pragma once

#include "layers/cells.h"
#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

/// The sizes of a recurrence.
struct RecurrenceSizes {
  int64_t n, length, in, hidden, of_sample;  // of_sample: elements of the output
  MAML_HOST_DEVICE RecurrenceSizes(const Loops& loops, int64_t samples)
      : n(samples),
        length(loops.size[1]),
        in(loops.size[2]),
        hidden(loops.y.stride[1]),
        of_sample(loops.y.size) {}
};

template <>
struct Declaration<Kind::recurrence> {
  static constexpr const char* name = "recurrence";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 1, most_inputs = 3;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t n) {
    const Shape y = output_of_loops(node, x);
    check_recurrence(node, n);
    return y;
  }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) {
    const RecurrenceSizes r(l.loops[0], l.n);
    return r.n * r.length * (r.in + r.hidden) * r.hidden * gates_of(l.cell);
  }
};

}  // namespace maml
