// The kernel of small multilayer perceptrons: it loads a task's sets and the parameters into padded matrices
// in shared memory and runs the meta-step (small_mlp_step.h). And which problems it serves.
#include <algorithm>
#include <vector>

#include "cuda/policy_loss.h"
#include "cuda/product/copy_async.h"
#include "cuda/run/on_device.h"
#include "cuda/run/small_mlp_step.h"
#include "layers/kinds.h"
#include "layers/registry.h"

namespace maml::cuda {
namespace {

struct MlpCall {
  Span spans[kMlpSpans];
};

/// Copies a matrix [rows, columns] of device memory to place(row, column), asynchronously.
template <class T, class Place>
__device__ void copy_matrix(int rows, int columns, Divider by_columns, const T* from, Place place) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kMlpThreads) {
    const int row = by_columns(i);
    copy_async<sizeof(T)>(place(row, i - row * columns), from + i, true);
  }
}

template <class T>
__device__ void load_set(const SmallMlp& net, const MlpSet& set, const T* x, const void* y, T* memory) {
  const MlpLayer &first = net.layer[0], &last = net.layer[net.layers - 1];
  copy_matrix(set.n, first.in, first.by_in, x,
              [&](int row, int j) { return memory + set.x + row * first.in_stride + j; });
  if (net.loss == Loss::mse) {
    copy_matrix(set.n, last.out, last.by_out, static_cast<const T*>(y),
                [&](int row, int j) { return memory + set.y + row * last.out + j; });
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < set.n; i += kMlpThreads) {
    const int64_t label = static_cast<const int64_t*>(y)[i];
    if (label < 0 || label >= last.out) refuse_class("cross_entropy: the label", i, label, last.out);
    reinterpret_cast<int*>(memory + set.y)[i] = static_cast<int>(label);
  }
}

template <class T>
__global__ void __launch_bounds__(kMlpThreads)
    small_mlp(const __grid_constant__ SmallMlp net, const __grid_constant__ MlpCall call, SpanOrder order,
              Span* table_out, Deferred deferred) {
  T* memory = reinterpret_cast<T*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t task = blockIdx.z;
  auto of_task = [&](int span) {
    const Span& s = call.spans[span];
    return s.start ? s.start + task * s.stride : nullptr;
  };
  auto tensor = [&](Region region) { return reinterpret_cast<T*>(of_task(static_cast<int>(region))); };
  const MlpStep<T> step(net, memory);
  step.clear();
  deferred.ready();
  if (task == 0) {
    for (int s = thread; s < order.count; s += kMlpThreads) table_out[s] = call.spans[s];
  }
  __syncthreads();
  for (int l = 0; l < net.layers; ++l) {
    const MlpLayer& layer = net.layer[l];
    T* weight = memory + net.phi + layer.weight;
    auto parameter = [&](int p) { return reinterpret_cast<const T*>(of_task(order.parameters + p)); };
    copy_matrix(layer.out, layer.in, layer.by_in, parameter(layer.weight_parameter),
                [&](int j, int i) { return weight + i * layer.out_stride + j; });
    if (layer.bias_parameter < 0) continue;
    copy_matrix(1, layer.out, layer.by_out, parameter(layer.bias_parameter),
                [&](int, int j) { return weight + layer.in * layer.out_stride + j; });
  }
#pragma unroll 1
  for (int q = 0; q < 2; ++q) {
    load_set<T>(net, q ? net.query : net.support, tensor(q ? Region::x_query : Region::x_support),
                of_task(static_cast<int>(q ? Region::y_query : Region::y_support)), memory);
  }
  commit_copies();
  step.put_ones();
  wait_copies<0>();
  __syncthreads();
  step.run({tensor(Region::support_losses), tensor(Region::task_losses), tensor(Region::logits),
            tensor(Region::task)});
}

/// The layers of a stage, if they are linear layers with functions between them.
std::optional<std::vector<const Stage::Step*>> chain_of(const Stage& stage) {
  std::vector<const Stage::Step*> chain;
  int value = 0;
  for (const Stage::Step& step : stage.steps) {
    const Kind wanted = chain.size() % 2 ? Kind::pointwise : Kind::conv2d;
    if (step.layer.kind != wanted || step.inputs[0] != value) return {};
    value = step.output;
    chain.push_back(&step);
  }
  if (chain.size() % 2 == 0 || chain.size() > 2 * kMostMlpLayers - 1) return {};
  if (value != stage.output || value != stage.differentiated || stage.tiles > 1) return {};
  return chain;
}

/// Whether all parameters are adapted, each at a constant rate, and read by one layer.
bool is_plain(const Problem& p, const std::vector<const Stage::Step*>& chain) {
  std::vector<int> readers(p.graph.parameters.size());
  for (const Stage::Step* step : chain) {
    for (int parameter : step->parameters) {
      if (parameter >= 0) ++readers[parameter];
    }
  }
  for (size_t i = 0; i < readers.size(); ++i) {
    if (p.graph.parameters[i].role != Role::adapted || p.updates[i].rate().slot >= 0 || readers[i] != 1)
      return false;
  }
  return true;
}

