// The passes of the convolution against plain loops in double: every pass, every arithmetic, odd shapes,
// absent tensors, add flags, several tasks, in three schedules, each with the same bits in another one.
// Operands of the reduced precisions are rounded before the reference sees them, so that only the order of
// sums differs. Every output starts as NaN, and the NaN between the tensors must still be there afterwards.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "conv2d_reference.h"
#include "cuda/conv2d_raster_gradients.h"
#include "cuda/following.h"
#include "cuda/layers.h"
#include "cuda/product/mma.h"
#include "cuda/product/statistics_entries.h"
#include "memory.h"

namespace {

using namespace maml;
using namespace maml::cuda;
using namespace conv2d_reference;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kGap = 16;  // between tensors

int failures = 0, by_warpgroups = 0;

struct Case {
  int64_t n, c_in, h, w, c_out, kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, pad_bottom,
      pad_right;
};

Layer layer_of(const Case& c, Precision precision) {
  Layer l{};
  l.kind = Kind::conv2d;
  l.n = c.n;
  l.in = {c.c_in, c.h, c.w};
  l.window = {c.kernel_h, c.kernel_w, c.stride_h, c.stride_w, c.pad_top, c.pad_left};
  l.out = {c.c_out, (c.h + c.pad_top + c.pad_bottom - c.kernel_h) / c.stride_h + 1,
           (c.w + c.pad_left + c.pad_right - c.kernel_w) / c.stride_w + 1};
  l.precision = precision;
  return l;
}

double rounded(double v, Precision precision) {
  const float f = static_cast<float>(v);
  if (precision == Precision::tf32) return twin::tf32(to_tf32(f));
  if (precision == Precision::bfloat16) return low_half(to_bf16(f, 0));
  return v;
}

/// One tensor of all tasks: its values, its place, and the values expected after a pass.
struct Tensor {
  std::string name;
  Region region;
  int64_t at, size;
  std::vector<Values> start, rounded, want;  // one for each task; want empty: unchanged
};

template <class T>
class Check {
 public:
  Check(const Case& c, Precision precision, int64_t tasks, emulation::Schedule schedule, unsigned seed)
      : layer_(layer_of(c, precision)), tasks_(tasks), schedule_(schedule), seed_(seed), random_(seed) {
    char text[200];
    std::snprintf(text, sizeof text, "%s%d n %d %dx%dx%d -> %d kernel %dx%d stride %dx%d tasks %d seed %u",
                  sizeof(T) == 4 ? "float/" : "double/", static_cast<int>(precision), int(c.n), int(c.c_in),
                  int(c.h), int(c.w), int(c.c_out), int(c.kernel_h), int(c.kernel_w), int(c.stride_h),
                  int(c.stride_w), int(tasks), seed);
    name_ = text;
  }

  void run() {
    forward();
    backward();
    forward_tangent();
    backward_tangent();
    if (normalises_at_once(layer_)) normalised(), normalised_tangent();
  }
  void run_gradients() {
    backward();
    backward_tangent();
  }

 private:
  bool coin() { return random_() % 2 == 0; }

  int64_t outputs() const { return layer_.n * size(layer_.out); }
  int64_t inputs() const { return layer_.n * size(layer_.in); }
  int64_t pixels() const { return outputs() / layer_.out.c; }

