#include "moe/route/route_op.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "core/check.h"
#include "core/library.h"
#include "moe/route/route_kernel.h"

namespace torch_ext::moe {
namespace {

using Optional = std::optional<at::Tensor>;

// A thread counts for itself; integers, so the order in which threads add does not matter.
template <typename Work>
void count_in_parallel(int64_t tokens, int64_t per_token, const at::Tensor& counts, const Work& work) {
  constexpr int64_t kWorkPerThread = 32768;
  std::mutex adding;
  auto* total = counts.mutable_data_ptr<int32_t>();
  at::parallel_for(0, tokens, std::max<int64_t>(1, kWorkPerThread / per_token), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> own(static_cast<size_t>(counts.numel()));
    work(begin, end, own.data());
    const std::lock_guard<std::mutex> lock(adding);
    for (size_t i = 0; i < own.size(); ++i) total[i] += own[i];
  });
}

const bool* flags(const Optional& valid) { return valid ? valid->const_data_ptr<bool>() : nullptr; }
Optional contiguous(const Optional& tensor) { return tensor ? Optional(tensor->contiguous()) : std::nullopt; }
at::TensorOptions arithmetic_options(const at::Tensor& logits) {
  return logits.options().dtype(core::arithmetic_type(logits.scalar_type())).requires_grad(false);
}

RouteTensors outputs(const at::Tensor& logits, const c10::SymInt& tokens, int64_t top_k, bool dense, bool cutoff) {
  const auto values = arithmetic_options(logits);
  const auto integers = values.dtype(at::kInt);
  const auto rows = [&](const c10::SymInt& columns) { return std::vector<c10::SymInt>{tokens, columns}; };
  return {at::empty_symint(rows(top_k), values),
          at::empty_symint(rows(top_k), integers),
          at::empty_symint({logits.sym_size(1)}, integers),
          at::empty_symint({cutoff ? tokens : c10::SymInt(0)}, values),
          at::empty_symint(rows(top_k), values),
          dense ? at::empty_symint(rows(2), values) : at::empty({0}, values)};
}

RouteTensors forward_impl(const at::Tensor& logits_, const Optional& bias_, const Optional& valid_, int64_t top_k,
                          std::string_view score, bool normalize, double route_scale, int64_t num_groups,
                          int64_t top_groups, int64_t group_score_k, std::string_view nan_policy, bool cutoff) {
  const c10::OptionalDeviceGuard guard(device_of(logits_));
  const RouteMode mode = route_mode(top_k, score, normalize, nan_policy);
  const at::Tensor logits = logits_.contiguous();
  const Optional bias = contiguous(bias_), valid = contiguous(valid_);
  RouteTensors out = outputs(logits, logits.size(0), top_k, mode.dense, cutoff);
  const auto& [gates, ids, counts, cutoffs, a, norm] = out;
  counts.zero_();
  const kernels::RouteProblem problem{logits.size(0),
                                      logits.size(1),
                                      top_k,
                                      logits.const_data_ptr(),
                                      bias ? bias->const_data_ptr<float>() : nullptr,
                                      flags(valid),
                                      mode.score,
                                      mode.gate,
                                      route_scale,
                                      num_groups,
                                      top_groups,
                                      group_score_k,
                                      mode.zero_nan,
                                      gates.mutable_data_ptr(),
                                      ids.mutable_data_ptr<int32_t>(),
                                      a.mutable_data_ptr(),
                                      cutoff ? cutoffs.mutable_data_ptr() : nullptr,
                                      mode.dense ? norm.mutable_data_ptr() : nullptr};
  const core::DType type = core::dtype_of(logits, "moe.route: logits");
#if TORCH_EXT_WITH_CUDA
  if (logits.is_cuda()) {
    kernels::route_forward_cuda(problem, type, counts.mutable_data_ptr<int32_t>(),
                                core::current_stream(logits.device()));
    return out;
  }
#endif
  count_in_parallel(problem.tokens, problem.experts, counts, [&](int64_t begin, int64_t end, int32_t* own) {
    kernels::route_forward_cpu(problem, type, begin, end, own);
  });
  return out;
}

RouteTensors forward_meta(const at::Tensor& logits, const Optional&, const Optional&, int64_t top_k,
                          std::string_view score, bool normalize, double, int64_t, int64_t, int64_t,
                          std::string_view nan_policy, bool cutoff) {
  return outputs(logits, logits.sym_size(0), top_k, route_mode(top_k, score, normalize, nan_policy).dense, cutoff);
}

at::Tensor backward_impl(const at::Tensor& grad_gates, const Optional& grad_a_, const at::Tensor& ids_,
                         const at::Tensor& a_, const Optional& logits_, const Optional& norm_, int64_t num_experts,
                         at::ScalarType dtype, int64_t top_k, std::string_view score, bool normalize,
                         double route_scale, std::string_view nan_policy) {
  const c10::OptionalDeviceGuard guard(device_of(a_));
  const RouteMode mode = route_mode(top_k, score, normalize, nan_policy);
  const at::Tensor a = a_.contiguous(), ids = ids_.contiguous();
  const at::Tensor grad = grad_gates.to(a.scalar_type()).contiguous();
  const Optional grad_a = grad_a_ ? Optional(grad_a_->to(a.scalar_type()).contiguous()) : std::nullopt;
  const Optional logits = contiguous(logits_), norm = contiguous(norm_);
  at::Tensor out = at::empty({ids.size(0), num_experts}, a.options().dtype(dtype));
  const auto pointer = [](const Optional& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; };
  const kernels::RouteGradient gradient{
      ids.size(0),        num_experts,           top_k,           mode.score,
      mode.gate,          route_scale,           mode.zero_nan,   ids.const_data_ptr<int32_t>(),
      a.const_data_ptr(), grad.const_data_ptr(), pointer(grad_a), pointer(logits),
      pointer(norm),      out.mutable_data_ptr()};
  const core::DType type = core::dtype_of(out, "moe.route: logits");
#if TORCH_EXT_WITH_CUDA
  if (out.is_cuda()) {
    kernels::route_backward_cuda(gradient, type, core::current_stream(out.device()));
    return out;
  }
#endif
  constexpr int64_t kWorkPerThread = 65536;
  at::parallel_for(0, gradient.tokens, std::max<int64_t>(1, kWorkPerThread / num_experts),
                   [&](int64_t begin, int64_t end) { kernels::route_backward_cpu(gradient, type, begin, end); });
  return out;
}

at::Tensor backward_meta(const at::Tensor&, const Optional&, const at::Tensor& ids, const at::Tensor& a,
                         const Optional&, const Optional&, int64_t num_experts, at::ScalarType dtype, int64_t,
                         std::string_view, bool, double, std::string_view) {
  return at::empty_symint({ids.sym_size(0), num_experts}, a.options().dtype(dtype));
}

at::Tensor histogram_impl(const at::Tensor& logits_, const at::Tensor& cutoff_, const Optional& valid_,
                          const at::Tensor& bounds_, int64_t bins, std::string_view score) {
  const c10::OptionalDeviceGuard guard(device_of(logits_));
  const at::Tensor logits = logits_.contiguous(), cutoff = cutoff_.contiguous(), bounds = bounds_.contiguous();
  const Optional valid = contiguous(valid_);
  at::Tensor counts = at::zeros({logits.size(1), bins}, logits.options().dtype(at::kInt));
  const kernels::RouteBins problem{logits.size(0),
                                   logits.size(1),
                                   bins,
                                   logits.const_data_ptr(),
                                   cutoff.const_data_ptr(),
                                   flags(valid),
                                   bounds.const_data_ptr<float>(),
                                   route_mode(1, score, true, "zero").score};
  const core::DType type = core::dtype_of(logits, "moe.route: logits");
#if TORCH_EXT_WITH_CUDA
  if (logits.is_cuda()) {
    kernels::route_histogram_cuda(problem, type, counts.mutable_data_ptr<int32_t>(),
                                  core::current_stream(logits.device()));
    return counts;
  }
#endif
  const int64_t per_token = std::max<int64_t>(1, problem.experts / 4);  // larger pieces: a thread's table is large too
  count_in_parallel(problem.tokens, per_token, counts, [&](int64_t begin, int64_t end, int32_t* own) {
    kernels::route_histogram_cpu(problem, type, begin, end, own);
  });
  return counts;
}

at::Tensor histogram_meta(const at::Tensor& logits, const at::Tensor&, const Optional&, const at::Tensor&, int64_t bins,
                          std::string_view) {
  return at::empty_symint({logits.sym_size(1), bins}, logits.options().dtype(at::kInt).requires_grad(false));
}

void load_add_meta(const at::Tensor& total, const at::Tensor& counts) {
  TORCH_CHECK_TYPE(total.scalar_type() == at::kLong && counts.scalar_type() == at::kInt,
                   "moe_load_add_: total must be int64 and counts int32, got ", total.scalar_type(), " and ",
                   counts.scalar_type());
  TORCH_CHECK_VALUE(total.sym_sizes() == counts.sym_sizes() && total.device() == counts.device(),
                    "moe_load_add_: total has shape ", total.sym_sizes(), " on ", total.device(), ", counts ",
                    counts.sym_sizes(), " on ", counts.device(),
                    "; a router that moved between forward and backward cannot count");
}

void load_add_impl(const at::Tensor& total, const at::Tensor& counts_) {
  load_add_meta(total, counts_);
  const c10::OptionalDeviceGuard guard(device_of(total));
  const core::Staged staged(total, core::walking_strides(total, false, "moe_load_add_: total"));
  const at::Tensor counts = counts_.contiguous();
  auto* to = static_cast<int64_t*>(staged.data());
  if (total.is_cuda()) {
#if TORCH_EXT_WITH_CUDA
    kernels::load_add_cuda(to, counts.const_data_ptr<int32_t>(), counts.numel(), core::current_stream(total.device()));
#endif
  } else {
    kernels::load_add_cpu(to, counts.const_data_ptr<int32_t>(), counts.numel());
  }
  staged.finish();
}

}  // namespace

