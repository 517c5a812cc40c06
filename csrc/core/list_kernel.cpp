#include "core/list_kernel.h"

#include <algorithm>

#include "core/dtype_dispatch.h"

namespace torch_ext::kernels {
namespace {

template <typename S>
TX_CLONES bool any_nonfinite(const S* __restrict x, int64_t size) {
  constexpr int64_t kStretch = 4096;  // leave early, but not inside the vector loop
  for (int64_t begin = 0; begin < size; begin += kStretch) {
    const int64_t end = std::min(size, begin + kStretch);
    int32_t found = 0;
    for (int64_t i = begin; i < end; ++i) found |= static_cast<int32_t>(is_nonfinite(x[i]));
    if (found != 0) return true;
  }
  return false;
}

template <typename S, bool kSigned>
TX_CLONES void accumulate(core::opmath_t<S>* __restrict sum, const S* __restrict x, const S* __restrict sign,
                          int64_t size, core::opmath_t<S> weight) {
  using T = core::opmath_t<S>;
  for (int64_t i = 0; i < size; ++i) sum[i] = accumulated(sum[i], x[i], kSigned ? core::load(sign[i]) : T(1), weight);
}

}  // namespace

bool has_nonfinite_cpu(const void* data, core::DType type, int64_t begin, int64_t end) {
  return core::dispatch_dtype(type, [&](auto storage) {
    return any_nonfinite(static_cast<const decltype(storage)*>(data) + begin, end - begin);
  });
}

void accumulate_cpu(const AccumulateTensor& t, core::DType type, double weight, int64_t begin, int64_t end) {
  core::dispatch_dtype(type, [&](auto storage) {
    using S = decltype(storage);
    using T = core::opmath_t<S>;
    auto* body = t.sign == nullptr ? accumulate<S, false> : accumulate<S, true>;
    const auto* sign = t.sign == nullptr ? nullptr : static_cast<const S*>(t.sign) + begin;
    body(static_cast<T*>(t.sum) + begin, static_cast<const S*>(t.x) + begin, sign, end - begin, static_cast<T>(weight));
  });
}

}  // namespace torch_ext::kernels
