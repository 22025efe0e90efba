// The choice among the instruction sets of this build. Compiled once, for the baseline.
#include "cpu/run/backend.h"

#include <cstdlib>

#include "layers/kinds.h"

namespace maml::cpu {
namespace {

bool always() { return true; }
#ifdef MAML_WITH_AVX2
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
#ifdef MAML_WITH_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
#endif

}  // namespace
}  // namespace maml::cpu

#define MAML_DECLARE(isa)                                     \
  namespace maml::isa {                                       \
  Footprint footprint(const Layer&);                          \
  int64_t workspace_float(const Problem&, int64_t, int64_t);  \
  int64_t workspace_double(const Problem&, int64_t, int64_t); \
  void run_float(const Problem&, const Call<float>&);         \
  void run_double(const Problem&, const Call<double>&);       \
  }
#ifdef MAML_WITH_AVX512
MAML_DECLARE(avx512)
#endif
#ifdef MAML_WITH_AVX2
MAML_DECLARE(avx2)
#endif
MAML_DECLARE(baseline)

namespace maml::cpu {
namespace {

LayerTraits traits(Footprint (*footprint)(const Layer&)) {
  LayerTraits traits{footprint, Kind::conv_block};
  traits.tile = 128;  // what its layers hand on stays in a core's cache; measured on MLPs and convolutions
  traits.kept_bytes = int64_t{16} << 20;
  traits.in_place = true;
  return traits;
}

// Best first.
const Backend kBackends[] = {
#ifdef MAML_WITH_AVX512
    {"avx512", has_avx512, traits(avx512::footprint), avx512::workspace_float, avx512::workspace_double,
     avx512::run_float, avx512::run_double},
#endif
#ifdef MAML_WITH_AVX2
    {"avx2", has_avx2, traits(avx2::footprint), avx2::workspace_float, avx2::workspace_double,
     avx2::run_float, avx2::run_double},
#endif
    {"baseline", always, traits(baseline::footprint), baseline::workspace_float, baseline::workspace_double,
     baseline::run_float, baseline::run_double},
};

const Backend& choose() {
  const char* wanted = std::getenv("MAML_CUDA_CPU_ISA");
  std::string known;
  for (const Backend& b : kBackends) {
    if (wanted ? wanted == std::string(b.isa) : b.available()) {
      if (b.available()) return b;
      throw std::invalid_argument("MAML_CUDA_CPU_ISA asks for " + std::string(wanted) +
                                  ", which this CPU lacks");
    }
    known += (known.empty() ? "" : ", ") + std::string(b.isa);
  }
  throw std::invalid_argument("MAML_CUDA_CPU_ISA must be one of " + known + ", got " + wanted);
}

}  // namespace

const Backend& backend() {
  static const Backend& chosen = choose();
  return chosen;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Backend& b : kBackends) names.push_back(b.isa);
  return names;
}

}  // namespace maml::cpu