RouteTensors route_forward(const at::Tensor& logits, const Optional& bias, const Optional& valid, const RouteOptions& o,
                           bool cutoff) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::moe_route_forward", "")
                             .typed<decltype(forward_impl)>();
  return op.call(logits, bias, valid, o.top_k(), o.score(), o.normalize(), o.route_scale(), o.num_groups(),
                 o.top_groups(), o.group_score_k(), o.nan_policy(), cutoff);
}

at::Tensor route_backward(const at::Tensor& grad_gates, const at::Tensor& grad_a, const RouteSaved& saved,
                          const RouteOptions& o) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::moe_route_backward", "")
                             .typed<decltype(backward_impl)>();
  const at::Tensor by_gates = grad_gates.defined() ? grad_gates : at::zeros_like(saved.a);
  const Optional by_a = grad_a.defined() ? Optional(grad_a) : std::nullopt;
  return op.call(by_gates, by_a, saved.ids, saved.a, saved.logits, saved.norm, saved.num_experts, saved.dtype,
                 o.top_k(), o.score(), o.normalize(), o.route_scale(), o.nan_policy());
}

at::Tensor route_histogram(const at::Tensor& logits, const at::Tensor& cutoff, const Optional& valid,
                           const at::Tensor& bounds, int64_t bins, std::string_view score) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::moe_route_histogram", "")
                             .typed<decltype(histogram_impl)>();
  return op.call(logits, cutoff, valid, bounds, bins, score);
}

