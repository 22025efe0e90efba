// A Problem of the core on one CUDA device, as Python holds it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <variant>

#include "cuda/run/backend.h"
#include "python/bound_call.h"
#include "python/bound_problem.h"

namespace maml {

class BoundRunner {
 public:
  using Address = std::uintptr_t;  // of a stream, or of memory on the device

  BoundRunner(const BoundProblem& problem, int device)
      : runner_(problem.is_double() ? Either(cuda::Runner<double>(problem.problem(), device))
                                    : Either(cuda::Runner<float>(problem.problem(), device))) {}

  const char* executor() const {
    switch (std::visit([](const auto& r) { return r.executor(); }, runner_)) {
      case cuda::Executor::megakernel:
        return "megakernel";
      case cuda::Executor::chunked:
        return "chunked";
      case cuda::Executor::batched:
        break;
    }
    return "batched";
  }
  int64_t workspace(int64_t tasks, int64_t at_once) const {
    return std::visit([&](const auto& r) { return r.workspace(tasks, at_once); }, runner_);
  }
  void run(const BoundCall& call, Address stream) const {
    pybind11::gil_scoped_release unlocked;
    std::visit([&]<class T>(const cuda::Runner<T>& r) { r.run(call.as<T>(), at(stream)); }, runner_);
  }
  int64_t table_bytes(const BoundCall& call) const {
    return std::visit([&]<class T>(const cuda::Runner<T>& r) { return r.table_bytes(call.as<T>()); },
                      runner_);
  }
  cuda::CudaGraph capture(const BoundCall& call, Address table) const {
    pybind11::gil_scoped_release unlocked;
    return std::visit([&]<class T>(const cuda::Runner<T>& r) { return r.capture(call.as<T>(), at(table)); },
                      runner_);
  }
  void run_graph(const BoundCall& call, const cuda::CudaGraph& graph, Address stream) const {
    pybind11::gil_scoped_release unlocked;
    std::visit([&]<class T>(const cuda::Runner<T>& r) { r.run(call.as<T>(), graph, at(stream)); }, runner_);
  }

 private:
  static void* at(Address address) { return reinterpret_cast<void*>(address); }

  using Either = std::variant<cuda::Runner<float>, cuda::Runner<double>>;
  Either runner_;
};

}  // namespace maml
