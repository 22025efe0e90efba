// The passes of the stem (stem.h): the computations per channel, and how they are combined with the products.
//
// Per channel, the threads of a block are arranged as in channels.h, with the elements of a patch as rows.
// Absent parameters count as zero, gamma as one. blockIdx: y channels, z task. The twin on the CPU is
// cpu/stem.cpp.
#include <algorithm>

#include "cuda/channels.h"
#include "cuda/implement.h"
#include "cuda/run/work.h"
#include "cuda/stem.h"
#include "plan/problem.h"

namespace maml::cuda {
namespace {

/// One channel's values, read from the parameters and from what the passes saved.
template <class T>
struct Channel {
  const Tensors<T>& t;
  StemSaved<T> saved;
  const double *pbar, *G;
  int patch, channels, o;

  __device__ __forceinline__ Channel(const Layer& l, const Tensors<T>& t_, int channel)
      : t(t_),
        saved(t_.saved, patch_size(l.window, l.in), l.out.c),
        pbar(reinterpret_cast<const double*>(t_.x[1])),
        G(pbar + patch_size(l.window, l.in)),
        patch(static_cast<int>(patch_size(l.window, l.in))),
        channels(static_cast<int>(l.out.c)),
        o(channel) {}

  static __device__ __forceinline__ double value(const T* p, int64_t i, double otherwise) {
    return p ? static_cast<double>(p[i]) : otherwise;
  }
  __device__ __forceinline__ int64_t at(int e) const { return static_cast<int64_t>(e) * channels + o; }
  __device__ __forceinline__ double w(int e) const { return static_cast<double>(t.w[0][at(e)]); }
  __device__ __forceinline__ double w_dot(int e) const { return value(t.w_dot[0], at(e), 0); }
  __device__ __forceinline__ double a() const { return value(t.w[2], o, 1) * saved.s[o]; }
  __device__ __forceinline__ double k() const {
    return saved.s[o] * (value(t.w_dot[2], o, 0) - a() * saved.c[o]);
  }
  /// Element e of G v.
  __device__ __forceinline__ double gram(int e, const T* v) const {
    double sum = 0;
#pragma unroll 4
    for (int q = 0; q < patch; ++q) sum += G[e * patch + q] * static_cast<double>(v[at(q)]);
    return sum;
  }
};

/// Computes weights and bias of the stem's convolution into scratch, [patch, o] and [o].
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    stem_weights_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Tensors<T> t = resolve(symbolic, memory, blockIdx.z);
  const ChannelThreads threads = channel_threads(l.out.c);
  const Channel<T> ch(l, t, threads.channel);
  double sum[2];
  channel_sums(threads, ch.patch, sum, [&](int e, double (&to)[2]) {
    const double Gw = ch.gram(e, t.w[0]);
    ch.saved.Gw[ch.at(e)] = Gw;
    to[0] += ch.pbar[e] * ch.w(e);
    to[1] += Gw * ch.w(e);
  });
  if (!threads.active) return;
  const double mu = sum[0], s = 1 / std::sqrt((sum[1] > 0 ? sum[1] : 0) + l.eps);
  const double a = ch.value(t.w[2], ch.o, 1) * s;
  if (threads.row == 0) {
    ch.saved.mu[ch.o] = mu;
    ch.saved.s[ch.o] = s;
    t.scratch[ch.at(ch.patch)] = static_cast<T>(ch.value(t.w[3], ch.o, 0) - a * mu);
  }
  for (int e = threads.row; e < ch.patch; e += threads.rows)
    t.scratch[ch.at(e)] = static_cast<T>(a * ch.w(e));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    stem_weights_tangent_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Tensors<T> t = resolve(symbolic, memory, blockIdx.z);
  const ChannelThreads threads = channel_threads(l.out.c);
  const Channel<T> ch(l, t, threads.channel);
  double sum[2];
  channel_sums(threads, ch.patch, sum, [&](int e, double (&to)[2]) {
    to[0] += ch.pbar[e] * ch.w_dot(e);
    to[1] += ch.saved.Gw[ch.at(e)] * ch.w_dot(e);
  });
  if (!threads.active) return;
  const double s = ch.saved.s[ch.o], a = ch.a(), Rmu = sum[0], c = s * sum[1];
  const double k = s * (ch.value(t.w_dot[2], ch.o, 0) - a * c);
  if (threads.row == 0) {
    ch.saved.Rmu[ch.o] = Rmu;
    ch.saved.c[ch.o] = c;
    t.scratch[ch.at(ch.patch)] =
        static_cast<T>(ch.value(t.w_dot[3], ch.o, 0) - a * Rmu - k * ch.saved.mu[ch.o]);
  }
  for (int e = threads.row; e < ch.patch; e += threads.rows) {
    t.scratch[ch.at(e)] = static_cast<T>(a * ch.w_dot(e) + k * ch.w(e));
  }
}

/// The cotangent before the pool, from the cotangent of y: rows in window order, zero but for the chosen
/// pixels.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    spread_kernel(int rows, int windows, int channels, const T* symbolic_g, const uint8_t* symbolic_places,
                  T* symbolic_out, Deferred deferred) {
  const Memory memory = deferred.ready();
  const T* const g = resolve(symbolic_g, memory, blockIdx.z);
  const uint8_t* const places = resolve(symbolic_places, memory, blockIdx.z);
  T* const out = resolve(symbolic_out, memory, blockIdx.z);
  const ChannelThreads threads = channel_threads(channels);
  if (!threads.active) return;
  const int step = static_cast<int>(gridDim.x) * threads.rows;
  for (int row = static_cast<int>(blockIdx.x) * threads.rows + threads.row; row < rows; row += step) {
    const WindowRow r = window_row(kVector<T>, row);
    const int64_t from = static_cast<int64_t>(r.window) * channels + threads.channel;
    const bool chosen = r.window < windows && places[from] == r.member;
    out[static_cast<int64_t>(row) * channels + threads.channel] = chosen ? g[from] : T(0);
  }
}

