#include "ops/philox4x32/philox4x32_kernel.h"

namespace torch_ext::kernels {

TX_CLONES void philox4x32_cpu(const int64_t* counter, const int64_t* key, int64_t* out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) philox4x32_row(counter + 4 * row, key + 2 * row, out + 4 * row);
}

}  // namespace torch_ext::kernels