  void begin() {
    tensors_.clear();
    tensors_.reserve(32);  // never reallocated: references to its elements are kept
    for (int64_t& end : ends_) end = kGap;
  }
  Tensor& tensor(const char* name, int64_t size, Region region = Region::task) {
    int64_t& end = ends_[static_cast<int>(region)];
    tensors_.push_back({name, region, end, size, {}, {}, {}});
    end += whole(size) + kGap;
    return tensors_.back();
  }
  /// A tensor of random values; T* is symbolic.
  T* input(Tensor*& out, const char* name, int64_t size, Region region = Region::task) {
    Tensor& t = tensor(name, size, region);
    std::uniform_real_distribution<double> value(-1, 1);
    for (int64_t task = 0; task < tasks_; ++task) {
      t.start.emplace_back(size);
      if (region == Region::shared && task > 0) {
        t.start.back() = t.start.front();
      } else {
        for (double& v : t.start.back()) v = static_cast<T>(value(random_));
      }
      Values r = t.start.back();
      if (sizeof(T) == 4) {
        for (double& v : r) v = ::rounded(v, layer_.precision);
      }
      t.rounded.push_back(r);
    }
    out = &t;
    return place<T>(region, t.at);
  }
  /// An output: NaN, or, with `add`, random values that the result is added to. `want` starts as zero or as
  /// these.
  T* output(Tensor*& out, const char* name, int64_t size, bool add = false) {
    T* symbolic;
    if (add) {
      symbolic = input(out, name, size);
      out->want = out->start;
    } else {
      Tensor& t = tensor(name, size);
      out = &t;
      symbolic = place<T>(Region::task, t.at);
      t.start.assign(static_cast<size_t>(tasks_), Values(static_cast<size_t>(size), kNaN));
      t.want.assign(static_cast<size_t>(tasks_), Values(static_cast<size_t>(size), 0.0));
    }
    return symbolic;
  }
  static int64_t whole(int64_t size) { return (size + 15) / 16 * 16; }

  /// The region of x: the workspace, or the user's tensors, whose alignment is not known.
  Region x_region() { return coin() ? Region::task : Region::x_support; }

  /// Runs a pass and compares; then again with the blocks and threads in another order, which must give the
  /// same bits.
  template <class Pass>
  void execute(const char* pass, Pass launch_pass, Tensors<T> t) {
    const int64_t scratch = footprint(layer_).scratch;
    Tensor& s = tensor("scratch", scratch);
    t.scratch = place<T>(Region::task, s.at);
    std::vector<T> bits[2];
    for (const bool again : {false, true}) {
      emulation::set_schedule(again ? other(schedule_) : schedule_, seed_);
      Table table{};
      std::vector<unsigned char*> raw;
      for (int r = 0; r < static_cast<int>(Region::count); ++r) {
        const bool shared = r == static_cast<int>(Region::shared),
                   users = r == static_cast<int>(Region::x_support);
        const int64_t of_task = ends_[r], all = shared ? of_task : of_task * tasks_;
        void* p = nullptr;
        if (posix_memalign(&p, 64, static_cast<size_t>(all + 1) * sizeof(T)) != 0) std::abort();
        raw.push_back(static_cast<unsigned char*>(p));
        std::fill_n(static_cast<T*>(p), all + 1, std::numeric_limits<T>::quiet_NaN());
        table.regions[r] = {raw.back() + (users ? sizeof(T) : 0),
                            shared ? 0 : of_task * static_cast<int64_t>(sizeof(T))};
      }
      auto at = [&](const Tensor& tensor, int64_t task) {
        const Span& span = table.regions[static_cast<int>(tensor.region)];
        return reinterpret_cast<T*>(span.start + task * span.stride) + tensor.at;
      };
      for (const Tensor& x : tensors_) {
        for (int64_t task = 0; task < tasks_ && !x.start.empty(); ++task) {
          for (int64_t i = 0; i < x.size; ++i) at(x, task)[i] = static_cast<T>(x.start[task][i]);
        }
      }
      launch_pass({nullptr, tasks_, memory_of(table)}, layer_, t);
      for (const Tensor& x : tensors_) {
        for (int64_t task = 0; task < tasks_; ++task) {
          if (!x.start.empty()) {
            if (!again) compare(pass, x, at(x, task), task);
            bits[again].insert(bits[again].end(), at(x, task), at(x, task) + x.size);
          }
          for (int64_t i = 1; i <= kGap; ++i) {
            const T before = at(x, task)[-i], after = at(x, task)[whole(x.size) + i - 1];
            if (before == before || after == after) {
              std::printf("%s, %s: wrote outside %s\n", name_.c_str(), pass, x.name.c_str());
              ++failures;
              break;
            }
          }
        }
      }
      for (unsigned char* p : raw) std::free(p);
    }
    if (std::memcmp(bits[0].data(), bits[1].data(), bits[0].size() * sizeof(T)) != 0) {
      std::printf("%s, %s: the bits depend on the order of the blocks\n", name_.c_str(), pass);
      ++failures;
    }
    if (!counters_are_zero()) {
      std::printf("%s, %s: a counter is not zero\n", name_.c_str(), pass);
      std::exit(1);
    }
  }
  static emulation::Schedule other(emulation::Schedule schedule) {
    return schedule == emulation::Schedule::backward ? emulation::Schedule::forward
                                                     : emulation::Schedule::backward;
  }

