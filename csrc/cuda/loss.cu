// The losses of all tasks (loss.h): one block a task computes a value; as many blocks as the rows fill
// compute a tangent or a metric.
#include "cuda/layers.h"
#include "cuda/loss.h"

namespace maml::cuda {
namespace {

constexpr int kThreads = kSmallTiles ? 64 : 256;

template <class T>
__global__ void __launch_bounds__(kThreads) value_kernel(LossPart part, const T* z, Target<T> target, T* loss,
                                                         T* grad_z, T* saved, Deferred deferred) {
  const Memory memory = deferred.ready();
  __shared__ double sums[kThreads / kWarp];
  const int64_t task = blockIdx.z;
  loss_value(grid_team(), part, resolve(z, memory, task), resolve(target, memory, task),
             resolve(loss, memory, task), resolve(grad_z, memory, task), resolve(saved, memory, task), sums);
}

// Four resident blocks, six of the metric: without a bound, ptxas aims at eight and spills registers.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    tangent_kernel(LossPart part, const T* z, Target<T> target, const T* z_dot, const T* saved, T* grad_z_dot,
                   Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  loss_tangent(grid_team(), part, resolve(z, memory, task), resolve(target, memory, task),
               resolve(z_dot, memory, task), resolve(saved, memory, task), resolve(grad_z_dot, memory, task));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 6)
    metric_kernel(LossPart part, const T* z, Target<T> target, const T* z_dot, T* grad_z, Deferred deferred) {
  const Memory memory = deferred.ready();
  const int64_t task = blockIdx.z;
  loss_metric(grid_team(), part, resolve(z, memory, task), resolve(target, memory, task),
              resolve(z_dot, memory, task), resolve(grad_z, memory, task));
}

}  // namespace

template <class T>
void launch_loss(const Launcher& launch, const LossPart& part, const T* z, const Target<T>& target, T* loss,
                 T* grad_z, T* saved) {
  launch("loss", value_kernel<T>, Grid{}, kThreads, 0, part, z, target, loss, grad_z, saved, launch.memory);
}

template <class T>
void launch_loss_tangent(const Launcher& launch, const LossPart& part, const T* z, const Target<T>& target,
                         const T* z_dot, const T* saved, T* grad_z_dot) {
  launch("loss tangent", tangent_kernel<T>, Grid{blocks_for(part.n * part.c, 4 * kThreads)}, kThreads, 0,
         part, z, target, z_dot, saved, grad_z_dot, launch.memory);
}

template <class T>
void launch_metric(const Launcher& launch, const LossPart& part, const T* z, const Target<T>& target,
                   const T* z_dot, T* grad_z) {
  launch("metric", metric_kernel<T>, Grid{blocks_for(part.n * part.c, 4 * kThreads)}, kThreads, 0, part, z,
         target, z_dot, grad_z, launch.memory);
}

template void launch_loss<float>(const Launcher&, const LossPart&, const float*, const Target<float>&, float*,
                                 float*, float*);
template void launch_loss<double>(const Launcher&, const LossPart&, const double*, const Target<double>&,
                                  double*, double*, double*);
template void launch_loss_tangent<float>(const Launcher&, const LossPart&, const float*, const Target<float>&,
                                         const float*, const float*, float*);
template void launch_loss_tangent<double>(const Launcher&, const LossPart&, const double*,
                                          const Target<double>&, const double*, const double*, double*);
template void launch_metric<float>(const Launcher&, const LossPart&, const float*, const Target<float>&,
                                   const float*, float*);
template void launch_metric<double>(const Launcher&, const LossPart&, const double*, const Target<double>&,
                                    const double*, double*);

}  // namespace maml::cuda
