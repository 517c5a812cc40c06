// Elementwise passes over lists of tensors that every optimizer shares: the non-finite check and weighted accumulation.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/macros.h"
#include "core/multi_tensor.h"

namespace torch_ext::kernels {

struct ConstTensor {
  const void* data;
  int64_t numel;
};

// True if any of the elements is infinite or NaN.
bool has_nonfinite_cpu(const void* data, core::DType type, int64_t begin, int64_t end);
// Sets *flag (device memory) to 1 if any element of any tensor is infinite or NaN; leaves it otherwise.
void has_nonfinite_cuda(const std::vector<ConstTensor>& tensors, core::DType type, float* flag, void* stream);

// sum <- sum + weight * sign * x, in the arithmetic type of x; sign (+-1, type of x) may be null.
struct AccumulateTensor {
  void* sum;
  const void* x;
  const void* sign;
  int64_t numel;
};
void accumulate_cpu(const AccumulateTensor& tensor, core::DType type, double weight, int64_t begin, int64_t end);
void accumulate_cuda(const std::vector<AccumulateTensor>& tensors, core::DType type, double weight, void* stream);

// The arithmetic of both, shared with the CUDA source.
template <typename S>
TX_HD bool is_nonfinite(S stored) {
  const auto x = core::load(stored);
  return !(x - x == 0);
}
template <typename S, typename T = core::opmath_t<S>>
TX_HD T accumulated(T sum, S x, T sign, T weight) {
  return sum + weight * (sign * core::load(x));
}

}  // namespace torch_ext::kernels
