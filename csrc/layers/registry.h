// What the declarations say of a kind of layer, or of a function, that is known at run time alone.
#pragma once

#include <string>

#include "layers/declaration.h"

namespace maml {

/// Declaration<kind>, whose members have the same names.
struct Properties {
  const char* name;
  LayerClass layer_class;
  int inputs;
  bool mixes_samples, function_in_place, in_small_networks;
  Shape (*infer)(const Node&, std::span<const Shape>, int64_t n);
  bool (*is_view)(const Image&, bool plan_input);
  int64_t (*work)(const Layer&);
};
const Properties& properties(Kind kind);

/// Throws std::invalid_argument where there is none of that name.
Kind kind_named(const std::string& name);
Function function_named(const std::string& name);

/// Of a pointwise layer's function: whether f'' is anything but zero, and whether a larger x never gives a
/// smaller f(x).
bool bends(Function function);
bool ascends(const Layer& layer);

}  // namespace maml
