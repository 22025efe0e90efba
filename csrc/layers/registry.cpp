#include "layers/registry.h"

#include <stdexcept>

#include "layers/combinations.h"
#include "layers/kinds.h"

namespace maml {
namespace {

constexpr auto kProperties = for_each_kind([]<Kind K> {
  using D = Declaration<K>;
  return Properties{D::name,          D::layer_class,       D::fewest_inputs, D::most_inputs,
                    D::mixes_samples, D::function_in_place, D::in_lanes,      D::in_megakernel,
                    D::infer,         D::is_view,           D::work};
});

struct FunctionProperties {
  const char* name;
  bool bends, in_megakernel;
  bool (*ascends)(const Constants&);
};
constexpr auto kFunctionProperties = for_each_function([]<Function F> {
  using D = FunctionDeclaration<F>;
  return FunctionProperties{D::name, D::bends, D::in_megakernel, D::ascends};
});

constexpr auto kCombinationNames =
    for_each_combination([]<Combination C> { return CombinationDeclaration<C>::name; });

/// The index of the row with this name.
template <class Table>
int named(const Table& table, const std::string& name, const char* what) {
  for (size_t i = 0; i < table.size(); ++i) {
    if (name == table[i].name) return static_cast<int>(i);
  }
  throw std::invalid_argument(std::string("unknown ") + what + " " + name);
}

}  // namespace

const Properties& properties(Kind kind) { return kProperties[static_cast<size_t>(kind)]; }
Kind kind_named(const std::string& name) { return static_cast<Kind>(named(kProperties, name, "layer")); }
Function function_named(const std::string& name) {
  return static_cast<Function>(named(kFunctionProperties, name, "function"));
}
Cell cell_named(const std::string& name) {
  for (int c = 0; c < static_cast<int>(Cell::count); ++c) {
    if (name == name_of(static_cast<Cell>(c))) return static_cast<Cell>(c);
  }
  throw std::invalid_argument("unknown cell " + name);
}
std::optional<Combination> combination_named(const std::string& name) {
  for (size_t c = 0; c < kCombinationNames.size(); ++c) {
    if (name == kCombinationNames[c]) return static_cast<Combination>(c);
  }
  return {};
}
bool bends(Function function) { return kFunctionProperties[static_cast<size_t>(function)].bends; }
bool is_linear(const Layer& l) {
  const bool features = l.in.h * l.in.w == 1 && l.out.h * l.out.w == 1;
  return features && l.window.kernel_h * l.window.kernel_w == 1 && l.window.pad_top + l.window.pad_left == 0;
}

bool in_megakernel(Function function) {
  return kFunctionProperties[static_cast<size_t>(function)].in_megakernel;
}
bool ascends(const Layer& layer) {
  return kFunctionProperties[static_cast<size_t>(layer.function)].ascends(layer);
}

}  // namespace maml
