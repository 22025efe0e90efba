#include "python/bound_problem.h"

#include <stdexcept>
#include <utility>

#include "cpu/run/backend.h"
#include "python/plan.h"
#ifdef MAML_CUDA_ARCHITECTURES
#include "cuda/run/backend.h"
#endif

namespace py = pybind11;

namespace maml {
namespace {

LayerTraits traits_of(const std::string& backend) {
  if (backend == "cpu") return cpu::backend().traits;
#ifdef MAML_CUDA_ARCHITECTURES
  if (backend == "cuda") return cuda::traits();
#endif
  throw std::invalid_argument("this build of maml_cuda has no backend " + backend);
}

/// labels [tasks, sets, n].
void check_classes(const std::string& name, const char* what, const int64_t* labels, int64_t tasks,
                   int64_t sets, int64_t n, int64_t classes) {
  if (!labels) return;
  for (int64_t i = 0; i < tasks * sets * n; ++i) {
    if (labels[i] >= 0 && labels[i] < classes) continue;
    const std::string step = sets > 1 ? ", inner step " + std::to_string(i / n % sets) : "";
    throw std::invalid_argument(name + " must hold " + what + " in [0, " + std::to_string(classes) +
                                "), got " + std::to_string(labels[i]) + " (task " +
                                std::to_string(i / (n * sets)) + step + ", sample " + std::to_string(i % n) +
                                ")");
  }
}

Problem problem_of(ReadPlan plan, Operation operation, const std::vector<int64_t>& sample, int64_t n_support,
                   int64_t n_query, int steps, bool first_order, bool is_double,
                   const std::vector<int>& query_steps, bool weighted) {
  return Problem(std::move(plan.graph), operation, std::move(plan.updates), std::move(plan.rate_tensors),
                 sample, n_support, n_query, steps, first_order, query_steps, weighted, is_double ? 8 : 4,
                 traits_of(plan.backend));
}

}  // namespace

BoundProblem::BoundProblem(py::handle plan, const std::string& operation, const std::vector<int64_t>& sample,
                           int64_t n_support, int64_t n_query, int steps, bool first_order, bool is_double,
                           const std::vector<int>& query_steps, bool weighted)
    : double_(is_double),
      problem_(problem_of(read_plan(plan, operation_named(operation)), operation_named(operation), sample,
                          n_support, n_query, steps, first_order, is_double, query_steps, weighted)) {}

bool BoundProblem::combines_samples() const {
  return maml::combines_samples(problem_.graph, problem_.support) ||
         maml::combines_samples(problem_.graph, problem_.query);
}

int64_t BoundProblem::workspace(int64_t tasks, int64_t at_once) const {
  const cpu::Backend& backend = cpu::backend();
  return (double_ ? backend.workspace_double : backend.workspace_float)(problem_, tasks, at_once);
}

void BoundProblem::run(const BoundCall& call) const {
  if (takes_classes(problem_.graph.loss)) check_classes(call);
  py::gil_scoped_release unlocked;
  if (double_) {
    cpu::backend().run_double(problem_, call.as<double>());
  } else {
    cpu::backend().run_float(problem_, call.as<float>());
  }
}

void BoundProblem::check_classes(const BoundCall& call) const {
  const bool policy = is_policy(problem_.graph.loss);
  const std::string field = policy ? ".actions" : "";
  const char* what = policy ? "actions" : "labels";
  const int64_t classes = prediction()[0];
  maml::check_classes((at_own_parameters(problem_.operation) ? "y" : "y_spt") + field, what,
                      call.support[1].as<int64_t>(), call.tasks, problem_.support_sets(), problem_.support.n,
                      classes);
  maml::check_classes("y_qry" + field, what, call.query[1].as<int64_t>(), call.tasks, 1, problem_.query.n,
                      classes);
}

}  // namespace maml
