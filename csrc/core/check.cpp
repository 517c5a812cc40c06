#include "core/check.h"

#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <sstream>
#include <utility>
#include <vector>

namespace torch_ext::core {

std::string describe(const char* what, size_t index, const at::Tensor& tensor) {
  std::ostringstream text;
  text << what << ' ' << index << " (shape " << tensor.sizes() << ')';
  return text.str();
}

namespace {

// Each stride must step over everything that the smaller ones reach. That also refuses a few interleaved layouts in
// which no two elements meet, such as sizes (3, 2) with strides (2, 3).
void refuse_overlapping(const at::Tensor& tensor, const char* what, size_t index) {
  if (tensor.numel() == 0 || tensor.is_non_overlapping_and_dense()) return;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    TORCH_CHECK(stride > reach, describe(what, index, tensor),
                " is expanded or overlapping: several of its elements share one memory location; use .contiguous()");
    reach += stride * (size - 1);
  }
}

}  // namespace

DType dtype_of(const at::Tensor& tensor, const std::string& what) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat;
    case at::kDouble:
      return DType::kDouble;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kHalf;
    default:
      TORCH_CHECK_TYPE(false, what, " has dtype ", tensor.scalar_type(),
                       "; supported are float32, float64, bfloat16 and float16");
  }
}

at::ScalarType arithmetic_type(at::ScalarType storage) { return storage == at::kDouble ? at::kDouble : at::kFloat; }

void check_gradient(const char* optimizer, size_t ordinal, const at::Tensor& param, const at::Tensor& grad) {
  const auto name = [&] { return describe("parameter", ordinal, param); };
  TORCH_CHECK(!param.is_complex(), optimizer, " does not support complex parameters: ", name(),
              "; use torch.view_as_real on it");
  TORCH_CHECK(grad.layout() == at::kStrided && param.layout() == at::kStrided, optimizer,
              " does not support sparse gradients: ", name(), "; construct the embedding with sparse=False");
  const at::ScalarType dtype = param.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                   optimizer, " needs float32, float64, bfloat16 or float16 parameters: ", name(), " has dtype ",
                   dtype);
  TORCH_CHECK_TYPE(
      grad.scalar_type() == param.scalar_type() || grad.scalar_type() == arithmetic_type(param.scalar_type()),
      optimizer, ": gradient of ", name(), " has dtype ", grad.scalar_type(), ", the parameter ", param.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == param.sizes(), optimizer, ": gradient of ", name(), " has shape ", grad.sizes());
  TORCH_CHECK_VALUE(grad.device() == param.device(), optimizer, ": gradient of ", name(), " is on ", grad.device(),
                    ", the parameter on ", param.device());
  refuse_overlapping(param, "parameter", ordinal);  // here too, before any parameter is changed
}

void check_same_length(const char* op, const char* what, size_t expected, size_t got) {
  TORCH_CHECK_VALUE(expected == got, op, ": ", what, " has ", got, " tensors, expected ", expected);
}

Staged::Staged(const at::Tensor& tensor, at::IntArrayRef strides) : original_(tensor), staged_(tensor) {
  if (tensor.strides() == strides || tensor.numel() == 0) return;
  staged_ = at::empty_strided(tensor.sizes(), strides, tensor.options());
  staged_.copy_(tensor);
}

void Staged::finish() const {
  if (!staged_.is_same(original_)) original_.copy_(staged_);
}

std::vector<int64_t> walking_strides(const at::Tensor& lead, bool any_order, const char* what, size_t index) {
  if (any_order && lead.is_non_overlapping_and_dense()) return lead.strides().vec();
  refuse_overlapping(lead, what, index);
  std::vector<int64_t> strides(static_cast<size_t>(lead.dim()));
  int64_t next = 1;
  for (int64_t d = lead.dim() - 1; d >= 0; --d) {
    strides[static_cast<size_t>(d)] = next;
    next *= std::max<int64_t>(1, lead.size(d));
  }
  return strides;
}

std::vector<std::vector<size_t>> buckets(at::TensorList by) {
  std::vector<std::vector<size_t>> result;
  std::vector<std::pair<at::Device, at::ScalarType>> keys;
  for (size_t i = 0; i < by.size(); ++i) {
    const std::pair<at::Device, at::ScalarType> key{by[i].device(), by[i].scalar_type()};
    size_t k = 0;
    while (k < keys.size() && keys[k] != key) ++k;
    if (k == keys.size()) {
      keys.push_back(key);
      result.emplace_back();
    }
    result[k].push_back(i);
  }
  return result;
}

void* current_stream(const at::Device& device) {
  if (!device.is_cuda()) return nullptr;
  const c10::impl::VirtualGuardImpl guard(device.type());
  return guard.getStream(device).native_handle();
}

void bump_versions(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) torch::autograd::impl::bump_version(tensor);
}

}  // namespace torch_ext::core
