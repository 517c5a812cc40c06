#include "optim/mfac/mfac_op.h"

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/library.h"
#include "core/multi_tensor_cpu.h"
#include "curvature/fisher_window/fisher_window_args.h"
#include "curvature/fisher_window/fisher_window_op.h"
#include "optim/mfac/mfac_kernel.h"

namespace torch_ext::optim {
namespace {

using kernels::kTile;
using kernels::MfacTensor;
constexpr const char* kUpdateOp = "mfac_update_";

struct Lists {
  at::TensorList params, momentum_buffers, steps;
  const c10::List<std::optional<at::Tensor>>& grads;
  at::ArrayRef<double> lr, momentum, dampening, weight_decay;

  bool written(size_t i) const {
    const std::optional<at::Tensor> grad = grads.get(i);
    return grad.has_value() && grad->defined();
  }
};

void check_lengths(const Lists& l) {
  const size_t n = l.params.size();
  core::check_same_length(kUpdateOp, "momentum_buffers", n, l.momentum_buffers.size());
  core::check_same_length(kUpdateOp, "steps", n, l.steps.size());
  core::check_same_length(kUpdateOp, "grads", n, l.grads.size());
  for (const auto& values : {l.lr, l.momentum, l.dampening, l.weight_decay}) {
    TORCH_CHECK_VALUE(values.size() == n, kUpdateOp,
                      ": lr, momentum, dampening and weight_decay need a number for each of ", n, " parameters");
  }
}

void check_parameter(const Lists& l, size_t i) {
  const at::Tensor& param = l.params[i];
  const auto name = [&] { return core::describe("parameter", i, param); };
  core::check_gradient(kUpdateOp, i, param, param);
  const at::Tensor &buffer = l.momentum_buffers[i], &step = l.steps[i];
  TORCH_CHECK_VALUE(l.momentum[i] == 0 || (buffer.sizes() == param.sizes() && buffer.device() == param.device() &&
                                           buffer.scalar_type() == core::arithmetic_type(param.scalar_type())),
                    kUpdateOp, ": the momentum buffer of ", name(), " must be ",
                    core::arithmetic_type(param.scalar_type()), " of its shape on its device");
  TORCH_CHECK_VALUE(step.numel() == 1 && step.scalar_type() == at::kFloat && step.device() == param.device(), kUpdateOp,
                    ": step of ", name(), " must be one float32 on its device");
}

// The written parameters of one device in kernel form; finish() writes back what had to be copied.
class Batch {
 public:
  Batch(const Lists& l, const std::vector<int64_t>& begins, const at::Device& device) {
    staged_.reserve(2 * l.params.size());
    for (size_t i = 0; i < l.params.size(); ++i) {
      const at::Tensor& param = l.params[i];
      if (param.device() != device || !l.written(i)) continue;
      const auto strides = core::walking_strides(param, /*any_order=*/false, "parameter", i);
      MfacTensor t{};
      t.param = staged_.emplace_back(param, strides).data();
      t.buffer = l.momentum[i] == 0 ? nullptr : staged_.emplace_back(l.momentum_buffers[i], strides).data();
      t.step = l.steps[i].data_ptr<float>();
      t.begin = begins[i];
      t.numel = param.numel();
      t.lr = l.lr[i];
      t.momentum = l.momentum[i];
      t.dampening = l.dampening[i];
      t.weight_decay = l.weight_decay[i];
      t.type = core::dtype_of(param, "parameter");
      tensors.push_back(t);
    }
  }
  void finish() const {
    for (const core::Staged& staged : staged_) staged.finish();
  }

  std::vector<MfacTensor> tensors;  // ascending in begin