  void compare(const char* pass, const Tensor& x, const T* got, int64_t task) {
    const Values& want = x.want.empty() ? x.start[task] : x.want[task];
    double scale = 1, worst = 0;  // operands are of size 1
    int64_t where = 0;
    for (const double v : want) scale = std::max(scale, std::abs(v));
    for (int64_t i = 0; i < x.size; ++i) {
      const double error = std::abs(static_cast<double>(got[i]) - want[i]);
      if (!(error <= worst)) worst = error, where = i;
      if (error != error) break;
    }
    const double tolerance = sizeof(T) == 8 ? 1e-13 : layer_.precision == Precision::bf16x3 ? 1e-4 : 4e-6;
    if (worst <= tolerance * scale) return;
    std::printf("%s, %s: %s of task %d at %d is %g, should be %g (scale %g)\n", name_.c_str(), pass,
                x.name.c_str(), static_cast<int>(task), static_cast<int>(where),
                static_cast<double>(got[where]), want[where], scale);
    ++failures;
  }

  /// Adds the entries [entries, parts, c] expected of y, or of y and y_dot. Of entries that are folded, the
  /// first stands for all of them, and the others are left as they were.
  T* statistics(const Tensor& y, const Tensor* dot) {
    const int64_t rows = conv2d_statistics_rows(layer_), c = layer_.out.c, m = pixels();
    const int step = statistics_entries(m, c).step;
    const int64_t entries = (m + rows - 1) / rows, parts = dot ? 3 : 2;
    Tensor* s;
    T* symbolic = output(s, "statistics", entries * parts * c);
    for (int64_t task = 0; task < tasks_; ++task) {
      const Values& a = dot ? y.start[task] : y.want[task];
      const Values& b = dot ? dot->want[task] : y.want[task];
      for (int64_t e = 0; e < entries; ++e) {
        for (int64_t o = 0; o < c; ++o) {
          const int64_t end = std::min(m, (e + (e % step == 0 ? step : 1)) * rows);
          double mean_a = 0, mean_b = 0, products = 0;
          for (int64_t i = e * rows; i < end; ++i) mean_a += a[i * c + o], mean_b += b[i * c + o];
          mean_a /= static_cast<double>(end - e * rows);
          mean_b /= static_cast<double>(end - e * rows);
          for (int64_t i = e * rows; i < end; ++i)
            products += (a[i * c + o] - mean_a) * (b[i * c + o] - mean_b);
          double* to = &s->want[task][static_cast<size_t>(e * parts * c + o)];
          if (dot) *to = mean_a, to += c;
          *to = mean_b;
          to[c] = products;
        }
      }
    }
    return symbolic;
  }

  void forward() {
    begin();
    Tensors<T> t;
    Tensor *x, *w, *b = nullptr, *y;
    const Region theta = coin() ? Region::shared : Region::task;
    t.x[0] = input(x, "x", inputs(), x_region());
    t.w[0] = input(w, "w", weights(layer_), theta);
    if (coin()) t.w[1] = input(b, "b", layer_.out.c, theta);
    t.y = output(y, "y", outputs());
    for (int64_t task = 0; task < tasks_; ++task) {
      if (b) fill_rows(y->want[task], b->start[task]);
      add_convolution(layer_, x->rounded[task], w->rounded[task], y->want[task]);
    }
    if (coin()) t.statistics = statistics(*y, nullptr);
    execute("forward", passes_of<T>(Kind::conv2d).forward, t);
  }

