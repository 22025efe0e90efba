// The chunked executor on the host: which problems it serves, and the choice of a kernel.
#include "cuda/run/chunk_kernel.h"
#include "cuda/run/on_device.h"
#include "layers/kinds.h"

namespace maml::cuda {
namespace {

/// The stage's layers as a chain, if they are one.
std::optional<Chain> layers_of(const Problem& p, const Stage& stage) {
  Chain chain;
  chain.adapted = p.packing.adapted;
  chain.precision = p.graph.precision;
  std::vector<bool> read(p.graph.parameters.size(), false);
  auto offset = [&](int parameter) {
    read[parameter] = true;
    return p.packing.at[parameter];
  };
  int value = 0;
  for (const Stage::Step& step : stage.steps) {
    const Layer& l = step.layer;
    const int in = static_cast<int>(l.in.c), out = static_cast<int>(l.out.c);
    const bool features = l.in.h * l.in.w == 1 && l.out.h * l.out.w == 1 && step.rows == 1;
    const bool narrow = in <= kMostChainWidth && out <= kMostChainWidth;
    if (!features || !narrow || step.inputs.size() != 1 || step.inputs[0] != value || chain.appended > 0)
      return {};
    value = step.output;
    ChainLayer* const last = chain.count > 0 ? &chain.layers[chain.count - 1] : nullptr;
    if (l.kind == Kind::conv2d) {
      const bool one_tap =
          l.window.kernel_h * l.window.kernel_w == 1 && l.window.pad_top + l.window.pad_left == 0;
      if (!one_tap || chain.count == kMostChainLayers || step.add_w[0] || step.add_w[1]) return {};
      const int bias = step.parameters.size() > 1 ? step.parameters[1] : -1;
      chain.add(in, out, offset(step.parameters[0]), bias < 0 ? -1 : offset(bias));
    } else if (l.kind == Kind::pointwise && last && !last->has_function && in_megakernel(l.function)) {
      last->has_function = true, last->function = l.function, last->constants = l;
    } else if (l.kind == Kind::append && last && !step.add_w[0]) {
      chain.appended = out - in, chain.append = offset(step.parameters[0]), chain.floor = l.a;
    } else {
      return {};
    }
  }
  const bool reads_all = std::all_of(read.begin(), read.end(), [](bool r) { return r; });
  if (chain.count == 0 || chain.layers[chain.count - 1].has_function || !reads_all) return {};
  if (value != stage.output || value != stage.differentiated) return {};
  return chain;
}

/// The work of a pass on one task (work.h). Every chunk reads the parameters and writes a part.
template <class T>
Work chunk_work(const Chain& chain, Pass pass, const LossPart& part, const ChunkTensors<T>& t) {
  const double n = static_cast<double>(part.samples);
  const bool tangent = pass != Pass::gradient, product = pass == Pass::product;
  double products = 0, parameters = chain.appended;
  for (int l = 0; l < chain.count; ++l) {
    const double size = static_cast<double>(chain.layers[l].in) * chain.layers[l].out;
    const int inner = l > 0;  // whether the layer's input has a cotangent and a tangent
    const int backward = product ? 3 * inner + 1 + inner : inner + 1;
    products += size * (1 + (tangent ? 1 + inner : 0) + (t.gradient ? backward : 0));
    parameters += size + chain.layers[l].out;
  }
  const double chunks = static_cast<double>(chunks_of(part.samples));
  const double samples = n * (chain.layers[0].in + chain.width() * (t.logits ? 2 : 1));
  const double parts = t.gradient ? (chunks > 1 ? 2 * chunks + 1 : 1) * parameters : 0;
  return {.flop = 2 * n * products,
          .bytes = (samples + chunks * parameters * (tangent ? 2 : 1) + parts) * sizeof(T)};
}

/// Whether a block's shared memory holds what a pass needs.
template <class T>
bool fits_a_block(const Chain& chain, Pass pass, int device) {
  const OnDevice on(device);
  return with_unit<T>(chain, [&]<class Unit>() { return ChunkKernels<Unit>::shared_bytes(pass, chain); }) <=
         most_shared_bytes(device);
}

}  // namespace

template <class T>
std::optional<Chain> chain_of(const Problem& problem, int device) {
  if (problem.graph.loss == Loss::computed || problem.packing.stepwise < problem.packing.trainable) return {};
  if (problem.is_tiled() || problem.data_size) return {};
  std::optional<Chain> chain = layers_of(problem, problem.support.n > 0 ? problem.support : problem.query);
  if (!chain) return {};
  if (chain->units() > kSlots<T> * kChunkWarps) return {};
  const bool products = problem.second_order() || problem.operation == Operation::hvp;
  if (!fits_a_block<T>(*chain, Pass::gradient, device)) return {};
  if (products && !fits_a_block<T>(*chain, Pass::product, device)) return {};
  if (is_fisher(problem.operation) && !fits_a_block<T>(*chain, Pass::metric, device)) return {};
  return chain;
}
template std::optional<Chain> chain_of<float>(const Problem&, int);
template std::optional<Chain> chain_of<double>(const Problem&, int);

Problem without_values(Problem problem) {
  const int64_t chunks = chunks_of(std::max(problem.support.n, problem.query.n));
  for (Stage* stage : {&problem.support, &problem.query}) {
    stage->fixed_size = stage->step_size = stage->tangent_size = 0;
    stage->scratch_size = chunks > 1 ? chunks * part_size(problem.packing.trainable) : 0;
  }
  return problem;
}

template <class T>
void launch_chunks(const Launcher& launch, Pass pass, const Chain& chain, const LossPart& part,
                   const ChunkTensors<T>& tensors) {
  note([&] { return chunk_work(chain, pass, part, tensors); });
  with_unit<T>(chain, [&]<class Unit>() { ChunkKernels<Unit>::launch(launch, pass, chain, part, tensors); });
}
template void launch_chunks<float>(const Launcher&, Pass, const Chain&, const LossPart&,
                                   const ChunkTensors<float>&);
template void launch_chunks<double>(const Launcher&, Pass, const Chain&, const LossPart&,
                                    const ChunkTensors<double>&);

}  // namespace maml::cuda
