// The layout of a call's workspace: the spans, the counters of each task in flight, then the elements that
// all tasks share, then one part for each task in flight.
#pragma once

#include "cuda/run/description.h"

namespace maml::cuda {

/// Offsets in elements: those under "shared" in Region::shared, the others in Region::task.
struct Layout {
  // shared
  int64_t totals = 0;  // double [result_size], sums over tasks
  int64_t theta = 0, rates = 0, shared_size = 0;
  // of one task
  int64_t result = 0;  // [result_size]
  int64_t own = 0;     // parameters of its own, packed
  int64_t given = 0;   // cotangents or directions, packed
  int64_t out = 0;     // the output for Call::per_task, packed
  int64_t work = 0;    // Problem::task_size()
  int64_t task_size = 0;

  /// `inside`: everything that a task reads is in its own part (the megakernel).
  Layout(const Problem& p, bool own_parameters, bool inside) {
    auto take = [](int64_t& size, int64_t wanted) {
      const int64_t at = size;
      size += whole_lines(wanted);
      return at;
    };
    totals = take(shared_size, 2 * p.result_size);
    int64_t& rates_home = inside ? task_size : shared_size;
    result = take(task_size, p.result_size);
    theta = inside || own_parameters ? 0 : take(shared_size, p.packing.total);
    own = inside || own_parameters ? take(task_size, p.packing.total) : 0;
    rates = take(rates_home, p.rates_size);
    given = take(task_size, takes_given(p.operation) ? p.packing.total : 0);
    out = take(task_size, gives_per_task(p.operation) ? p.packing.total : 0);
    work = take(task_size, p.task_size());
  }
};

}  // namespace maml::cuda
