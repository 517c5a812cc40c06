#include "optim/mfac/mfac_kernel.h"

#include "core/dtype_dispatch.h"

namespace torch_ext::kernels {
namespace {

template <typename S, typename U>
TX_CLONES void update_plain(S* __restrict param, const U* __restrict update, int64_t size,
                            MfacStep<core::opmath_t<S>> f) {
  using T = core::opmath_t<S>;
  for (int64_t i = 0; i < size; ++i) {
    core::store(param[i], f.parameter(core::load(param[i]), static_cast<T>(update[i])));
  }
}

template <typename S, typename U>
TX_CLONES void update_momentum(S* __restrict param, core::opmath_t<S>* __restrict buffer, const U* __restrict update,
                               int64_t size, MfacStep<core::opmath_t<S>> f) {
  using T = core::opmath_t<S>;
  for (int64_t i = 0; i < size; ++i) {
    const T b = f.buffer(buffer[i], static_cast<T>(update[i]));
    buffer[i] = b;
    core::store(param[i], f.parameter(core::load(param[i]), b));
  }
}

template <typename U>
void update(const MfacTensor& t, const U* from, int64_t begin, int64_t size) {
  core::dispatch_dtype(t.type, [&](auto storage) {
    using S = decltype(storage);
    using T = core::opmath_t<S>;
    S* param = static_cast<S*>(t.param) + begin;
    if (t.buffer == nullptr) return update_plain<S, U>(param, from, size, mfac_scalars<T>(t));
    update_momentum<S, U>(param, static_cast<T*>(t.buffer) + begin, from, size, mfac_scalars<T>(t));
  });
}

}  // namespace

void mfac_update_cpu(const MfacTensor& t, const void* from, bool wide, int64_t begin, int64_t end) {
  if (wide) return update(t, static_cast<const double*>(from), begin, end - begin);
  update(t, static_cast<const float*>(from), begin, end - begin);
}

}  // namespace torch_ext::kernels
