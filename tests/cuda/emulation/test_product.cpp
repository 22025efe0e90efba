// The product of a block (product.h) with all tiles that GPUs use; the layers' own tests have too few outputs
// for the larger ones. Every arithmetic, tile and pair of operands is compared with a plain loop, by vectors
// and by elements, with one term and two.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "cuda/conv2d.h"
#include "memory.h"

namespace {

using namespace maml;
using namespace maml::cuda;

int failures = 0;

template <class T, class A, class B>
struct Problem {
  A a;
  B b;
  Terms<T> terms;
  T* c;
  int m, n, k;
  bool vectors_c, add;
};

template <class Arithmetic, class Tile, class A, class B>
__global__ void product_kernel(Problem<typename Arithmetic::T, A, B> p, Deferred deferred) {
  const Memory memory = deferred.ready();
  using Own = Product<Arithmetic, Tile, A, B>;
  const int m0 = static_cast<int>(blockIdx.x) * Tile::kM, n0 = static_cast<int>(blockIdx.y) * Tile::kN;
  typename Own::Accumulators sums;
  Own::compute(p.a, p.b, p.terms, memory, 0, m0, n0, 0, p.k, sums, [](bool, const auto*, auto) {});
  const auto at = Own::position(m0, n0);
  if (!at.owner) return;
  write<Own>(at, sums, p.n, p.vectors_c, p.add,
             [&](int row) { return row < p.m ? p.c + static_cast<int64_t>(row) * p.n : nullptr; });
}

/// A[m, k] and B[k, n] in the order in which each operand stores them.
PixelsByTaps operand(PixelsByTaps, int m, int, int k) {
  return {PatchGather(m, {k, 1, 1}, 1, 1, 1, 1, 0, 0, 1, 1)};
}
TapsByPixels operand(TapsByPixels, int m, int, int k) {
  return {PatchGather(k, {m, 1, 1}, 1, 1, 1, 1, 0, 0, 1, 1)};
}
Rows operand(Rows, int, int n, int k) { return {k, n}; }
Taps operand(Taps, int, int n, int k) { return {n, k, k, 0, 0, 0, Divisor(k), Divisor(1)}; }

/// The start of the region that holds real addresses: 16, because a region that starts at 0 counts as absent.
constexpr uint64_t kStart = 16;
Table real_addresses() {
  Table table{};
  table.regions[static_cast<int>(Region::task)] = {reinterpret_cast<unsigned char*>(kStart), 0};
  return table;
}
template <class T>
const T* symbolic(const T* real) {
  return place<const T>(Region::task) + (reinterpret_cast<uint64_t>(real) - kStart) / sizeof(T);
}

template <class Arithmetic, class Tile, class A, class B>
void check(int m, int n, int k, int count, bool vectors) {
  using T = typename Arithmetic::T;
  std::mt19937 random(static_cast<unsigned>(m + n + k + count));
  std::uniform_int_distribution<int> small(-8, 8);  // products and sums are exact in every arithmetic
  struct alignas(16) Line {
    T element[16 / sizeof(T)];
  };
  auto memory = [](int size) { return std::vector<Line>(static_cast<size_t>(size) * sizeof(T) / 16 + 1); };
  auto elements = [](std::vector<Line>& v) { return reinterpret_cast<T*>(v.data()); };
  std::vector<Line> a[2] = {memory(m * k), memory(m * k)}, b[2] = {memory(k * n), memory(k * n)},
                    c = memory(m * n);
  Problem<T, A, B> p{
      operand(A(), m, n, k), operand(B(), m, n, k), {}, elements(c), m, n, k, vectors, count == 2};
  p.terms.vectors_a = p.terms.vectors_b = vectors;
  for (int t = 0; t < count; ++t) {
    for (int i = 0; i < m * k; ++i) elements(a[t])[i] = static_cast<T>(small(random));
    for (int i = 0; i < k * n; ++i) elements(b[t])[i] = static_cast<T>(small(random));
    p.terms.add(symbolic(elements(a[t])), symbolic(elements(b[t])));
  }
  std::vector<T> want(static_cast<size_t>(m * n), p.add ? T(3) : T(0));
  for (int i = 0; i < m * n; ++i) p.c[i] = p.add ? T(3) : std::numeric_limits<T>::quiet_NaN();
  for (int t = 0; t < count; ++t) {
    for (int i = 0; i < m; ++i) {
      for (int q = 0; q < k; ++q) {
        const T x = elements(a[t])[A::kAlongK ? i * k + q : q * m + i];
        for (int j = 0; j < n; ++j) {
          want[static_cast<size_t>(i * n + j)] += x * elements(b[t])[B::kAlongK ? j * k + q : q * n + j];
        }
      }
    }
  }
  constexpr int kBytes = Product<Arithmetic, Tile, A, B>::kSharedBytes;
  const Table table = real_addresses();
  Launcher{nullptr, 1, Deferred()}("product", product_kernel<Arithmetic, Tile, A, B>,
                                   {blocks_for(m, Tile::kM), blocks_for(n, Tile::kN)}, Tile::kThreads, kBytes,
                                   p, memory_of(table));
  for (int i = 0; i < m * n; ++i) {
    if (p.c[i] == want[static_cast<size_t>(i)]) continue;
    std::printf(
        "%s tile %d x %d, along k %d %d, %d x %d x %d, %d terms, vectors %d: C[%d, %d] is %g, should be %g\n",
        __PRETTY_FUNCTION__, Tile::kM, Tile::kN, A::kAlongK, B::kAlongK, m, n, k, count, vectors, i / n,
        i % n, static_cast<double>(p.c[i]), static_cast<double>(want[static_cast<size_t>(i)]));
    ++failures;
    return;
  }
}

template <class Arithmetic, class Tile>
void check_tile(int count) {
  check<Arithmetic, Tile, PixelsByTaps, Rows>(136, 68, 44, count, true);
  check<Arithmetic, Tile, PixelsByTaps, Taps>(37, 28, 132, count, true);
  check<Arithmetic, Tile, TapsByPixels, Rows>(132, 36, 37, count, true);
  check<Arithmetic, Tile, PixelsByTaps, Rows>(33, 35, 27, count, false);
  check<Arithmetic, Tile, PixelsByTaps, Taps>(131, 3, 35, count, false);
  check<Arithmetic, Tile, TapsByPixels, Rows>(27, 66, 67, count, false);
}

template <class Arithmetic>
void check_arithmetic() {
  using Device = Tiles<Arithmetic, false>;
  check_tile<Arithmetic, typename Device::Wide>(1);
  check_tile<Arithmetic, typename Device::Narrow>(2);
  check_tile<Arithmetic, typename Device::Small>(2);
}

/// to_tf32 against integer arithmetic: half of the last place that stays is added to the word.
void check_rounding() {
  std::mt19937 random(1);
  std::vector<uint32_t> words = {0,           0x80000000u, 0x3f800fffu, 0x3f801000u, 0x3f801fffu,
                                 0x3fffffffu, 0x7f7fefffu, 0x7f7ff000u, 0x7f7fffffu, 0x7f800000u,
                                 0xff800000u, 0x00800000u, 0x00ffffffu};
  for (int i = 0; i < 100000; ++i) words.push_back(random());
  for (const uint32_t word : {0x7fffffffu, 0xffffffffu, 0x7f800001u, 0xffc00000u}) words.push_back(word);
  for (const uint32_t word : words) {
    const float x = __uint_as_float(word), got = twin::tf32(to_tf32(x));
    const bool subnormal = (word & 0x7f800000u) == 0,
               finite = std::abs(x) <= std::numeric_limits<float>::max();
    const float want = twin::tf32(word + (finite && !subnormal ? 0x1000u : 0u));
    if (x != x ? got != got : __float_as_uint(got) == __float_as_uint(want)) continue;
    std::printf("to_tf32(%08x) is %08x, should be %08x\n", word, __float_as_uint(got), __float_as_uint(want));
    ++failures;
  }
}

}  // namespace

int main() {
  check_rounding();
  for (int schedule = 0; schedule < 3; ++schedule) {
    emulation::set_schedule(static_cast<emulation::Schedule>(schedule), 1);
    check_arithmetic<Simt<float>>();
    check_arithmetic<Simt<double>>();
    check_arithmetic<Tf32>();
    check_arithmetic<Bf16>();
    check_arithmetic<Bf16x3>();
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