  /// Random choices of which gradients are wanted, and which are added to.
  void gradients(Tensors<T>& t, T*& to_x, T* (&to_w)[kMostParameters], Tensor*& x, Tensor*& w, Tensor*& b) {
    for (bool* flag : {&t.add_x[0], &t.add_w[0], &t.add_w[1]}) *flag = coin();
    if (random_() % 4) to_x = output(x, "gradient of x", inputs(), t.add_x[0]);
    if (random_() % 4) to_w[0] = output(w, "gradient of w", weights(layer_), t.add_w[0]);
    if (random_() % 4) to_w[1] = output(b, "gradient of b", layer_.out.c, t.add_w[1]);
  }

  /// Runs a pass of gradients; if conv2d_raster_gradients.h has served it, again on a GPU without wgmma.
  /// Pairs of factors; the second one is absent where its first factor is null.
  template <class Pass>
  void execute_on_both(const char* pass, Pass launch_pass, const Tensors<T>& t,
                       [[maybe_unused]] std::pair<T*, T*> grad_w, [[maybe_unused]] T* grad_x,
                       [[maybe_unused]] const std::pair<const T*, const T*> (&of_w)[2],
                       [[maybe_unused]] const std::pair<const T*, const T*> (&of_x)[2]) {
    execute(pass, launch_pass, t);
    if constexpr (sizeof(T) == 4) {
      WeightTerms<T> weight{{}, t.add_w[0], t.add_w[1], grad_w.first, grad_w.second};
      InputTerms<T> input{{}, t.add_x[0], grad_x};
      for (int i = 0; i < 2; ++i) {
        if (of_w[i].first) weight.terms.add(of_w[i].first, of_w[i].second);
        if (of_x[i].first) input.terms.add(of_x[i].first, of_x[i].second);
      }
      if (!raster_gradients_serve(layer_, weight, input)) return;
      ++by_warpgroups;
      emulation::host.major = 8;
      execute((std::string(pass) + " without wgmma").c_str(), launch_pass, t);
      emulation::host.major = 9;
    }
  }

  void backward() {
    begin();
    Tensors<T> t;
    Tensor *x, *w, *g, *grad_x = nullptr, *grad_w = nullptr, *grad_b = nullptr;
    t.x[0] = input(x, "x", inputs(), x_region());
    t.w[0] = input(w, "w", weights(layer_));
    t.grad_y = input(g, "grad_y", outputs());
    gradients(t, t.grad_x[0], t.grad_w, grad_x, grad_w, grad_b);
    for (int64_t task = 0; task < tasks_; ++task) {
      if (grad_x) add_input_gradient(layer_, g->rounded[task], w->rounded[task], grad_x->want[task]);
      if (grad_w) add_weight_gradient(layer_, x->rounded[task], g->rounded[task], grad_w->want[task]);
      if (grad_b) add_columns(g->start[task], grad_b->want[task]);
    }
    execute_on_both("backward", passes_of<T>(Kind::conv2d).backward, t, {t.grad_w[0], t.grad_w[1]},
                    t.grad_x[0], {{t.x[0], t.grad_y}, {}}, {{t.grad_y, t.w[0]}, {}});
  }

  void forward_tangent() {
    begin();
    Tensors<T> t;
    Tensor *x, *w, *x_dot = nullptr, *w_dot = nullptr, *b_dot = nullptr, *y, *y_dot;
    t.x[0] = input(x, "x", inputs(), x_region());
    t.w[0] = input(w, "w", weights(layer_));
    if (random_() % 4) t.x_dot[0] = input(x_dot, "x_dot", inputs());
    if (random_() % 4) t.w_dot[0] = input(w_dot, "w_dot", weights(layer_));
    if (coin()) t.w_dot[1] = input(b_dot, "b_dot", layer_.out.c);
    t.y = input(y, "y", outputs());
    t.y_dot = output(y_dot, "y_dot", outputs());
    for (int64_t task = 0; task < tasks_; ++task) {
      Values& want = y_dot->want[task];
      if (b_dot) fill_rows(want, b_dot->start[task]);
      if (x_dot) add_convolution(layer_, x_dot->rounded[task], w->rounded[task], want);
      if (w_dot) add_convolution(layer_, x->rounded[task], w_dot->rounded[task], want);
    }
    if (coin()) t.statistics_dot = statistics(*y, y_dot);
    execute("forward_tangent", passes_of<T>(Kind::conv2d).forward_tangent, t);
  }

