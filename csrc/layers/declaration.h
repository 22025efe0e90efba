// What is declared once of each kind of layer, for the plan and for every backend: layers/<kind>.h
// specialises Declaration. Nothing has a default: what is left out does not compile.
#pragma once

#include <array>
#include <concepts>
#include <span>
#include <utility>

#include "plan/graph.h"

namespace maml {

/// The class of a layer decides what a backend writes for it, and from that follow the four passes. With g
/// the cotangent of y and R{.} the derivative along the direction (Pearlmutter 1994):
///
///   linear     y = A x: apply A, and its adjoint A'. The tangent is A Rx, the backward passes are A' g, A'
///   Rg. bilinear   y = B(x, w): B and its two adjoints, each also as a sum of two terms, as the product rule
///   asks:
///              Ry = B(Rx, w) + B(x, Rw).
///   pointwise  y = f(x) element by element: f, f' and f'' (functions.h).
///   selection  y takes some elements of x: the choice, then linear given the choice.
///   own        all four passes.
enum class LayerClass { linear, bilinear, pointwise, selection, own };

template <Kind K>
struct Declaration;

template <Kind K>
concept Declared = requires(const Node& node, std::span<const Shape> x, const Layer& layer) {
  { Declaration<K>::name } -> std::convertible_to<const char*>;  // in plans and in `explain`
  { Declaration<K>::layer_class } -> std::convertible_to<LayerClass>;
  { Declaration<K>::inputs } -> std::convertible_to<int>;  // at most
  // The backends that have it. A chain that only one of them fuses is missing on the other.
  { Declaration<K>::on_cpu } -> std::convertible_to<bool>;
  { Declaration<K>::on_cuda } -> std::convertible_to<bool>;
  // Whether the output of a sample depends on the other samples of its task. If any layer of a plan mixes
  // them, they cannot go through it in tiles.
  { Declaration<K>::mixes_samples } -> std::convertible_to<bool>;
  // Whether a function behind it may be computed in place, over its output, which none of its passes reads.
  { Declaration<K>::function_in_place } -> std::convertible_to<bool>;
  // Whether the executors of small networks have it: the CPU's tasks in lanes and the CUDA megakernel. It
  // must then work on features alone, element by element or (conv2d) as a product.
  { Declaration<K>::in_small_networks } -> std::convertible_to<bool>;
  // The shape of its output. Throws std::invalid_argument where the shapes do not fit the layer, Unsupported
  // where they do and no fused layer takes them; both name the user's module.
  { Declaration<K>::infer(node, x, int64_t{}) } -> std::same_as<Shape>;
  // Whether its output is the memory of its input, read differently; `plan_input`: the input of the plan,
  // which stands as the user gave it.
  { Declaration<K>::is_view(x[0].image, bool{}) } -> std::same_as<bool>;
  // Multiply-adds of a forward pass, roughly.
  { Declaration<K>::work(layer) } -> std::same_as<int64_t>;
};

}  // namespace maml
