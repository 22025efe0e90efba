// attention: y = softmax(scale q k' + bias) v, row by row, for every index of a batch of matrices: of samples
// and heads (Vaswani et al. 2017). Nothing as large as the scores is stored between passes: they are computed
// again, block by block, from two numbers a row (Dao et al. 2022).
//
// With s = scale q k' + bias, m_i = max_j s_ij, r_i = 1 / sum_j exp(s_ij - m_i), g the cotangent of y, R{.}
// the derivative along the direction, o the product of elements and <., .>_i the sum over row i:
//
//   forward            p_ij = exp(s_ij - m_i) r_i,   y = p v;   saved: m and r
//   backward           dp = g v',   D_i = <p, dp>_i = <g, y>_i,   ds_ij = p_ij (dp_ij - D_i)
//                      grad_q = scale ds k,   grad_k = scale ds' q,   grad_v = p' g,   grad_bias = ds
//   forward_tangent    Rs = scale (Rq k' + q Rk') + Rbias,   E_i = <p, Rs>_i,   Rp_ij = p_ij (Rs_ij - E_i)
//                      Ry = Rp v + p Rv;   saved: E
//   backward_tangent   R{dp} = Rg v' + g Rv',   R{D}_i = <Rg, y>_i + <g, Ry>_i
//                      R{ds}_ij = Rp_ij (dp_ij - D_i) + p_ij (R{dp}_ij - R{D}_i)
//                      R{grad_q} = scale (R{ds} k + ds Rk),   R{grad_k} = scale (R{ds}' q + ds' Rq)
//                      R{grad_v} = Rp' g + p' Rg,   R{grad_bias} = R{ds}
//
// The softmax has the Jacobian dp_ij / ds_il = p_ij (delta_jl - p_il): its transpose gives ds, it itself Rp,
// and the product rule on ds gives R{ds}. D is <p, g v'> = <g, p v>.
//
// A bias of -inf gives weight 0. A row of nothing but -inf is NaN, as in torch.softmax, or 0 where the layer
// says so (Constants::b), as in torch.nn.functional.scaled_dot_product_attention: then m = r = 0.
//
// Inputs: q, k, v, and the bias, which may be absent. The last four axes of the loops are queries, keys,
// depth (of q and k) and width (of v and y); the axes before them are the batch, that of samples first. An
// operand that is the same along an axis has stride 0, as the keys that several heads share.
#pragma once

#include "layers/declaration.h"
#include "layers/infer.h"

namespace maml {

/// The sizes of the matrices of an attention.
struct AttentionSizes {
  int64_t queries, keys, depth, width;
  explicit AttentionSizes(const Loops& loops)
      : queries(loops.size[loops.axes - 4]),
        keys(loops.size[loops.axes - 3]),
        depth(loops.size[loops.axes - 2]),
        width(loops.size[loops.axes - 1]) {}
};

/// The two axes that the matrices of q, k, v, the bias and y have, of queries, keys, depth and width.
constexpr int kAttentionAxes[5][2] = {{0, 2}, {1, 2}, {1, 3}, {0, 1}, {0, 3}};

/// The number of matrices, of all samples.
inline int64_t attention_batch(const Loops& loops, int64_t n) {
  int64_t count = 1;
  for (int a = 0; a < loops.axes - 4; ++a) count *= extent(loops, a, n);
  return count;
}

template <>
struct Declaration<Kind::attention> {
  static constexpr const char* name = "attention";
  static constexpr LayerClass layer_class = LayerClass::own;
  static constexpr int fewest_inputs = 3, most_inputs = 4;
  static constexpr bool on_cpu = true, on_cuda = true;
  static constexpr bool mixes_samples = false;
  static constexpr bool function_in_place = false;
  static constexpr bool in_lanes = false, in_megakernel = false;

  static Shape infer(const Node& node, std::span<const Shape> x, int64_t) {
    check_attention(node);
    return output_of_loops(node, x);
  }
  static bool is_view(const Image&, bool) { return false; }
  static int64_t work(const Layer& l) {
    const AttentionSizes s(*l.loops);
    return attention_batch(*l.loops, l.n) * s.queries * s.keys * (s.depth + s.width + 8);
  }
};

}  // namespace maml
