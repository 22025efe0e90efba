// The declarations of kinds and functions as tables, for values that are known only at run time.
#pragma once

#include <optional>
#include <string>

#include "layers/declaration.h"

namespace maml {

/// The members of Declaration<kind>, with the same names.
struct Properties {
  const char* name;
  LayerClass layer_class;
  int fewest_inputs, most_inputs;
  bool mixes_samples, function_in_place, in_lanes, in_megakernel;
  Shape (*infer)(const Node&, std::span<const Shape>, int64_t n);
  bool (*is_view)(const Image&, bool plan_input);
  int64_t (*work)(const Layer&);
};
const Properties& properties(Kind kind);

/// Throws std::invalid_argument if there is none of that name.
Kind kind_named(const std::string& name);
Function function_named(const std::string& name);
Cell cell_named(const std::string& name);
/// Nothing if there is none of that name.
std::optional<Combination> combination_named(const std::string& name);

/// Whether a conv2d is a linear layer. With one pixel, a tap that falls on padding alone would read nothing.
bool is_linear(const Layer& conv2d);

/// FunctionDeclaration::bends and ascends of a pointwise layer's function.
bool bends(Function function);
bool in_megakernel(Function function);
bool ascends(const Layer& layer);

}  // namespace maml
