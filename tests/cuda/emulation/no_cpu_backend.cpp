// In place of csrc/cpu/run/backend.cpp in an emulated build, whose module runs the CUDA kernels alone.
#include <stdexcept>

#include "cpu/run/backend.h"

namespace maml::cpu {

const Backend& backend() { throw std::logic_error("an emulated build has no CPU backend"); }

std::vector<std::string> instruction_sets() { return {}; }

}  // namespace maml::cpu
