// The passes of the layers by one block, for the interpreter (interpreter.h). InBlock<K> exists for every
// kind that has them. The kinds of the megakernel (Declaration::in_megakernel) are a part of these.
#pragma once

#include "cuda/add.h"
#include "cuda/append.h"
#include "cuda/mean_pool.h"
#include "cuda/normalise_in_block.h"
#include "cuda/pointwise.h"
#include "cuda/product/block_product.h"
#include "cuda/product/small_product.h"
#include "cuda/run/program.h"
#include "cuda/transpose.h"
#include "layers/kinds.h"

namespace maml::cuda {

/// Where the tensors of a program are. In shared memory a product reads its operands one by one; in device
/// memory it needs more loads in flight.
enum class Home { shared_memory, device_memory };

/// run<Home>(op, a team of one block, layer, tensors) is one of the four passes.
template <Kind K>
struct InBlock;

template <Kind K>
concept HasBlockPasses = requires { sizeof(InBlock<K>); };

template <>
struct InBlock<Kind::conv2d> {  // linear layers
  template <Home H, class T>
  static __device__ void run(Op op, BlockTeam team, const Layer& l, const Tensors<T>& t) {
    if constexpr (H == Home::shared_memory) {
      return op == Op::forward           ? linear_forward(team, l, t)
             : op == Op::backward        ? linear_backward(team, l, t)
             : op == Op::forward_tangent ? linear_forward_tangent(team, l, t)
                                         : linear_backward_tangent(team, l, t);
    } else {
      return op == Op::forward           ? LinearInBlock<T>::forward(team, l, t)
             : op == Op::backward        ? LinearInBlock<T>::backward(team, l, t)
             : op == Op::forward_tangent ? LinearInBlock<T>::forward_tangent(team, l, t)
                                         : LinearInBlock<T>::backward_tangent(team, l, t);
    }
  }
};
template <>
struct InBlock<Kind::pointwise> {
  template <Home, class T>
  static __device__ void run(Op op, BlockTeam team, const Layer& l, const Tensors<T>& t) {
    return op == Op::forward           ? pointwise_forward(team, l, t)
           : op == Op::backward        ? pointwise_backward(team, l, t)
           : op == Op::forward_tangent ? pointwise_forward_tangent(team, l, t)
                                       : pointwise_backward_tangent(team, l, t);
  }
};
template <>
struct InBlock<Kind::append> {
  template <Home, class T>
  static __device__ void run(Op op, BlockTeam team, const Layer& l, const Tensors<T>& t) {
    return op == Op::forward           ? append_forward(team, l, t)
           : op == Op::backward        ? append_backward(team, l, t)
           : op == Op::forward_tangent ? append_forward_tangent(team, l, t)
                                       : append_backward_tangent(team, l, t);
  }
};
template <>
struct InBlock<Kind::add> {
  template <Home, class T>
  static __device__ void run(Op op, BlockTeam team, const Layer& l, const Tensors<T>& t) {
    return op == Op::forward           ? add_forward(team, l, t)
           : op == Op::backward        ? add_backward(team, l, t)
           : op == Op::forward_tangent ? add_forward_tangent(team, l, t)
                                       : add_backward_tangent(team, l, t);
  }
};

/// The passes of a linear layer of one input: apply(x, y) and adjoint(g, add, grad_x).
template <class T, class Apply, class Adjoint>
__device__ __forceinline__ void linear_pass(Op op, const Tensors<T>& t, Apply apply, Adjoint adjoint) {
  const bool tangent = op == Op::forward_tangent || op == Op::backward_tangent;
  if (op == Op::forward || op == Op::forward_tangent) {
    apply(tangent ? t.x_dot[0] : t.x[0], tangent ? t.y_dot : t.y);
  } else if (T* const grad_x = tangent ? t.grad_x_dot[0] : t.grad_x[0]) {
    adjoint(tangent ? t.grad_y_dot : t.grad_y, t.add_x[0], grad_x);
  }
}
template <>
struct InBlock<Kind::flatten> {
  template <Home, class T>
  static __device__ void run(Op op, BlockTeam team, const Layer& l, const Tensors<T>& t) {
    const int64_t pixels = l.in.h * l.in.w;
    linear_pass(
        op, t, [&](const T* x, T* y) { move_elements<int>(team, {l.n, pixels, l.in.c, false}, x, y); },
        [&](const T* g, bool add, T* grad_x) {
          move_elements<int>(team, {l.n, l.in.c, pixels, add}, g, grad_x);
        });
  }
};
template <>
struct InBlock<Kind::mean_pool> {
  template <Home, class T>
  static __device__ void run(Op op, BlockTeam team, const Layer& l, const Tensors<T>& t) {
    linear_pass(
        op, t, [&](const T* x, T* y) { mean_of_all(team, l, x, y); },
        [&](const T* g, bool add, T* grad_x) { spread_over_all(team, l, g, add, grad_x); });
  }
};
template <>
struct InBlock<Kind::norm_block> {
  template <Home, class T>
  static __device__ void run(Op op, BlockTeam, const Layer& l, const Tensors<T>& t) {
    NormaliseInBlock::run(op, l, t);
  }
};
template <>
struct InBlock<Kind::batch_norm> {
  template <Home, class T>
  static __device__ void run(Op op, BlockTeam, const Layer& l, const Tensors<T>& t) {
    NormaliseInBlock::run(op, l, t);
  }
};

}  // namespace maml::cuda