 private:
  std::vector<core::Staged> staged_;
};

void count_step(const Batch& batch) {
  for (const MfacTensor& t : batch.tensors) *t.step += 1;
}

// u stands ready: chunks of all parameters.
void apply_flat(const Batch& batch, const at::Tensor& update) {
  const auto* from = static_cast<const char*>(update.const_data_ptr());
  const bool wide = update.scalar_type() == at::kDouble;
  std::vector<core::Split> splits;
  std::vector<int64_t> numels;
  for (const MfacTensor& t : batch.tensors) {
    splits.push_back(core::Split::of(t.numel, 1));
    numels.push_back(t.numel);
  }
  core::for_each_chunk(splits, numels, [&](size_t i, int64_t begin, int64_t end) {
    const MfacTensor& t = batch.tensors[i];
    kernels::mfac_update_cpu(t, from + (t.begin + begin) * update.element_size(), wide, begin, end);
  });
}

// u is formed a tile at a time and used at once.
void apply_fused(const Batch& batch, const kernels::WindowView& view, const at::Tensor& rows,
                 const at::Tensor& coefficients) {
  const auto live = kernels::window_live(view.ring, coefficients.const_data_ptr<double>());
  const bool wide = view.format == kernels::WindowFormat::kDouble;
  const int64_t bytes = rows.size(1) * rows.size(2) * rows.element_size();
  at::parallel_for(0, view.tiles, curvature::window_grain(bytes), [&](int64_t first, int64_t last) {
    alignas(64) double update[kTile];  // of floats where the format is not double
    const int64_t size = wide ? sizeof(double) : sizeof(float);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * kTile, end = begin + kTile;
      auto t = std::upper_bound(batch.tensors.begin(), batch.tensors.end(), begin,
                                [](int64_t column, const MfacTensor& x) { return column < x.begin + x.numel; });
      if (t == batch.tensors.end() || t->begin >= end) continue;
      kernels::window_combine_cpu(view, live, tile, update);
      for (; t != batch.tensors.end() && t->begin < end; ++t) {
        const int64_t from = std::max(begin, t->begin), to = std::min(end, t->begin + t->numel);
        const auto* u = reinterpret_cast<const char*>(update) + (from - begin) * size;
        kernels::mfac_update_cpu(*t, u, wide, from - t->begin, to - t->begin);
      }
    }
  });
}

void update_impl(at::TensorList params, at::TensorList momentum_buffers, at::TensorList steps,
                 const c10::List<std::optional<at::Tensor>>& grads, const at::Tensor& rows, const at::Tensor& scales,
                 const at::Tensor& indices, const at::Tensor& coefficients, const at::Tensor& ring,
                 const std::optional<at::Tensor>& update, std::string_view format, at::ArrayRef<double> lr,
                 at::ArrayRef<double> momentum, at::ArrayRef<double> dampening, at::ArrayRef<double> weight_decay) {
  const at::NoGradGuard no_grad;
  const Lists lists{params, momentum_buffers, steps, grads, lr, momentum, dampening, weight_decay};
  check_lengths(lists);
  std::vector<int64_t> begins;
  int64_t numel = 0;
  bool with_window = !update.has_value();
  for (size_t i = 0; i < params.size(); ++i) {
    if (lists.written(i)) check_parameter(lists, i);
    begins.push_back(numel);
    numel += params[i].numel();
    with_window = with_window && params[i].device() == rows.device();
  }
  // On CUDA a row of topk scatters into a whole tile, which a thread that writes one column cannot do on the way.
  with_window = with_window && !(rows.is_cuda() && format == "topk");
  const auto type = curvature::window_arithmetic(curvature::window_format(format));
  at::Tensor flat;
  if (update.has_value()) {
    TORCH_CHECK_VALUE(update->dim() == 1 && update->numel() >= numel, kUpdateOp, ": update must be flat with at least ",
                      numel, " elements, got shape ", update->sizes());
    flat = update->to(type);
  } else if (!with_window) {
    flat = curvature::fisher_window_combine(rows, scales, indices, coefficients, ring, numel, format);
  } else {
    TORCH_CHECK_VALUE(coefficients.scalar_type() == at::kDouble && coefficients.is_contiguous() &&
                          coefficients.numel() == rows.size(1) && coefficients.device() == rows.device(),
                      kUpdateOp, ": coefficients must be float64 [num_grads + 1] on the window's device");
    TORCH_CHECK_VALUE(numel <= rows.size(0) * kTile, kUpdateOp, ": the parameters have ", numel,
                      " elements, the window's rows ", rows.size(0) * kTile);
  }
  for (const auto& bucket : core::buckets(params)) {
    const at::Device device = params[bucket[0]].device();
    if (std::any_of(params.begin(), params.begin() + static_cast<std::ptrdiff_t>(bucket[0]),
                    [&](const at::Tensor& p) { return p.device() == device; })) {
      continue;  // buckets differ in dtype too; a device is done with its first one
    }
    const at::Tensor local_ring = ring.to(device, at::kLong, /*non_blocking=*/device.is_cuda());
    const Batch batch(lists, begins, device);
    const at::Tensor u =
        with_window ? at::Tensor() : flat.to(device, type, /*non_blocking=*/device.is_cuda()).contiguous();
    if (device.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
      const c10::DeviceGuard guard(device);
      void* const stream = core::current_stream(device);
      if (with_window) {
        kernels::mfac_fused_cuda(batch.tensors, curvature::window_view(rows, scales, indices, {}, ring, format),
                                 coefficients.const_data_ptr<double>(), stream);
      } else {
        kernels::mfac_update_cuda(batch.tensors, u.const_data_ptr(), type == at::kDouble,
                                  local_ring.const_data_ptr<int64_t>(), stream);
      }
#endif
    } else {
      if (local_ring.const_data_ptr<int64_t>()[kernels::kRingAccepted] == 0) continue;
      if (with_window) {
        apply_fused(batch, curvature::window_view(rows, scales, indices, {}, ring, format), rows, coefficients);
      } else {
        apply_flat(batch, u);
      }
      count_step(batch);
    }
    batch.finish();
  }
}

void update_meta(at::TensorList params, at::TensorList momentum_buffers, at::TensorList steps,
                 const c10::List<std::optional<at::Tensor>>& grads, const at::Tensor&, const at::Tensor&,
                 const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                 std::string_view format, at::ArrayRef<double> lr, at::ArrayRef<double> momentum,
                 at::ArrayRef<double> dampening, at::ArrayRef<double> weight_decay) {
  curvature::window_format(format);
  check_lengths({params, momentum_buffers, steps, grads, lr, momentum, dampening, weight_decay});
}

at::Tensor flatten_meta(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList params,
                        at::ArrayRef<double> weight_decay, bool, const std::optional<at::Tensor>&,
                        c10::SymInt padded_numel, std::string_view format) {
  core::check_same_length("mfac_flatten", "grads", params.size(), grads.size());
  core::check_same_length("mfac_flatten", "weight_decay", params.size(), weight_decay.size());
  TORCH_CHECK_VALUE(!params.empty(), "mfac_flatten: no parameters");
  const auto type = curvature::window_arithmetic(curvature::window_format(format));
  return at::empty_symint({std::move(padded_numel)}, params[0].options().dtype(type).requires_grad(false));
}

at::Tensor flatten_impl(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList params,
                        at::ArrayRef<double> weight_decay, bool negate, const std::optional<at::Tensor>& grad_scale,
                        int64_t padded_numel, std::string_view format) {
  at::Tensor row = flatten_meta(grads, params, weight_decay, negate, grad_scale, padded_numel, format);
  const curvature::RowSources sources("mfac_flatten", grads, params, weight_decay, row.device());
  TORCH_CHECK_VALUE(sources.numel() <= padded_numel, "mfac_flatten: the parameters have ", sources.numel(),
                    " elements, more than padded_numel = ", padded_numel);
  const bool wide = row.scalar_type() == at::kDouble;
  const curvature::RowFactor factor(negate, grad_scale, row.device());
  if (row.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    const c10::DeviceGuard guard(row.device());
    kernels::window_gather_cuda(sources.segments(), factor.sign(), factor.scale(), wide, padded_numel, row.data_ptr(),
                                core::current_stream(row.device()));
#endif
  } else {
    auto* out = static_cast<char*>(row.data_ptr());
    at::parallel_for(0, padded_numel, 32768, [&](int64_t begin, int64_t end) {
      kernels::window_gather_cpu(sources.segments(), factor.value(), wide, begin, end,
                                 out + begin * row.element_size());
    });
  }
  return row;
}

}  // namespace

