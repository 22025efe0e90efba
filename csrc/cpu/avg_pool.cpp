#include "cpu/avg_pool.h"

#include "cpu/implement.h"

namespace maml::MAML_ISA {

template <>
struct OnCpu<Kind::avg_pool> : MeanOverWindows {};
template struct Implementation<Kind::avg_pool>;

}  // namespace maml::MAML_ISA
