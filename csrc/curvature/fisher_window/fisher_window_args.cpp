#include "curvature/fisher_window/fisher_window_args.h"

#include "core/check.h"

namespace torch_ext::curvature {

using kernels::WindowFormat;

namespace {

void check(bool ok, const char* name, const at::Tensor& tensor, const char* expected) {
  TORCH_CHECK_VALUE(ok, "fisher_window: ", name, " is ", tensor.scalar_type(), " of shape ", tensor.sizes(), " on ",
                    tensor.device(), ", expected a contiguous ", expected);
}

bool fits(const at::Tensor& tensor, at::ScalarType type, at::IntArrayRef shape, const at::Device& device) {
  return tensor.scalar_type() == type && tensor.sizes() == shape && tensor.is_contiguous() && tensor.device() == device;
}

}  // namespace

WindowFormat window_format(std::string_view name) {
  if (name == "float32") return WindowFormat::kFloat;
  if (name == "float64") return WindowFormat::kDouble;
  if (name == "bfloat16") return WindowFormat::kBFloat16;
  if (name == "int8") return WindowFormat::kInt8;
  TORCH_CHECK_VALUE(name == "topk", "window_format must be 'float32', 'float64', 'bfloat16', 'int8' or 'topk', got '",
                    name, "'");
  return WindowFormat::kTopK;
}

at::ScalarType window_dtype(WindowFormat format) {
  switch (format) {
    case WindowFormat::kFloat:
      return at::kFloat;
    case WindowFormat::kDouble:
      return at::kDouble;
    case WindowFormat::kInt8:
      return at::kChar;
    default:
      return at::kBFloat16;
  }
}

at::ScalarType window_arithmetic(WindowFormat format) {
  return format == WindowFormat::kDouble ? at::kDouble : at::kFloat;
}

kernels::WindowView window_view(const at::Tensor& rows, const at::Tensor& scales, const at::Tensor& indices,
                                const at::Tensor& error, const at::Tensor& ring, std::string_view format) {
  kernels::WindowView view{};
  view.format = window_format(format);
  const auto& device = rows.device();
  const bool sparse = view.format == WindowFormat::kTopK;
  check(rows.dim() == 3 && rows.is_contiguous() && rows.scalar_type() == window_dtype(view.format) &&
            rows.size(1) >= 2 && (sparse ? rows.size(2) <= kernels::kTile : rows.size(2) == kernels::kTile),
        "rows", rows, "[tiles, num_grads + 1, 1024] (topk: kept entries) in the format's dtype");
  view.tiles = rows.size(0);
  view.slots = rows.size(1);
  view.kept = rows.size(2);
  check(fits(ring, at::kLong, {kernels::kRingSize}, device), "ring", ring, "int64 [9] on the window's device");
  view.rows = rows.data_ptr();
  view.ring = ring.const_data_ptr<int64_t>();
  if (view.format == WindowFormat::kInt8) {
    check(fits(scales, at::kFloat, {view.tiles, view.slots, kernels::kScales}, device), "scales", scales,
          "float32 [tiles, num_grads + 1, 4]");
    view.scales = scales.data_ptr<float>();
  }
  if (sparse) {
    check(fits(indices, at::kShort, rows.sizes(), device), "indices", indices, "int16 of the shape of rows");
    view.indices = indices.data_ptr<int16_t>();
  }
  if (error.defined() && error.numel() > 0) {
    check(fits(error, at::kFloat, {2, view.tiles * kernels::kTile}, device), "error", error,
          "float32 [2, tiles * 1024]");
    view.error = error.data_ptr<float>();
  }
  return view;
}

RowFactor::RowFactor(bool negate, const std::optional<at::Tensor>& grad_scale, const at::Device& device)
    : sign_(negate ? -1.0 : 1.0) {
  if (!grad_scale.has_value() || !grad_scale->defined()) return;
  TORCH_CHECK_VALUE(grad_scale->numel() == 1, "grad_scale must be one number, got shape ", grad_scale->sizes());
  scale_ = grad_scale->to(device, at::kFloat);
}

RowSources::RowSources(const char* op, const c10::List<std::optional<at::Tensor>>& grads, at::TensorList params,
                       at::ArrayRef<double> weight_decay, const at::Device& device) {
  core::check_same_length(op, "grads", params.size(), grads.size());
  core::check_same_length(op, "weight_decay", params.size(), weight_decay.size());
  const auto keep = [&](const at::Tensor& tensor) {
    return kept_
        .emplace_back(tensor.detach().to(device, tensor.scalar_type(), /*non_blocking=*/device.is_cuda()).contiguous())
        .const_data_ptr();
  };
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& param = params[i];
    const std::optional<at::Tensor> grad = grads.get(i);
    kernels::RowSegment segment{};
    segment.begin = numel_;
    segment.numel = param.numel();
    numel_ += segment.numel;
    if (segment.numel == 0) continue;
    if (grad.has_value() && grad->defined()) {
      TORCH_CHECK(grad->layout() == at::kStrided && param.layout() == at::kStrided, op, ": ",
                  core::describe("row", i, param), " is sparse; use .to_dense()");
      TORCH_CHECK_VALUE(grad->sizes() == param.sizes(), op, ": gradient of ", core::describe("parameter", i, param),
                        " has shape ", grad->sizes());
      segment.grad_type = core::dtype_of(*grad, core::describe("gradient", i, *grad));
      segment.param_type = core::dtype_of(param, core::describe("parameter", i, param));
      segment.weight_decay = weight_decay[i];
      segment.grad = keep(*grad);
      segment.param = weight_decay[i] != 0 ? keep(param) : nullptr;
    }
    segments_.push_back(segment);
  }
}

}  // namespace torch_ext::curvature
