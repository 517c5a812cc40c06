#include "optim/adahessian/adahessian_kernel.h"

#include <algorithm>

#include "core/block_reduce.h"

namespace torch_ext::kernels {
namespace {

using core::load;
using core::opmath_t;
using core::store;

// Elements worked on at a time. Two short loops over few streams each, the second moments and then the parameters, move
// 5 to 10 % more bytes a second than one loop over all five streams; from 1024 elements on they move fewer.
constexpr int64_t kStretch = 256;

template <typename S, typename G, Root R, bool kRefresh>
TX_CLONES void step_elements(S* __restrict param, const G* __restrict grad, const G* __restrict curvature,
                             opmath_t<S>* __restrict exp_avg, opmath_t<S>* __restrict second, int64_t size,
                             AdaHessianStep<opmath_t<S>, R> f) {
  using T = opmath_t<S>;
  T denominators[kStretch];
  for (int64_t begin = 0; begin < size; begin += kStretch) {
    const int64_t count = std::min(kStretch, size - begin);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = begin + k;
      T v = second[i];
      if constexpr (kRefresh) {
        v = f.second_moment(v, static_cast<T>(load(curvature[i])) * f.curvature_scale);
        second[i] = v;
      }
      denominators[k] = f.denominator(v);
    }
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = begin + k;
      T p = load(param[i]), m = exp_avg[i];
      f.parameter(p, m, static_cast<T>(load(grad[i])), denominators[k]);
      exp_avg[i] = m;
      store(param[i], p);
    }
  }
}

// A run of elements whose denominators stand ready, one each (kStride 1) or one for all (kStride 0).
template <typename S, typename G, Root R, int kStride>
TX_CLONES void step_averaged(S* __restrict param, const G* __restrict grad, opmath_t<S>* __restrict exp_avg,
                             const opmath_t<S>* __restrict denominators, int64_t size,
                             AdaHessianStep<opmath_t<S>, R> f) {
  using T = opmath_t<S>;
  for (int64_t i = 0; i < size; ++i) {
    T p = load(param[i]), m = exp_avg[i];
    f.parameter(p, m, static_cast<T>(load(grad[i])), denominators[i * kStride]);
    exp_avg[i] = m;
    store(param[i], p);
  }
}

// Sums of |c| (or c) over `count` blocks.
template <typename G, bool kAbsolute>
TX_CLONES void block_sums(const G* __restrict curvature, int64_t count, int64_t block, double* __restrict sums) {
  for (int64_t b = 0; b < count; ++b) {
    const G* at = curvature + b * block;
    sums[b] = core::sum_block(block, [=](int64_t i) {
      const auto c = static_cast<double>(load(at[i]));
      return kAbsolute ? core::absolute(c) : c;
    });
  }
}

template <typename T, Root R>
TX_CLONES void refresh_second(T* __restrict second, const double* __restrict sums, int64_t count, double block,
                              AdaHessianStep<T, R> f) {
  for (int64_t b = 0; b < count; ++b) {
    second[b] = f.second_moment(second[b], static_cast<T>(sums[b] / block) * f.curvature_scale);
  }
}

template <typename T, Root R>
TX_CLONES void fill_denominators(const T* __restrict second, int64_t count, T* __restrict denominators,
                                 AdaHessianStep<T, R> f) {
  for (int64_t b = 0; b < count; ++b) denominators[b] = f.denominator(second[b]);
}

template <typename T>
TX_CLONES void repeat_each(const T* __restrict from, int64_t count, int64_t times, T* __restrict to) {
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t i = 0; i < times; ++i) to[b * times + i] = from[b];
  }
}

// Whole blocks [begin, end): a cache-sized stretch at a time, first the second moments of its blocks, then its
// elements.
template <typename S, typename G, Root R>
void step_blocks(const AdaHessianTensor& t, const AdaHessianArgs& a, const AdaHessianStep<opmath_t<S>, R>& f,
                 int64_t begin, int64_t end) {
  using T = opmath_t<S>;
  constexpr int64_t kShort = 64;
  double sums[kStretch];
  T denominators[kStretch], each[kStretch];
  const int64_t per_stretch = std::max<int64_t>(1, kStretch / t.block);
  for (int64_t first = begin / t.block; first * t.block < end; first += per_stretch) {
    const int64_t count = std::min(per_stretch, end / t.block - first), at = first * t.block;
    T* second = static_cast<T*>(t.exp_hessian_diag_sq) + first;
    if (a.refresh) {
      auto* sum = a.signed_mean ? block_sums<G, false> : block_sums<G, true>;
      sum(static_cast<const G*>(t.curvature) + at, count, t.block, sums);
      refresh_second<T, R>(second, sums, count, static_cast<double>(t.block), f);
    }
    fill_denominators<T, R>(second, count, denominators, f);
    S* param = static_cast<S*>(t.param) + at;
    const G* grad = static_cast<const G*>(t.grad) + at;
    T* exp_avg = static_cast<T*>(t.exp_avg) + at;
    if (t.block <= kShort) {
      repeat_each(denominators, count, t.block, each);
      step_averaged<S, G, R, 1>(param, grad, exp_avg, each, count * t.block, f);
      continue;
    }
    for (int64_t b = 0; b < count; ++b, param += t.block, grad += t.block, exp_avg += t.block) {
      step_averaged<S, G, R, 0>(param, grad, exp_avg, denominators + b, t.block, f);
    }
  }
}

}  // namespace

void adahessian_step_cpu(const AdaHessianTensor& t, const AdaHessianArgs& a, int64_t begin, int64_t end) {
  if (adahessian_waits(a, t)) return;
  adahessian_dispatch(a, [&](auto storage, auto grad_storage, auto root) {
    using S = decltype(storage);
    using G = decltype(grad_storage);
    using T = opmath_t<S>;
    constexpr Root R = decltype(root)::value;
    const auto f = adahessian_scalars<T, R>(a, t.bias_products);
    if (t.block > 1) return step_blocks<S, G, R>(t, a, f, begin, end);
    auto* step = a.refresh ? step_elements<S, G, R, true> : step_elements<S, G, R, false>;
    step(static_cast<S*>(t.param) + begin, static_cast<const G*>(t.grad) + begin,
         a.refresh ? static_cast<const G*>(t.curvature) + begin : nullptr, static_cast<T*>(t.exp_avg) + begin,
         static_cast<T*>(t.exp_hessian_diag_sq) + begin, end - begin, f);
  });
}

}  // namespace torch_ext::kernels
