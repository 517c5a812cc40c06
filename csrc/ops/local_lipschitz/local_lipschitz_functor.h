// Linear bounds of a product p = g s with g in [gl, gu] and s in [sl, su] (arXiv:2210.07394, written for any slopes).
//
// For fixed g the product is linear in s, so p lies between min(g sl, g su), concave in g, and max(g sl, g su), convex:
// the best lines are the functions themselves where g has one sign, else the chords through the ends of [gl, gu]. This
// also holds for negative slopes (GELU, SiLU). For a ReLU of unknown sign, sl = 0 and su = 1.
#pragma once

#include "core/macros.h"
#include "core/math.h"

namespace torch_ext::kernels {

template <typename T>
struct LipschitzLines {  // au g + iu above p, al g + il below
  T au, iu, al, il;
};
template <typename T>
struct LipschitzEnds {
  T gl, gu, sl, su;
};

// g s, and 0 for s = 0 also where a bound g has overflown.
template <typename T>
TX_HD T lipschitz_times(T g, T s) {
  return s == 0 ? T(0) : g * s;
}

// Whether chords exist: the sign of g is open, and gu - gl neither overflows nor is too small to divide by.
template <typename T>
TX_HD bool lipschitz_chords(T gl, T gu, bool constant) {
  const T d = gu - gl;
  return !constant && d > T(1e-30) && d < T(1e30);
}

// `constant`: slopes of 0 where the sign of g is open, as RecurJac has them (arXiv:1810.11783).
template <typename T>
TX_HD LipschitzLines<T> lipschitz_lines_of(const LipschitzEnds<T>& e, bool constant) {
  if (e.sl == e.su) return {e.sl, T(0), e.su, T(0)};
  if (e.gl >= 0) return {e.su, T(0), e.sl, T(0)};
  if (e.gu <= 0) return {e.sl, T(0), e.su, T(0)};
  const T low_low = lipschitz_times(e.gl, e.sl), low_up = lipschitz_times(e.gl, e.su);
  const T up_low = lipschitz_times(e.gu, e.sl), up_up = lipschitz_times(e.gu, e.su);
  if (!lipschitz_chords(e.gl, e.gu, constant)) {
    return {T(0), low_low > up_up ? low_low : up_up, T(0), low_up < up_low ? low_up : up_low};
  }
  const T d = e.gu - e.gl, gap = e.gl / d * e.gu * (e.sl - e.su);
  return {(up_up - low_low) / d, gap, (up_low - low_up) / d, -gap};
}

// Gradients of the ends from those of the lines; at a tie, those of the branch taken.
template <typename T>
TX_HD LipschitzEnds<T> lipschitz_lines_gradient(const LipschitzEnds<T>& e, bool constant, const LipschitzLines<T>& d) {
  if (e.sl == e.su) return {T(0), T(0), d.au, d.al};
  if (e.gl >= 0) return {T(0), T(0), d.al, d.au};
  if (e.gu <= 0) return {T(0), T(0), d.au, d.al};
  if (!lipschitz_chords(e.gl, e.gu, constant)) {
    const bool low = lipschitz_times(e.gl, e.sl) > lipschitz_times(e.gu, e.su);
    const bool left = lipschitz_times(e.gl, e.su) < lipschitz_times(e.gu, e.sl);
    return {(low ? d.iu * e.sl : T(0)) + (left ? d.il * e.su : T(0)),
            (low ? T(0) : d.iu * e.su) + (left ? T(0) : d.il * e.sl),
            (low ? d.iu * e.gl : T(0)) + (left ? T(0) : d.il * e.gu),
            (low ? T(0) : d.iu * e.gu) + (left ? d.il * e.gl : T(0))};
  }
  const T width = e.gu - e.gl, l = e.gl / width, u = e.gu / width, q = e.sl - e.su;
  const T slope = (d.au - d.al) / width * q, gap = (d.iu - d.il) * q;
  return {gap * u * u - slope * u, slope * l - gap * l * l, (d.iu - d.il) * e.gl * u - d.au * l + d.al * u,
          d.au * u - d.al * l - (d.iu - d.il) * e.gl * u};
}

}  // namespace torch_ext::kernels