template <class T>
__device__ __forceinline__ void give(T* to, int64_t i, double value, bool add) {
  if (to) to[i] = add ? to[i] + static_cast<T>(value) : static_cast<T>(value);
}

/// Computes the gradients from D and G1.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    stem_gradients_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Tensors<T> t = resolve(symbolic, memory, blockIdx.z);
  const ChannelThreads threads = channel_threads(l.out.c);
  const Channel<T> ch(l, t, threads.channel);
  const T* const D = ch.saved.D;
  double sum[1];
  channel_sums(threads, ch.patch, sum,
               [&](int e, double (&to)[1]) { to[0] += ch.w(e) * static_cast<double>(D[ch.at(e)]); });
  if (!threads.active) return;
  const double G1 = static_cast<double>(ch.saved.G1[ch.o]), s = ch.saved.s[ch.o], a = ch.a();
  const double G2 = s * (sum[0] - ch.saved.mu[ch.o] * G1);
  for (int e = threads.row; e < ch.patch; e += threads.rows) {
    const double u = static_cast<double>(D[ch.at(e)]) - G1 * ch.pbar[e] - s * G2 * ch.saved.Gw[ch.at(e)];
    give(t.grad_w[0], ch.at(e), a * u, t.add_w[0]);
  }
  if (threads.row > 0) return;
  ch.saved.G2[ch.o] = G2;
  give(t.grad_w[1], ch.o, 0, t.add_w[1]);
  give(t.grad_w[2], ch.o, G2, t.add_w[2]);
  give(t.grad_w[3], ch.o, G1, t.add_w[3]);
}

/// Computes the tangents of the gradients from D' and R1, [patch, o] and [o] in scratch. grad_y may be
/// absent: then D, G1, G2 and all tangents of the forward pass count as zero.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    stem_gradients_tangent_kernel(Layer l, Tensors<T> symbolic, Deferred deferred) {
  const Memory memory = deferred.ready();
  const Tensors<T> t = resolve(symbolic, memory, blockIdx.z);
  const ChannelThreads threads = channel_threads(l.out.c);
  const Channel<T> ch(l, t, threads.channel);
  const bool moves = t.grad_y != nullptr, turns = moves && t.w_dot[0];
  const T *const D = ch.saved.D, *const D_dot = t.scratch;
  double sum[2];
  channel_sums(threads, ch.patch, sum, [&](int e, double (&to)[2]) {
    to[0] += ch.w(e) * static_cast<double>(D_dot[ch.at(e)]);
    if (turns) to[1] += ch.w_dot(e) * static_cast<double>(D[ch.at(e)]);
  });
  if (!threads.active) return;
  const double R1 = static_cast<double>(D_dot[ch.at(ch.patch)]), s = ch.saved.s[ch.o], a = ch.a();
  const double G1 = moves ? static_cast<double>(ch.saved.G1[ch.o]) : 0, G2 = moves ? ch.saved.G2[ch.o] : 0;
  const double c = moves ? ch.saved.c[ch.o] : 0, k = moves ? ch.k() : 0;
  const double Rmu = moves ? ch.saved.Rmu[ch.o] : 0;
  const double R2 = s * (sum[0] - ch.saved.mu[ch.o] * R1 + sum[1] - Rmu * G1 - c * G2);
  for (int e = threads.row; e < ch.patch; e += threads.rows) {
    const double Gw = ch.saved.Gw[ch.at(e)];
    double u_dot = static_cast<double>(D_dot[ch.at(e)]) - R1 * ch.pbar[e] - s * (R2 - s * c * G2) * Gw;
    if (turns) u_dot -= s * G2 * ch.gram(e, t.w_dot[0]);
    const double u = moves ? static_cast<double>(D[ch.at(e)]) - G1 * ch.pbar[e] - s * G2 * Gw : 0;
    give(t.grad_w_dot[0], ch.at(e), a * u_dot + k * u, t.add_w[0]);
  }
  if (threads.row > 0) return;
  give(t.grad_w_dot[1], ch.o, 0, t.add_w[1]);
  give(t.grad_w_dot[2], ch.o, R2, t.add_w[2]);
  give(t.grad_w_dot[3], ch.o, R1, t.add_w[3]);
}

