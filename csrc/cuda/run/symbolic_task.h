// The tensors that the algorithm works on.
#pragma once

#include "cuda/run/layout.h"
#include "meta_gradient.h"

namespace maml::cuda {

/// The tensors of a task, as symbolic addresses.
template <class T>
Task<T> symbolic_task(const Problem& p, const Layout& layout, bool inside) {
  const Operation o = p.operation;
  const bool own = inside || at_own_parameters(o);
  auto given = [&](bool there, Region region) { return there ? place<T>(region) : nullptr; };
  Task<T> task{};
  task.theta = own ? place<T>(Region::task, layout.own) : place<T>(Region::shared, layout.theta);
  task.x_support = given(p.support.n > 0, Region::x_support);
  const bool policy = is_policy(p.graph.loss), scaled = policy || p.weighted;
  if (p.support.n > 0) task.y_support = {place<T>(Region::y_support)};
  if (p.support.n > 0 && scaled) task.y_support.scale = place<T>(Region::scale_support);
  if (p.support.n > 0 && policy) {
    task.y_support.old_log_probs = place<T>(Region::old_log_probs_support);
  }
  task.x_query = given(p.query.n > 0, Region::x_query);
  if (p.query.n > 0) task.y_query = {place<T>(Region::y_query)};
  if (p.query.n > 0 && scaled) task.y_query.scale = place<T>(Region::scale_query);
  if (p.query.n > 0 && policy) {
    task.y_query.old_log_probs = place<T>(Region::old_log_probs_query);
  }
  const bool meta = o == Operation::meta_gradient || o == Operation::meta_loss;
  task.support_losses = given(meta || o == Operation::adapt, Region::support_losses);
  task.query_loss = given(meta || o == Operation::loss_and_grad, Region::task_losses);
  task.logits = given(meta || o == Operation::predict, Region::logits);
  task.result = place<T>(Region::task, gives_gradient(o) ? layout.result : layout.out);
  task.given =
      o == Operation::predict_backward ? place<T>(Region::cotangent) : place<T>(Region::task, layout.given);
  task.adapted = place<T>(Region::task, layout.out);
  task.data_gradient = given(p.data_size > 0, Region::cotangent);
  return task;
}

}  // namespace maml::cuda