  /// A normalisation of the convolution's output, with its tensors: gamma, beta and what is saved.
  struct Norm {
    Layer layer{};
    Tensors<T> tensors;
    Tensor *gamma, *beta, *saved;
  };
  Norm norm() {
    Norm norm;
    const int64_t c = layer_.out.c;
    norm.layer.kind = random_() % 3 ? Kind::norm_block : Kind::batch_norm;
    norm.layer.function = coin() ? Function::relu : Function::leaky_relu;
    norm.layer.a = 0.2, norm.layer.eps = 0.1;
    norm.layer.n = layer_.n, norm.layer.in = norm.layer.out = layer_.out;
    norm.tensors.w[0] = input(norm.gamma, "gamma", c);
    norm.tensors.w[1] = input(norm.beta, "beta", c);
    norm.tensors.saved = input(norm.saved, "saved", 6 * c);
    norm.saved->want = norm.saved->start;
    return norm;
  }
  /// f and its derivative at u.
  static std::pair<double, double> activation(const Layer& l, double u) {
    const double slope = l.kind == Kind::batch_norm || u > 0 ? 1 : l.function == Function::relu ? 0 : l.a;
    return {slope * u, slope};
  }
  /// The mean and the inverse deviation of channel `o` of z.
  std::pair<double, double> moments(const Values& z, int64_t o, double eps) const {
    const int64_t c = layer_.out.c, m = pixels();
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < m; ++i) mean += z[i * c + o] / static_cast<double>(m);
    for (int64_t i = 0; i < m; ++i) {
      variance += (z[i * c + o] - mean) * (z[i * c + o] - mean) / static_cast<double>(m);
    }
    return {mean, 1 / std::sqrt(variance + eps)};
  }

  void normalised() {
    begin();
    const int64_t c = layer_.out.c;
    Tensors<T> t;
    Tensor *x, *w, *z, *y;
    t.x[0] = input(x, "x", inputs(), x_region());
    t.w[0] = input(w, "w", weights(layer_));
    t.y = output(z, "z", outputs());
    Norm n = norm();
    n.tensors.x[0] = t.y, n.tensors.y = output(y, "y", outputs());
    for (int64_t task = 0; task < tasks_; ++task) {
      add_convolution(layer_, x->rounded[task], w->rounded[task], z->want[task]);
      for (int64_t o = 0; o < c; ++o) {
        const auto [mean, s] = moments(z->want[task], o, n.layer.eps);
        n.saved->want[task][o] = mean, n.saved->want[task][c + o] = s;
        for (int64_t i = o; i < outputs(); i += c) {
          const double u = n.gamma->start[task][o] * (z->want[task][i] - mean) * s + n.beta->start[task][o];
          y->want[task][i] = activation(n.layer, u).first;
        }
      }
    }
    t.statistics = n.tensors.statistics = statistics(*z, nullptr);
    execute(
        "forward, normalised",
        [&](const Launcher& launch, const Layer& l, const Tensors<T>& tensors) {
          convolve_and_normalise<T>(launch, l, tensors, {n.layer, n.tensors, false});
        },
        t);
  }