/// The scratch: weights or patch sums [patch, o], followed by bias or cotangent sums [o]; then the cotangents
/// before the pool; then the scratch of the weight gradient.
struct StemScratch {
  int64_t weights, spread;
  explicit StemScratch(const Layer& l)
      : weights(whole_lines((patch_size(l.window, l.in) + 1) * l.out.c)),
        spread(l.pooled ? window_rows(l.n * l.out.h * l.out.w) * l.out.c : 0) {}
};

template <class T>
StemSaved<T> saved_of(const Layer& l, const Tensors<T>& t) {
  return {t.saved, patch_size(l.window, l.in), l.out.c};
}

Grid per_channel(const Layer& l) { return {1, blocks_for(l.out.c, channel_width(l.out.c))}; }

/// Computes y or y_dot by the weights in scratch.
template <class T>
void convolve_stem(const Launcher& launch, const char* name, const Layer& l, const Tensors<T>& t,
                   bool tangent) {
  Terms<T> terms;
  terms.add(t.x[0], t.scratch);
  const T* const bias = t.scratch + patch_size(l.window, l.in) * l.out.c;
  T* const y = tangent ? t.y_dot : t.y;
  if (l.pooled) {
    convolve_and_pool(launch, name, l, terms, bias, tangent, y, saved_of(l, t).places);
  } else {
    convolve(launch, name, l, terms, bias, y, StatisticsOf<T>{});
  }
}

/// sums [patch, o] = sum g p, column_sums [o] = sum g, for the cotangent g before the pool.
template <class T>
void patch_sums(const Launcher& launch, const char* name, const Layer& l, const Tensors<T>& t,
                const T* grad_y, T* sums, T* column_sums) {
  const StemScratch scratch(l);
  const int64_t windows = l.n * l.out.h * l.out.w, c = l.out.c;
  const T* g = grad_y;
  if (l.pooled) {
    T* const spread = t.scratch + scratch.weights;
    const int64_t rows = window_rows(windows);
    note([&] { return traffic<T>(rows * c + windows * c, 1); });
    launch("stem unpool", spread_kernel<T>, channel_grid(rows, c, 4), kThreads, 0, static_cast<int>(rows),
           static_cast<int>(windows), static_cast<int>(c), grad_y, saved_of(l, t).places, spread,
           launch.memory);
    g = spread;
  }
  Terms<T> terms;
  terms.add(t.x[0], g);
  weight_gradient(launch, name, l, terms, false, false, sums, column_sums,
                  t.scratch + scratch.weights + scratch.spread);
}

template <class T>
void forward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  launch("stem weights", stem_weights_kernel<T>, per_channel(l), kThreads, 0, l, t, launch.memory);
  convolve_stem(launch, "stem forward", l, t, false);
}

template <class T>
void backward(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  const StemSaved<T> saved = saved_of(l, t);
  patch_sums<T>(launch, "stem patch sums", l, t, t.grad_y, saved.D, saved.G1);
  launch("stem gradients", stem_gradients_kernel<T>, per_channel(l), kThreads, 0, l, t, launch.memory);
}

template <class T>
void forward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  launch("stem weights tangent", stem_weights_tangent_kernel<T>, per_channel(l), kThreads, 0, l, t,
         launch.memory);
  convolve_stem(launch, "stem forward tangent", l, t, true);
}

template <class T>
void backward_tangent(const Launcher& launch, const Layer& l, const Tensors<T>& t) {
  patch_sums<T>(launch, "stem patch sums tangent", l, t, t.grad_y_dot, t.scratch,
                t.scratch + patch_size(l.window, l.in) * l.out.c);
  launch("stem gradients tangent", stem_gradients_tangent_kernel<T>, per_channel(l), kThreads, 0, l, t,
         launch.memory);
}

}  // namespace

template <>
struct OnGpu<Kind::stem> {
  static Footprint footprint(const Layer& l) {
    refuse_large(l);
    const StemScratch scratch(l);
    const int64_t patch = patch_size(l.window, l.in), outputs = l.pooled ? l.n * size(l.out) : 0;
    return {StemSaved<float>::size(patch, l.out.c, outputs),
            scratch.weights + scratch.spread + weight_gradient_scratch(l)};
  }
  template <class T>
  static LaunchPasses<T> passes() {
    return {forward<T>, backward<T>, forward_tangent<T>, backward_tangent<T>};
  }
};
template struct Implementation<Kind::stem>;

}  // namespace maml::cuda
