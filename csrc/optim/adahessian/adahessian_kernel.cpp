#include "optim/adahessian/adahessian_kernel.h"

#include <algorithm>

#include "core/block_reduce.h"

namespace torch_ext::kernels {
namespace {

using core::load;
using core::opmath_t;
using core::store;

template <typename S, typename G, Root R, bool kRefresh>
TX_CLONES void step_elements(S* __restrict param, const G* __restrict grad, const G* __restrict curvature,
                             opmath_t<S>* __restrict exp_avg, opmath_t<S>* __restrict second, int64_t size,
                             AdaHessianStep<opmath_t<S>, R> f) {
  using T = opmath_t<S>;
  for (int64_t i = 0; i < size; ++i) {
    T v = second[i];
    if constexpr (kRefresh) {
      v = f.second_moment(v, static_cast<T>(load(curvature[i])) * f.curvature_scale);
      second[i] = v;
    }
    T p = load(param[i]), m = exp_avg[i];
    f.parameter(p, m, static_cast<T>(load(grad[i])), f.denominator(v));
    exp_avg[i] = m;
    store(param[i], p);
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

template <typename G>
TX_CLONES double block_sum(const G* __restrict curvature, int64_t size, bool absolute) {
  if (absolute) {
    return core::sum_block(size, [=](int64_t i) { return core::absolute(static_cast<double>(load(curvature[i]))); });
  }
  return core::sum_block(size, [=](int64_t i) { return static_cast<double>(load(curvature[i])); });
}

// Blocks of [begin, end): second moments first, a cache-sized stretch at a time, then their elements.
template <typename S, typename G, Root R>
void step_blocks(const AdaHessianTensor& t, const AdaHessianArgs& a, const AdaHessianStep<opmath_t<S>, R>& f,
                 int64_t begin, int64_t end) {
  using T = opmath_t<S>;
  constexpr int64_t kStretch = 4096, kShort = 64;
  auto* param = static_cast<S*>(t.param);
  const auto* grad = static_cast<const G*>(t.grad);
  auto* exp_avg = static_cast<T*>(t.exp_avg);
  auto* second = static_cast<T*>(t.exp_hessian_diag_sq);
  T denominators[kStretch];
  int64_t pending = begin;  // first element whose denominator waits in the buffer
  for (int64_t at = begin; at < end; at += t.block) {
    T& v = second[at / t.block];
    if (a.refresh) {
      const double sum = block_sum(static_cast<const G*>(t.curvature) + at, t.block, !a.signed_mean);
      v = f.second_moment(v, static_cast<T>(sum / static_cast<double>(t.block)) * f.curvature_scale);
    }
    const T denominator = f.denominator(v);
    if (t.block > kShort) {
      step_averaged<S, G, R, 0>(param + at, grad + at, exp_avg + at, &denominator, t.block, f);
      continue;
    }
    std::fill_n(denominators + (at - pending), t.block, denominator);
    const int64_t next = at + t.block;
    if (next == end || next + t.block - pending > kStretch) {
      step_averaged<S, G, R, 1>(param + pending, grad + pending, exp_avg + pending, denominators, next - pending, f);
      pending = next;
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
