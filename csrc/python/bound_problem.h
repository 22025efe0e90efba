// A Problem of the core for one element type and backend, as Python holds it.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "plan/problem.h"
#include "python/bound_call.h"

namespace maml {

class BoundProblem {
 public:
  BoundProblem(pybind11::handle plan, const std::string& operation, const std::vector<int64_t>& sample,
               int64_t n_support, int64_t n_query, int steps, bool first_order, bool is_double,
               const std::vector<int>& query_steps, bool weighted);

  bool is_double() const { return double_; }
  const Problem& problem() const { return problem_; }
  int saved_steps() const { return problem_.saved_steps; }
  /// Shape of one sample's prediction.
  const std::vector<int64_t>& prediction() const {
    return problem_.query.n ? problem_.query.prediction : problem_.support.prediction;
  }
  /// Elements of workspace on the CPU.
  int64_t workspace(int64_t tasks, int64_t at_once) const;
  int64_t task_size() const { return problem_.task_size(); }
  /// Whether a CPU may run several tasks side by side, one in each lane of a vector register.
  bool in_lanes() const { return problem_.runs_in_lanes(); }
  /// Whether a sample of a value depends on other samples otherwise than through a normalisation.
  bool combines_samples() const;
  /// Runs the call on the CPU. Throws std::invalid_argument for a label or action out of range.
  void run(const BoundCall& call) const;

 private:
  void check_classes(const BoundCall& call) const;

  bool double_;
  Problem problem_;
};

}  // namespace maml
