// A max-pool over disjoint windows of 2 x 2 pixels, on vectors of channels: the largest value of a window and
// its place, and the value at a given place of another window. A place is 2 row + column, stored as a T. The
// first of equal values wins, and a NaN wins, as in torch.
#pragma once

#include "cpu/simd.h"

namespace maml::MAML_ISA {

template <class T>
inline void largest_of(const Vector<T> (&v)[4], Vector<T>& best, Vector<T>& place) {
  best = v[0];
  place = Vector<T>{};
#pragma GCC unroll 4
  for (int p = 1; p < 4; ++p) {
    const auto larger = (v[p] > best) | (v[p] != v[p]);
    best = larger ? v[p] : best;
    place = larger ? broadcast(static_cast<T>(p)) : place;
  }
}

template <class T>
inline Vector<T> picked(const Vector<T> (&v)[4], Vector<T> place) {
  const Vector<T> top = place == broadcast(T(1)) ? v[1] : v[0];
  const Vector<T> bottom = place == broadcast(T(3)) ? v[3] : v[2];
  return place >= broadcast(T(2)) ? bottom : top;
}

/// x where the place equals p, else zero.
template <class T>
inline Vector<T> placed(Vector<T> x, Vector<T> place, int p) {
  return place == broadcast(static_cast<T>(p)) ? x : Vector<T>{};
}

/// The four pixels of a window whose first pixel is at x; `below` is the distance from a pixel to the one
/// below.
template <class T, class L>
inline void load_window(const T* x, int64_t channels, int64_t below, const L& lanes, Vector<T> (&v)[4]) {
  v[0] = load(x, lanes), v[1] = load(x + channels, lanes);
  v[2] = load(x + below, lanes), v[3] = load(x + below + channels, lanes);
}

/// Calls f(j, lanes) for the vectors of the channels [first, last).
template <class T, class F>
inline void each_vector(int64_t first, int64_t last, F f) {
  for (int64_t j = first; j < last; j += kLanes<T>) {
    f(j, Lanes<T>(last - j < kLanes<T> ? last - j : kLanes<T>));
  }
}
template <class T, class F>
inline void each_vector(int64_t channels, F f) {
  each_vector<T>(0, channels, f);
}

}  // namespace maml::MAML_ISA