template <class T>
MlpLayer mlp_layer(const Problem& p, const Stage::Step& linear, const Stage::Step* function) {
  MlpLayer l{};
  l.in = static_cast<int>(linear.layer.in.c), l.out = static_cast<int>(linear.layer.out.c);
  l.in_stride = padded_stride<T>(l.in), l.out_stride = padded_stride<T>(l.out);
  l.depth = vectors<T>(l.in + 1), l.in_vectors = vectors<T>(l.in), l.out_vectors = vectors<T>(l.out);
  l.by_in = Divider::by(l.in), l.by_out = Divider::by(l.out);
  l.by_in_vectors = Divider::by(l.in_vectors), l.by_out_vectors = Divider::by(l.out_vectors);
  l.weight_parameter = linear.parameters[0];
  l.bias_parameter = linear.parameters.size() > 1 ? linear.parameters[1] : -1;
  auto result = [&](int parameter) { return static_cast<int>(p.packing.at[parameter]); };
  l.weight_result = result(l.weight_parameter), l.weight_rate = p.updates[l.weight_parameter].rate().constant;
  if (l.bias_parameter >= 0) {
    l.bias_result = result(l.bias_parameter), l.bias_rate = p.updates[l.bias_parameter].rate().constant;
  }
  if (function) {
    static_cast<Constants&>(l) = function->layer;
    l.function = function->layer.function, l.bends = bends(l.function);
  }
  return l;
}

}  // namespace

template <class T>
std::optional<SmallMlp> small_mlp_of(const Problem& p, int device) {
  const bool serves = p.operation == Operation::meta_gradient && p.steps > 0 && !p.weighs_queries() &&
                      p.unrolls() && p.first_differentiated() == 0 &&
                      (p.graph.loss == Loss::mse || p.graph.loss == Loss::cross_entropy) &&
                      p.rate_tensors.empty() && p.support_sets() == 1 && p.data_size == 0 && !p.weighted &&
                      !p.has_optimizer();
  if (!serves || !p.runs_in_megakernel()) return {};
  const auto chain = chain_of(p.support), query_chain = chain_of(p.query);
  if (!chain || !query_chain || chain->size() != query_chain->size() || !is_plain(p, *chain)) return {};
  SmallMlp net{};
  net.steps = p.steps, net.second_order = p.second_order(), net.loss = p.graph.loss;
  net.support.n = static_cast<int>(p.support.n), net.query.n = static_cast<int>(p.query.n);
  int tangent_row = 0;
  for (size_t i = 0; i < chain->size(); i += 2) {
    const Stage::Step* function = i + 1 < chain->size() ? (*chain)[i + 1] : nullptr;
    MlpLayer l = mlp_layer<T>(p, *(*chain)[i], function);
    auto row = [&](int& size, bool there) {
      const int at = size;
      size += there ? l.out_stride : 0;
      return at;
    };
    l.value = row(net.region_row, function);
    l.slope = row(net.region_row, function || net.loss == Loss::cross_entropy);
    l.curve = row(net.region_row, l.bends);
    l.grad = row(net.region_row, true);
    l.dot = row(tangent_row, function);
    l.grad_dot = row(tangent_row, true);
    l.weight = net.phi_size;
    net.phi_size += l.depth * kVector<T> * l.out_stride;
    net.layer[net.layers++] = l;
  }
  const MlpLayer& last = net.layer[net.layers - 1];
  auto take = [&](int64_t elements) {
    const int at = net.size;
    net.size += static_cast<int>(elements);
    return at;
  };
  for (MlpSet* set : {&net.support, &net.query}) {
    set->x = take(set->n * net.layer[0].in_stride);
    set->y = take(vectors<T>(set->n * last.out) * kVector<T>);
  }
  net.phi = take((net.second_order ? net.steps + 1 : 2) * net.phi_size);
  net.v = take(net.second_order ? net.phi_size : 0);
  net.direction = take(net.second_order ? net.phi_size : 0);
  net.regions = take((net.second_order ? net.steps : 1) * net.support.n * net.region_row);
  net.shared_size =
      std::max(net.query.n * net.region_row, net.second_order ? net.support.n * tangent_row : 0);
  net.shared = take(net.shared_size);
  const OnDevice on(device);
  const size_t bytes = static_cast<size_t>(net.size) * sizeof(T) + static_shared_bytes(small_mlp<T>);
  if (bytes > most_shared_bytes(device)) return {};
  return net;
}
template std::optional<SmallMlp> small_mlp_of<float>(const Problem&, int);
template std::optional<SmallMlp> small_mlp_of<double>(const Problem&, int);

template <class T>
void launch_small_mlp(const Launcher& launch, const SmallMlp& net, const Span* spans, const SpanOrder& order,
                      Span* table) {
  MlpCall call{};
  std::copy_n(spans, order.count, call.spans);
  launch("small mlp", small_mlp<T>, {}, kMlpThreads, static_cast<size_t>(net.size) * sizeof(T), net, call,
         order, table, launch.memory);
}
template void launch_small_mlp<float>(const Launcher&, const SmallMlp&, const Span*, const SpanOrder&, Span*);
template void launch_small_mlp<double>(const Launcher&, const SmallMlp&, const Span*, const SpanOrder&,
                                       Span*);

}  // namespace maml::cuda