void load_add_(const at::Tensor& total, const at::Tensor& counts) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::moe_load_add_", "").typed<decltype(load_add_impl)>();
  op.call(total, counts);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.def(
      "moe_route_forward(Tensor logits, Tensor? bias, Tensor? valid, int top_k, str score, bool normalize, "
      "float route_scale, int num_groups, int top_groups, int group_score_k, str nan_policy, bool cutoff) -> "
      "(Tensor gates, Tensor ids, Tensor counts, Tensor cutoff, Tensor a, Tensor norm)");
  m.def(
      "moe_route_backward(Tensor grad_gates, Tensor? grad_a, Tensor ids, Tensor a, Tensor? logits, Tensor? norm, "
      "int num_experts, ScalarType dtype, int top_k, str score, bool normalize, float route_scale, str nan_policy) -> "
      "Tensor");
  m.def(
      "moe_route_histogram(Tensor logits, Tensor cutoff, Tensor? valid, Tensor bounds, int bins, str score) -> Tensor");
  m.def("moe_load_add_(Tensor(a!) total, Tensor counts) -> ()");
}
TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("moe_route_forward", forward_impl);
  m.impl("moe_route_backward", backward_impl);
  m.impl("moe_route_histogram", histogram_impl);
  m.impl("moe_load_add_", load_add_impl);
}
#if TORCH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("moe_route_forward", forward_impl);
  m.impl("moe_route_backward", backward_impl);
  m.impl("moe_route_histogram", histogram_impl);
  m.impl("moe_load_add_", load_add_impl);
}
#endif
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("moe_route_forward", forward_meta);
  m.impl("moe_route_backward", backward_meta);
  m.impl("moe_route_histogram", histogram_meta);
  m.impl("moe_load_add_", load_add_meta);
}
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("moe_route_forward", core::not_differentiable());
  m.impl("moe_route_backward", core::not_differentiable());
  m.impl("moe_route_histogram", core::not_differentiable());
  m.impl("moe_load_add_", core::not_differentiable());
}
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) { m.impl("moe_load_add_", core::mutating()); }

}  // namespace torch_ext::moe
