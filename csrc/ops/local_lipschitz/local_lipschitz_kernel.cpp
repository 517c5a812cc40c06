#include "ops/local_lipschitz/local_lipschitz_kernel.h"

#include <algorithm>

namespace torch_ext::kernels {
namespace {

constexpr int64_t kLanes = kLipschitzLanes;

template <typename T>
TX_CLONES void lines(const T* __restrict gl, const T* __restrict gu, const T* __restrict sl, const T* __restrict su,
                     bool constant, int64_t count, int64_t pitch, T* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    const LipschitzLines<T> line = lipschitz_lines_of<T>({gl[i], gu[i], sl[i], su[i]}, constant);
    out[i] = line.au;
    out[pitch + i] = line.iu;
    out[2 * pitch + i] = line.al;
    out[3 * pitch + i] = line.il;
  }
}

template <typename T>
TX_HD T fold(T* lane) {
  static_assert(kLanes == 32, "one line for each halving");
  for (int64_t l = 0; l < 16; ++l) lane[l] += lane[l + 16];
  for (int64_t l = 0; l < 8; ++l) lane[l] += lane[l + 8];
  for (int64_t l = 0; l < 4; ++l) lane[l] += lane[l + 4];
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

template <typename T>
struct Pointers {  // the lines of one group
  const T *au, *iu, *al, *il;
};

// One coefficient x: x au or x al, x iu or x il; the same for -x.
template <typename T, bool kSlopes, bool kMirror>
TX_HD void relax_one(T x, const Pointers<T>& line, int64_t h, T* out, T* mirrored, T& up, T& down) {
  const bool above = x > 0, below = x < 0;
  up += x * (above ? line.iu[h] : line.il[h]);
  if (kSlopes) out[h] = x * (above ? line.au[h] : line.al[h]);
  if (kMirror) down -= x * (below ? line.iu[h] : line.il[h]);
  if (kSlopes && kMirror) mirrored[h] = -x * (below ? line.au[h] : line.al[h]);
}

template <typename T, bool kSlopes, bool kMirror>
TX_CLONES void relax_row(const T* __restrict a, const T* __restrict au, const T* __restrict iu, const T* __restrict al,
                         const T* __restrict il, int64_t width, T* __restrict out, T* __restrict mirrored,
                         T* __restrict sum, T* __restrict mirrored_sum) {
  const Pointers<T> line{au, iu, al, il};
  T up[kLanes] = {}, down[kLanes] = {};
  int64_t h = 0;
  for (; h + kLanes <= width; h += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      relax_one<T, kSlopes, kMirror>(a[h + l], line, h + l, out, mirrored, up[l], down[l]);
    }
  }
  for (int64_t l = 0; h + l < width; ++l) {
    relax_one<T, kSlopes, kMirror>(a[h + l], line, h + l, out, mirrored, up[l], down[l]);
  }
  *sum = fold(up);
  if (kMirror) *mirrored_sum = fold(down);
}

template <typename T>
struct Gradients {  // of the lines of one group
  T *au, *iu, *al, *il;
};

template <typename T, bool kSlopes, bool kMirror>
TX_CLONES void relax_row_gradient(const T* __restrict a, const Pointers<T> line, int64_t width,
                                  const T* __restrict grad, const T* __restrict mirrored, T grad_sum, T mirrored_sum,
                                  T* __restrict grad_a, const Gradients<T> to) {
  for (int64_t h = 0; h < width; ++h) {
    const T x = a[h];
    const bool above = x > 0, below = x < 0;
    T total = grad_sum * (above ? line.iu[h] : line.il[h]);
    T iu = above ? x * grad_sum : T(0), il = above ? T(0) : x * grad_sum;
    if (kMirror) {
      total -= mirrored_sum * (below ? line.iu[h] : line.il[h]);
      iu -= below ? x * mirrored_sum : T(0);
      il -= below ? T(0) : x * mirrored_sum;
    }
    if (kSlopes) {
      total += grad[h] * (above ? line.au[h] : line.al[h]);
      T au = above ? x * grad[h] : T(0), al = above ? T(0) : x * grad[h];
      if (kMirror) {
        total -= mirrored[h] * (below ? line.au[h] : line.al[h]);
        au -= below ? x * mirrored[h] : T(0);
        al -= below ? T(0) : x * mirrored[h];
      }
      to.au[h] += au;
      to.al[h] += al;
    }
    to.iu[h] += iu;
    to.il[h] += il;
    grad_a[h] = total;
  }
}

// Pointer to array `k` of the lines of a group: with slopes au, iu, al, il, else iu, il.
template <typename T, typename Pointer>
T* line_at(const LipschitzRelaxWork& work, Pointer base, int64_t k, int64_t group) {
  return static_cast<T*>(base) + (k * work.groups + group) * work.width;
}
template <typename T>
Pointers<T> lines_of(const LipschitzRelaxWork& work, int64_t group) {
  const auto at = [&](int64_t k) { return line_at<const T>(work, work.lines, k, group); };
  return work.slopes ? Pointers<T>{at(0), at(1), at(2), at(3)} : Pointers<T>{nullptr, at(0), nullptr, at(1)};
}
template <typename T>
Gradients<T> gradients_of(const LipschitzRelaxWork& work, int64_t group) {
  const auto at = [&](int64_t k) { return line_at<T>(work, work.grad_lines, k, group); };
  return work.slopes ? Gradients<T>{at(0), at(1), at(2), at(3)} : Gradients<T>{nullptr, at(0), nullptr, at(1)};
}

}  // namespace