  void normalised_tangent() {
    begin();
    const int64_t c = layer_.out.c, m = pixels();
    Tensors<T> t;
    Tensor *x, *w, *x_dot, *w_dot, *z, *z_dot, *y_dot, *gamma_dot, *beta_dot;
    t.x[0] = input(x, "x", inputs(), x_region());
    t.w[0] = input(w, "w", weights(layer_));
    t.x_dot[0] = input(x_dot, "x_dot", inputs());
    t.w_dot[0] = input(w_dot, "w_dot", weights(layer_));
    t.y = input(z, "z", outputs());
    t.y_dot = output(z_dot, "z_dot", outputs());
    Norm n = norm();
    n.tensors.w_dot[0] = input(gamma_dot, "gamma_dot", c);
    n.tensors.w_dot[1] = input(beta_dot, "beta_dot", c);
    n.tensors.x[0] = t.y, n.tensors.x_dot[0] = t.y_dot, n.tensors.y_dot = output(y_dot, "y_dot", outputs());
    for (int64_t task = 0; task < tasks_; ++task) {
      Values& dot = z_dot->want[task];
      const Values& of_z = z->start[task];
      add_convolution(layer_, x_dot->rounded[task], w->rounded[task], dot);
      add_convolution(layer_, x->rounded[task], w_dot->rounded[task], dot);
      for (int64_t o = 0; o < c; ++o) {
        const auto [mean, s] = moments(of_z, o, n.layer.eps);
        double mean_dot = 0, correlation = 0;
        for (int64_t i = o; i < outputs(); i += c) mean_dot += dot[i] / static_cast<double>(m);
        for (int64_t i = o; i < outputs(); i += c)
          correlation += (of_z[i] - mean) * s * dot[i] / static_cast<double>(m);
        n.saved->start[task][o] = n.saved->want[task][o] = mean;
        n.saved->start[task][c + o] = n.saved->want[task][c + o] = s;
        n.saved->want[task][4 * c + o] = mean_dot, n.saved->want[task][5 * c + o] = correlation;
        const double gamma = n.gamma->start[task][o], beta = n.beta->start[task][o];
        for (int64_t i = o; i < outputs(); i += c) {
          const double xh = (of_z[i] - mean) * s, xh_dot = s * (dot[i] - mean_dot - xh * correlation);
          const double u_dot = gamma * xh_dot + gamma_dot->start[task][o] * xh + beta_dot->start[task][o];
          y_dot->want[task][i] = activation(n.layer, gamma * xh + beta).second * u_dot;
        }
      }
    }
    t.statistics_dot = n.tensors.statistics_dot = statistics(*z, z_dot);
    execute(
        "forward_tangent, normalised",
        [&](const Launcher& launch, const Layer& l, const Tensors<T>& tensors) {
          convolve_and_normalise<T>(launch, l, tensors, {n.layer, n.tensors, true});
        },
        t);
  }

  void backward_tangent() {
    begin();
    Tensors<T> t;
    Tensor *x, *w, *g = nullptr, *g_dot, *x_dot = nullptr, *w_dot = nullptr;
    Tensor *grad_x = nullptr, *grad_w = nullptr, *grad_b = nullptr;
    t.x[0] = input(x, "x", inputs(), x_region());
    t.w[0] = input(w, "w", weights(layer_));
    if (random_() % 4) t.grad_y = input(g, "grad_y", outputs());
    t.grad_y_dot = input(g_dot, "grad_y_dot", outputs());
    if (random_() % 4) t.x_dot[0] = input(x_dot, "x_dot", inputs());
    if (random_() % 4) t.w_dot[0] = input(w_dot, "w_dot", weights(layer_));
    gradients(t, t.grad_x_dot[0], t.grad_w_dot, grad_x, grad_w, grad_b);
    for (int64_t task = 0; task < tasks_; ++task) {
      if (grad_x) {
        add_input_gradient(layer_, g_dot->rounded[task], w->rounded[task], grad_x->want[task]);
        if (g && w_dot)
          add_input_gradient(layer_, g->rounded[task], w_dot->rounded[task], grad_x->want[task]);
      }
      if (grad_w) {
        add_weight_gradient(layer_, x->rounded[task], g_dot->rounded[task], grad_w->want[task]);
        if (g && x_dot)
          add_weight_gradient(layer_, x_dot->rounded[task], g->rounded[task], grad_w->want[task]);
      }
      if (grad_b) add_columns(g_dot->start[task], grad_b->want[task]);
    }
    const bool x_moves = g && x_dot, w_moves = g && w_dot;
    execute_on_both("backward_tangent", passes_of<T>(Kind::conv2d).backward_tangent, t,
                    {t.grad_w_dot[0], t.grad_w_dot[1]}, t.grad_x_dot[0],
                    {{t.x[0], t.grad_y_dot}, {x_moves ? t.x_dot[0] : nullptr, t.grad_y}},
                    {{t.grad_y_dot, t.w[0]}, {w_moves ? t.grad_y : nullptr, t.w_dot[0]}});
  }

