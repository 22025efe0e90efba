// The work of a small multilayer perceptron's meta-step, phase by phase, for the performance model. All
// counts are of one block:
//
//   path    cycles of the longest thread. Of a product's loop: one an instruction, and the latency of shared
//           memory for each trip (two vectors of the inner index, of an input gradient one, whose loads are
//           issued together). Outside the loops, where instructions depend on each other, kCyclesOutside
//   issued  instructions of all warps; a multiprocessor issues four a cycle
//   waves   wavefronts of shared memory, one a cycle: 128 bytes of loads by its lanes
//
// A phase takes the longest of path, issued / 4 and waves, and its barrier, which is a constant of the model.
// The loops are counted from the source; the instructions around them in the machine code for sm_90a.
#pragma once

#include "cuda/run/small_mlp_tiles.h"
#include "cuda/run/work.h"

namespace maml::cuda {

inline constexpr double kLoadLatency = 30;  // cycles of a load from shared memory, as published for sm_90
/// Instructions of a tile outside its loop, and their cycles at two each: a scheduler has one or two warps,
/// and a result takes four cycles or more. 120 before the loop (fields of the layer, indices, addresses), 130
/// after it (sums of halves, function, update, stores).
inline constexpr double kOutside = 250, kCyclesOutside = 500;
/// Of 16-byte loads, on average (test_bank_conflicts.cpp): half more for those of a weight whose rows have
/// ten vectors, nothing for those of samples.
inline constexpr double kConflicts = 1.3;
inline constexpr double kFunctionCycles = 200;  // of an element of a function that bends
inline constexpr double kLossCycles = 600;      // of cross entropy: two trees of shuffles, exp, log

struct MlpWork {
  Work work;

  /// Threads with `trips` trips each, of 16-byte and single loads and multiply-adds; and `outputs` shuffled
  /// sums. A thread that has one sum waits four cycles for each of its multiply-adds.
  void add(int64_t threads, double trips, double vector_loads, double scalar_loads, double products,
           int outputs) {
    const auto warps = static_cast<double>(blocks_for(threads, kWarp));
    const auto rounds = static_cast<double>(blocks_for(threads, kMlpThreads));
    const double instructions = trips * (vector_loads + scalar_loads + products + 4) + 2 * outputs;
    const double waits =
        trips * (kLoadLatency + (outputs == 1 ? 3 * products : 0)) + (outputs ? kLoadLatency : 0);
    path_ = std::max(path_, rounds * (kCyclesOutside + instructions + waits));
    issued_ += warps * (kOutside + instructions);
    waves_ += trips * (vector_loads * static_cast<double>(threads) / 8 * kConflicts + scalar_loads * warps) +
              outputs * warps;
  }
  void end_phase(double more_cycles = 0) {
    const double busy = std::max(issued_ / 4, waves_);
    work.cycles += std::max(path_, busy) + more_cycles, work.busy_cycles += busy;
    ++work.phases;
    path_ = issued_ = waves_ = 0;
  }

 private:
  double path_ = 0, issued_ = 0, waves_ = 0;
};

/// Trips of each half of a warp.
inline double trips_of(int terms, int vectors) {
  return static_cast<double>(blocks_for(terms == 1 ? blocks_for(vectors, 2) : vectors, 2));
}

template <class T>
void add_forward(const MlpLayer& l, bool is_last, int n, int terms, MlpWork& to) {
  constexpr int V = kVector<T>;
  if (is_last && 2 * l.out <= V) {
    to.add(int64_t{2} * n * l.out, trips_of(terms, l.depth), 2, 2 * V, 2 * V, 1);
  } else {
    to.add(2 * blocks_for(n, kTileRows) * l.out_vectors, trips_of(terms, l.depth), 2 * (kTileRows + V), 0,
           2 * kTileRows * V * V, kTileRows * V);
  }
  to.work.flop += 2.0 * terms * n * l.in * l.out;
  to.end_phase();
}

template <class T>
void add_backward(const MlpLayer& l, bool has_before, int n, bool is_product, MlpWork& to) {
  constexpr int V = kVector<T>;
  const BackwardThreads threads(l, has_before, n);
  const int weight_terms = is_product && has_before ? 2 : 1, input_terms = is_product ? 2 : 1;
  if (has_before) {
    const int vectors = is_product ? l.out_vectors : (l.out_vectors + 1) / 2;
    to.add(threads.inputs, vectors, kTileRows + V, 0, kTileRows * V * V, kTileRows * V);
    to.work.flop += 2.0 * input_terms * n * l.in * l.out;
  }
  to.add(threads.count - threads.inputs, weight_terms * static_cast<double>(blocks_for(n, 2)), 4, 0,
         2 * V * V, 0);
  to.work.flop += 2.0 * weight_terms * n * l.in * l.out;
  to.end_phase();
}

template <class T>
void add_pass(const SmallMlp& net, int n, bool is_product, MlpWork& to) {
  for (int l = 0; l < net.layers; ++l) {
    add_forward<T>(net.layer[l], l == net.layers - 1, n, is_product && l > 0 ? 2 : 1, to);
    if (!net.layer[l].bends || is_product) continue;
    to.end_phase(static_cast<double>(blocks_for(n * net.layer[l].out, kMlpThreads)) * kFunctionCycles);
  }
  if (net.loss == Loss::cross_entropy) to.end_phase(kLossCycles);
  for (int l = net.layers - 1; l >= 0; --l) add_backward<T>(net.layer[l], l > 0, n, is_product, to);
}

template <class T>
Work work_of(const Problem& p, const SmallMlp& net) {
  MlpWork to;
  to.work = traffic_of_task<T>(p);
  for (int k = 0; k < net.steps; ++k) add_pass<T>(net, net.support.n, false, to);
  add_pass<T>(net, net.query.n, false, to);
  for (int k = 0; net.second_order && k < net.steps; ++k) add_pass<T>(net, net.support.n, true, to);
  // Zeros, then the loads, and zeros of the tangents: a store a thread for each vector, some 20 instructions
  // a loaded element.
  const double loaded = static_cast<double>(p.packing.total + p.support.n * (net.layer[0].in + 1) +
                                            p.query.n * (net.layer[0].in + 1));
  to.end_phase(static_cast<double>(net.size) / (kVector<T> * 8));
  to.end_phase(loaded / kMlpThreads * 20 * 2);
  if (net.second_order) to.end_phase(static_cast<double>(net.shared_size) / (kVector<T> * 8));
  return to.work;
}

}  // namespace maml::cuda
