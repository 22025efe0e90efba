#include "plan/packing.h"

namespace maml {

Packing::Packing(const std::vector<Parameter>& parameters) : at(parameters.size()) {
  auto append = [&](auto belongs) {
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (!belongs(parameters[i])) continue;
      at[i] = total;
      total += whole_lines(parameters[i].size);
    }
    return total;
  };
  adapted = append([](const Parameter& p) { return p.role == Role::adapted; });
  stepwise = append([](const Parameter& p) { return p.role == Role::outer && p.slots == 1; });
  trainable = append([](const Parameter& p) { return p.role == Role::outer && p.slots > 1; });
  append([](const Parameter& p) { return p.role == Role::frozen; });
  for (const Parameter& p : parameters) {
    slots_.push_back(p.slots);
    slot_size_.push_back(p.size / p.slots);
  }
}

}  // namespace maml