  Layer layer_;
  int64_t tasks_;
  emulation::Schedule schedule_;
  unsigned seed_;
  std::mt19937 random_;
  std::string name_;
  std::vector<Tensor> tensors_;
  int64_t ends_[static_cast<int>(Region::count)] = {};
};

}  // namespace

int main(int argc, char** argv) {
  // n, c_in h w, c_out, kernel, stride, padding top left bottom right
  const Case cases[] = {
      {5, 1, 1, 1, 40, 1, 1, 1, 1, 0, 0, 0, 0},  // linear
      {7, 64, 1, 1, 5, 1, 1, 1, 1, 0, 0, 0, 0},
      {80, 20, 1, 1, 33, 1, 1, 1, 1, 0, 0, 0, 0},
      {2, 3, 7, 6, 8, 3, 3, 1, 1, 1, 1, 1, 1},
      {1, 16, 9, 9, 16, 3, 3, 2, 2, 1, 1, 1, 1},  // four parity classes
      {2, 8, 5, 6, 5, 5, 2, 1, 2, 2, 0, 1, 1},
      {1, 5, 8, 7, 3, 1, 1, 3, 3, 0, 0, 0, 0},  // classes without taps
      {1, 4, 10, 11, 12, 3, 3, 3, 2, 2, 0, 1, 1},
      {3, 33, 4, 4, 8, 3, 3, 1, 1, 1, 1, 1, 1},
      {1, 8, 6, 9, 36, 5, 2, 2, 3, 0, 1, 2, 0},
      {2, 4, 9, 10, 1, 3, 3, 1, 1, 0, 0, 0, 0},
      {1, 2, 13, 13, 4, 3, 3, 4, 4, 1, 1, 1, 1},   // more classes than one launch takes
      {1, 4, 3, 3, 4, 3, 3, 5, 5, 0, 0, 0, 0},     // stride beyond the image
      {3, 32, 5, 4, 40, 3, 3, 2, 2, 1, 1, 1, 1},   // long sums of few outputs
      {300, 8, 1, 1, 40, 1, 1, 1, 1, 0, 0, 0, 0},  // long sums over samples
      {2, 2, 65, 66, 34, 1, 1, 1, 1, 0, 0, 0, 0},  // statistics of many rows, folded
  };
  // Gradients by matrix instructions of a warpgroup, in the precisions that have them.
  const Case of_warpgroups[] = {
      {1, 32, 9, 8, 32, 3, 3, 1, 1, 1, 1, 1, 1},
      {1, 64, 7, 6, 128, 3, 3, 2, 2, 1, 1, 1, 1},
      {1, 32, 8, 9, 32, 3, 3, 1, 2, 0, 2, 2, 0},
  };
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 3;
  unsigned seed = 1, seed_of_warpgroups = 6;  // which layers are served depends on the seed
  for (int round = 0; round < rounds; ++round) {
    const auto schedule = static_cast<emulation::Schedule>(round % 3);
    for (const Case& c : cases) {
      if (kSmallTiles && c.n * c.h * c.w > 1000) continue;  // there, fewer rows are folded
      for (const Precision precision :
           {Precision::float32, Precision::bf16x3, Precision::tf32, Precision::bfloat16}) {
        Check<float>(c, precision, 1 + seed % 3, schedule, seed).run();
        ++seed;
      }
      Check<double>(c, Precision::tf32, 2, schedule, seed++).run();
    }
    for (const Case& c : of_warpgroups) {
      for (const Precision precision : {Precision::bf16x3, Precision::bfloat16}) {
        Check<float>(c, precision, 1 + seed_of_warpgroups % 2, schedule, seed_of_warpgroups).run_gradients();
        ++seed_of_warpgroups;
      }
    }
  }
  std::printf("%d failures; %d gradients by warpgroups\n", failures, by_warpgroups);
  return failures != 0 || by_warpgroups == 0;
}