void mfac_update_(at::TensorList params, at::TensorList momentum_buffers, at::TensorList steps,
                  const c10::List<std::optional<at::Tensor>>& grads, const at::Tensor& rows, const at::Tensor& scales,
                  const at::Tensor& indices, const at::Tensor& coefficients, const at::Tensor& ring,
                  const std::optional<at::Tensor>& update, std::string_view format, at::ArrayRef<double> lr,
                  at::ArrayRef<double> momentum, at::ArrayRef<double> dampening, at::ArrayRef<double> weight_decay) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::mfac_update_", "").typed<decltype(mfac_update_)>();
  op.call(params, momentum_buffers, steps, grads, rows, scales, indices, coefficients, ring, update, format, lr,
          momentum, dampening, weight_decay);
}

at::Tensor mfac_flatten(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList params,
                        at::ArrayRef<double> weight_decay, bool negate, const std::optional<at::Tensor>& grad_scale,
                        int64_t padded_numel, std::string_view format) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::mfac_flatten", "").typed<decltype(mfac_flatten)>();
  return op.call(grads, params, weight_decay, negate, grad_scale, padded_numel, format);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "mfac_update_(Tensor(a!)[] params, Tensor(b!)[] momentum_buffers, Tensor(c!)[] steps, Tensor?[] grads, "
      "Tensor rows, Tensor scales, Tensor indices, Tensor coefficients, Tensor ring, Tensor? update, *, str format, "
      "float[] lr, float[] momentum, float[] dampening, float[] weight_decay) -> ()");
  m.def(
      "mfac_flatten(Tensor?[] grads, Tensor[] params, float[] weight_decay, bool negate, Tensor? grad_scale, SymInt "
      "padded_numel, "
      "str format) -> Tensor");
}

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("mfac_update_", update_impl);
  m.impl("mfac_flatten", flatten_impl);
}
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("mfac_update_", update_impl);
  m.impl("mfac_flatten", flatten_impl);
}
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("mfac_update_", update_meta);
  m.impl("mfac_flatten", flatten_meta);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("mfac_update_", core::not_differentiable());
  m.impl("mfac_flatten", core::not_differentiable());
}
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) { m.impl("mfac_update_", core::mutating()); }

}  // namespace torch_ext::optim
