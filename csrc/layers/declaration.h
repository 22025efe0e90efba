// The declaration of a kind of layer, for the plan and for every backend: layers/<kind>.h specialises
// Declaration. No member has a default: a declaration with a missing member does not compile.
#pragma once

#include <array>
#include <concepts>
#include <span>
#include <utility>

#include "layers/node.h"

namespace maml {

/// The class of a layer. It determines what a backend implements for the layer; the four passes follow from
/// that. With g the cotangent of y and R{.} the derivative along the direction (Pearlmutter 1994):
///
///   linear     y = A x: apply A, and its adjoint A'.
///              The tangent is A Rx; the backward passes are A' g and A' Rg.
///   bilinear   y = B(x, w): B and its two adjoints, each also as a sum of two terms (the product rule):
///              Ry = B(Rx, w) + B(x, Rw).
///   pointwise  y = f(x) element by element: f, f' and f'' (functions.h).
///   selection  y consists of some elements of x: the choice, then linear for a given choice.
///   own        all four passes.
enum class LayerClass { linear, bilinear, pointwise, selection, own };

template <Kind K>
struct Declaration;

template <Kind K>
concept Declared = requires(const Node& node, std::span<const Shape> x, const Layer& layer) {
  { Declaration<K>::name } -> std::convertible_to<const char*>;  // used in plans and by `explain`
  { Declaration<K>::layer_class } -> std::convertible_to<LayerClass>;
  { Declaration<K>::fewest_inputs } -> std::convertible_to<int>;
  { Declaration<K>::most_inputs } -> std::convertible_to<int>;
  // The backends that have the kind. A chain that only one of them fuses does not exist on the other.
  { Declaration<K>::on_cpu } -> std::convertible_to<bool>;
  { Declaration<K>::on_cuda } -> std::convertible_to<bool>;
  // Whether the output of a sample depends on the other samples of its task. If any layer of a plan mixes
  // samples, they cannot go through the plan in tiles.
  { Declaration<K>::mixes_samples } -> std::convertible_to<bool>;
  // Whether a function after it may be computed in place, over its output: none of its passes reads that
  // output.
  { Declaration<K>::function_in_place } -> std::convertible_to<bool>;
  // Whether the executors of small networks have it. The CPU's tasks in lanes run a layer on lanes as on
  // further features, so that it must work element by element. The CUDA megakernel needs passes of its own
  // (InBlock in cuda/run/in_block.h).
  { Declaration<K>::in_lanes } -> std::convertible_to<bool>;
  { Declaration<K>::in_megakernel } -> std::convertible_to<bool>;
  // The shape of its output. Throws std::invalid_argument where the shapes do not fit the layer, and
  // Unsupported where they fit but no fused layer takes them; both name the user's module.
  { Declaration<K>::infer(node, x, int64_t{}) } -> std::same_as<Shape>;
  // Whether its output is the same memory as its input. `plan_input`: the input is that of the plan, which
  // has the user's order of elements.
  { Declaration<K>::is_view(x[0].image, bool{}) } -> std::same_as<bool>;
  // The approximate number of multiply-adds of a forward pass.
  { Declaration<K>::work(layer) } -> std::same_as<int64_t>;
};

}  // namespace maml
