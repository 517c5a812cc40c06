#include "optim/eggroll/eggroll_trits.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace torch_ext::optim {
namespace {

constexpr int64_t kDigits = 5;
constexpr uint8_t kBad = 255;

}  // namespace

at::Tensor pack_trits(const at::Tensor& signs, int64_t count, bool bad) {
  const at::Tensor from = signs.contiguous(), bytes = at::zeros({(count + kDigits - 1) / kDigits}, at::kByte);
  TORCH_CHECK_VALUE(from.numel() <= count, "pack_trits: ", from.numel(), " signs do not fit ", count);
  const double* in = from.const_data_ptr<double>();
  auto* const out = bytes.data_ptr<uint8_t>();
  if (bad) std::fill(out, out + bytes.numel(), kBad);
  int power = 1;
  for (int64_t i = 0; !bad && i < from.numel(); ++i) {
    const int digit = in[i] > 0 ? 1 : in[i] < 0 ? 2 : 0;
    power = i % kDigits == 0 ? 1 : power * 3;
    out[i / kDigits] = static_cast<uint8_t>(out[i / kDigits] + power * digit);
  }
  return bytes;
}

at::Tensor unpack_trits(const at::Tensor& bytes, int64_t count, bool* bad) {
  const int64_t each = (count + kDigits - 1) / kDigits, processes = each == 0 ? 0 : bytes.numel() / each;
  const at::Tensor from = bytes.contiguous(), signs = at::zeros({processes * count}, at::kDouble);
  const auto* const in = from.const_data_ptr<uint8_t>();
  double* out = signs.data_ptr<double>();
  *bad = false;
  for (int64_t p = 0; p < processes; ++p) {
    int left = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (i % kDigits == 0) left = in[p * each + i / kDigits];
      if (left == kBad && i % kDigits == 0) *bad = true;
      if (*bad) continue;
      const int digit = left % 3;
      left /= 3;
      out[p * count + i] = digit == 2 ? -1.0 : static_cast<double>(digit);
    }
  }
  return signs;
}

at::Tensor bit_checksum(const at::Tensor& tensor) {
  const at::Tensor flat = tensor.detach().contiguous().view({-1});
  const at::Tensor bits = flat.view(flat.element_size() == 2   ? at::kShort
                                    : flat.element_size() == 4 ? at::kInt
                                                               : at::kLong);
  const at::Tensor places = at::arange(bits.numel(), bits.options().dtype(at::kLong)).mul_(2).add_(1);
  return places.mul_(bits).sum().reshape({1});
}

}  // namespace torch_ext::optim
