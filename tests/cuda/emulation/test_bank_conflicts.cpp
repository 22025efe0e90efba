// Counts the wavefronts of every access of a warp to the product's tiles in shared memory: the reads of the
// arithmetics (tile_layout.h, arithmetic.h) and the writes of the copies (product.h). A wavefront serves 32
// banks of 4 bytes. Lanes that access different words of one bank need several wavefronts; lanes that access
// the same word need one. An access of 16 bytes a lane is split into quarters of a warp. Every 16-byte access
// must take no more wavefronts than its number of distinct words requires. The same of padded matrices
// (padded.h), with the tiles that the lanes of a warp have in the kernel of small perceptrons.
#include <algorithm>
#include <cstdio>
#include <set>
#include <vector>

#include "cuda/product/padded.h"
#include "cuda/product/shared_matrix.h"
#include "cuda/product/tile_layout.h"

namespace {

using namespace maml::cuda;

int failures = 0;

/// The wavefronts of one access to these words, `width` words a lane.
int wavefronts(const std::vector<int>& lanes, int width) {
  const int together = 32 / width;
  int total = 0;
  for (size_t first = 0; first < lanes.size(); first += static_cast<size_t>(together)) {
    std::vector<std::set<int>> banks(32);
    for (size_t i = first; i < std::min(lanes.size(), first + static_cast<size_t>(together)); ++i) {
      for (int w = 0; w < width; ++w) banks[static_cast<size_t>((lanes[i] + w) % 32)].insert(lanes[i] + w);
    }
    size_t most = 1;
    for (const auto& words : banks) most = std::max(most, words.size());
    total += static_cast<int>(most);
  }
  return total;
}

void check(const char* what, const std::vector<int>& words, int width, int most) {
  const int got = wavefronts(words, width);
  if (got <= most) return;
  std::printf("%s: %d wavefronts instead of %d\n", what, got, most);
  ++failures;
}
void check(const char* what, const std::vector<int>& words, int width) {
  check(what, words, width, width);  // one wavefront for each 32 / width lanes
}

/// word(lane) for all 32 lanes.
template <class F>
std::vector<int> warp(F word) {
  std::vector<int> words;
  for (int lane = 0; lane < 32; ++lane) words.push_back(word(lane));
  return words;
}

template <class T, class Layout>
void check_layout() {
  constexpr int V = kVector<T>, kWords = sizeof(T) / 4;
  for (int base = 0; base < Layout::kIndices; base += 8 * V) {
    for (int x = 0; x < V; ++x) {
      if (sizeof(T) == 4) {
        check("matrix operand",
              warp([&](int lane) { return kWords * Layout::vector(base, lane / 4, x, lane % 4); }), 4);
      }
      for (int q = 0; q < 4; ++q) {
        check("SIMT operand B", warp([&](int lane) { return kWords * Layout::vector(base, lane % 8, x, q); }),
              4);
        for (int half = 0; half < 8; half += 4) {
          check("SIMT operand A",
                warp([&](int lane) { return kWords * Layout::vector(base, lane / 8 + half, x, q); }), 4);
        }
      }
    }
  }
  for (int first = 0; first < Layout::kSize / V; first += 32) {  // 32 consecutive threads fill the tile
    check("copy of 16 bytes", warp([&](int lane) {
            const int thread = first + lane;
            if (Layout::kAlongK) {
              const int row = thread / 4;
              return kWords * Layout::vector(row / (8 * V) * (8 * V), row % 8, row / 8 % V, thread % 4);
            }
            const int k = thread / 8 % kSlab<T>, base = thread / 8 / kSlab<T> * (8 * V);
            return kWords * Layout::vector(base, thread % 8, k % V, k / V);
          }),
          4);
  }
  if (!Layout::kAlongK && sizeof(T) == 4) {
    for (int base = 0; base < Layout::kIndices; base += 8 * V) {
      for (int k = 0; k < kSlab<T>; ++k) {
        check("column sums",
              warp([&](int lane) { return Layout::vector(base, lane / V, k % V, k / V) + lane % V; }), 1);
      }
    }
  }
}

/// Every element has a place of its own, and the elements of a vector are contiguous.
template <class T, class Layout>
void check_cover() {
  std::set<int> places;
  for (int base = 0; base < Layout::kIndices; base += 8 * kVector<T>) {
    for (int lane = 0; lane < 8; ++lane) {
      for (int x = 0; x < kVector<T>; ++x) {
        for (int q = 0; q < 4; ++q) places.insert(Layout::vector(base, lane, x, q));
      }
    }
  }
  bool good = static_cast<int>(places.size()) * kVector<T> == Layout::kSize;
  for (const int p : places) good = good && p >= 0 && p < Layout::kSize && p % kVector<T> == 0;
  if (!good) std::printf("elements share a place\n"), ++failures;
}

template <class T, int Indices>
void check_tiles() {
  check_cover<T, AlongK<T, Indices>>();
  check_cover<T, AlongIndex<T, Indices>>();
  check_layout<T, AlongK<T, Indices>>();
  check_layout<T, AlongIndex<T, Indices>>();
}

/// The operands of the units in shared_matrix.h, where a row has at least 8 vectors.
template <class T>
void check_shared_matrix(int columns) {
  using Matrix = SharedMatrix<T>;
  constexpr int V = kVector<T>, kWords = sizeof(T) / 4;
  const int vectors = Matrix::vectors_of(columns);
  auto word = [=](int row, int column) {
    return kWords * (Matrix::offset(vectors, row, column / V) + column % V);
  };
  for (int base = 0; base < 32; base += 16) {
    for (int k = 0; k < columns; k += 16) {
      for (int x = 0; x < 4 && sizeof(T) == 4; ++x) {
        check("unit, columns along k", warp([&](int l) { return word(4 * (l / 4) + x, k + 4 * (l % 4)); }),
              4);
        check("unit, columns along the index",
              warp([&](int l) { return word(base + 4 * (l % 4) + x, 4 * (l / 4)); }), 4);
        check("unit, rows along the index",
              warp([&](int l) { return word(base + 4 * (l % 4) + x, k + 2 * (l / 4)); }), 2);
        if (x < 2) {
          check("unit, rows along k",
                warp([&](int l) { return word(base + 2 * (l / 4) + x, k + 4 * (l % 4)); }), 4);
        }
      }
    }
    for (int k = 0; k < columns; k += V) {
      for (int x = 0; x < 4; ++x) {
        check("SIMT unit, rows along k", warp([&](int l) { return word(base + 4 * (l / 8) + x, k); }), 4);
        check("SIMT unit, columns along k", warp([&](int l) { return word(4 * (l % 8) + x, k); }), 4);
      }
    }
  }
}

/// The loads of a layer of `in` by `out` on n samples (run/small_mlp_tiles.h). Half a warp has 16 tiles of
/// two rows by a vector; of a weight gradient a warp has 32 tiles of a vector by a vector.
template <class T>
void check_padded(int in, int out, int n) {
  constexpr int V = kVector<T>, kWords = sizeof(T) / 4;
  const int in_stride = padded_stride<T>(in), out_stride = padded_stride<T>(out);
  if (in_stride <= in || in_stride / V % 2 == 0) std::printf("a stride is too short or even\n"), ++failures;
  const int row_tiles = (n + 1) / 2;
  auto of_tiles = [&](const char* what, int columns, bool goes_on, auto word) {
    const int tiles = row_tiles * columns;
    for (int first = 0; first < tiles; first += 16) {
      check(what, warp([&](int lane) {
              const int tile = std::min(first + lane % 16, tiles - 1);
              return kWords * word(tile / columns, tile % columns);
            }),
            4, goes_on ? 8 : 4);
    }
  };
  of_tiles("input of a layer", vectors<T>(out), false, [&](int row, int) { return row * in_stride; });
  of_tiles("columns of a weight", vectors<T>(out), true, [&](int, int column) { return column * V; });
  of_tiles("cotangent", vectors<T>(in), false, [&](int row, int) { return row * out_stride; });
  of_tiles("rows of a weight", vectors<T>(in), true, [&](int, int column) { return column * out_stride; });
  const int columns = vectors<T>(out), tiles = vectors<T>(in + 1) * columns;
  for (int first = 0; first < tiles; first += 32) {
    auto tile = [&](int lane) { return std::min(first + lane, tiles - 1); };
    check("input, for a weight's gradient",
          warp([&](int lane) { return kWords * (tile(lane) / columns * V); }), 4);
    check("cotangent, for a weight's gradient",
          warp([&](int lane) { return kWords * (tile(lane) % columns * V); }), 4, 8);
  }
}

}  // namespace

int main() {
  for (int in = 1; in <= 130; ++in) {
    for (const int out : {1, 2, 3, 5, 16, 32, 40, 41, 64, 100}) {
      check_padded<float>(in, out, 10), check_padded<double>(in, out, 25);
      check_padded<float>(out, in, 5);
    }
  }
  check_tiles<float, 32>();
  check_tiles<float, 64>();
  check_tiles<float, 128>();
  check_tiles<double, 32>();
  check_tiles<double, 64>();
  check_shared_matrix<float>(100);
  check_shared_matrix<float>(32);
  check_shared_matrix<double>(40);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