void lipschitz_lines_cpu(const LipschitzLinesWork& work, core::DType type, int64_t begin, int64_t end) {
  dispatch_lipschitz_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto at = [&](const void* array) { return static_cast<const T*>(array) + begin; };
    lines<T>(at(work.gl), at(work.gu), at(work.sl), at(work.su), work.constant, end - begin, work.count,
             static_cast<T*>(work.lines) + begin);
  });
}

void lipschitz_lines_gradient_cpu(const LipschitzLinesWork& work, core::DType type, int64_t begin, int64_t end) {
  dispatch_lipschitz_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto in = [](const void* array, int64_t i) { return static_cast<const T*>(array)[i]; };
    for (int64_t i = begin; i < end; ++i) {
      const auto grad = [&](int64_t k) { return in(work.grad_lines, k * work.count + i); };
      const LipschitzEnds<T> ends =
          lipschitz_lines_gradient<T>({in(work.gl, i), in(work.gu, i), in(work.sl, i), in(work.su, i)}, work.constant,
                                      {grad(0), grad(1), grad(2), grad(3)});
      static_cast<T*>(work.grad_gl)[i] = ends.gl;
      static_cast<T*>(work.grad_gu)[i] = ends.gu;
      static_cast<T*>(work.grad_sl)[i] = ends.sl;
      static_cast<T*>(work.grad_su)[i] = ends.su;
    }
  });
}

void lipschitz_relax_cpu(const LipschitzRelaxWork& work, core::DType type, int64_t begin, int64_t end) {
  dispatch_lipschitz_type(type, [&](auto zero) {
    using T = decltype(zero);
    dispatch_lipschitz_relax(work, [&](auto slopes, auto mirror) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / work.rows, row = i % work.rows, to = work.mirror ? group * work.rows + i : i;
        const T* a = static_cast<const T*>(work.a) + (work.shared ? row : i) * work.width;
        T* out = static_cast<T*>(work.out) + (work.slopes ? to * work.width : 0);
        T* sum = static_cast<T*>(work.sums) + to;
        T* mirrored = out + (work.slopes && work.mirror ? work.rows * work.width : 0);
        const Pointers<T> line = lines_of<T>(work, group);
        relax_row<T, decltype(slopes)::value, decltype(mirror)::value>(a, line.au, line.iu, line.al, line.il,
                                                                       work.width, out, mirrored, sum, sum + work.rows);
      }
    });
  });
}

void lipschitz_relax_gradient_cpu(const LipschitzRelaxWork& work, core::DType type, int64_t begin, int64_t end) {
  dispatch_lipschitz_type(type, [&](auto zero) {
    using T = decltype(zero);
    dispatch_lipschitz_relax(work, [&](auto slopes, auto mirror) {
      for (int64_t i = begin * work.rows; i < end * work.rows; ++i) {
        const int64_t group = i / work.rows, row = i % work.rows, from = work.mirror ? group * work.rows + i : i;
        const T* a = static_cast<const T*>(work.a) + (work.shared ? row : i) * work.width;
        const T* grad = static_cast<const T*>(work.grad_out) + (work.slopes ? from * work.width : 0);
        const T* mirrored = grad + (work.slopes && work.mirror ? work.rows * work.width : 0);
        const T* sum = static_cast<const T*>(work.grad_sums) + from;
        const Gradients<T> to = gradients_of<T>(work, group);
        if (row == 0) {
          for (T* line : {to.au, to.iu, to.al, to.il}) {
            if (line != nullptr) std::fill_n(line, work.width, T(0));
          }
        }
        relax_row_gradient<T, decltype(slopes)::value, decltype(mirror)::value>(
            a, lines_of<T>(work, group), work.width, grad, mirrored, sum[0], work.mirror ? sum[work.rows] : T(0),
            static_cast<T*>(work.grad_a) + i * work.width, to);
      }
    });
  });
}

}  // namespace torch_ext::kernels
